//! Principal cache: asks auth for the principal of a credential, and caches the answer for as long as auth would give
//! the same one.
//!
//! Auth streams every change as it happens (`WatchRevocations`). An answer is valid while it is young and auth sends
//! heartbeats; without heartbeats it is valid for 5 s. An answer that left auth before a change that concerns it is
//! invalid on arrival, however late it arrives.

mod auth_link;
mod cached_principal;
mod credential;
mod revocation_state;
mod stats;

use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt as _, stream};
use hapa_core::key_format::KeyDigest;
use hapa_core::principal_cache::PrincipalCacheStats;
use hapa_core::rpc_error::{ErrorCode, RpcError, published_code};
use hapa_proto::auth::v1::{Principal, WatchRevocationsRequest};
use hapa_transport::peer::AuthClient;
use moka::future::Cache;
use tokio::time::{Instant, sleep, timeout};
use tonic::{Code, Status};

use self::auth_link::{AuthLink, RESPONSE_TIMEOUT};
use self::cached_principal::{CACHE_TTL, UNVERIFIED_TTL};
use self::revocation_state::RevocationState;
use self::stats::CacheCounters;

pub(crate) use self::cached_principal::ActiveCallGuard;
pub use self::cached_principal::CachedPrincipal;
pub use self::credential::Credential;

/// Maximum number of cached credentials.
const MAX_ENTRIES: u64 = 100_000;
/// The revocation stream counts as lost without a message for this long. Auth sends a heartbeat four times a second.
const HEARTBEAT_TIMEOUT: Duration = Duration::from_secs(3);
/// Interval of the checks for expired credentials, and for calls in progress after a change.
const CHECK_INTERVAL: Duration = Duration::from_millis(250);
/// Maximum number of principals that are rechecked at once.
const MAX_CONCURRENT_RECHECKS: usize = 64;
/// Maximum delay between two attempts to open the revocation stream.
const MAX_RECONNECT_DELAY: Duration = Duration::from_secs(1);
/// Attempts to get an answer that no change overtakes.
const MAX_ATTEMPTS: usize = 3;

/// An answer of auth about a credential.
#[derive(Clone, Debug)]
enum CacheEntry {
    Principal(Arc<CachedPrincipal>),
    Refused(ErrorCode, Instant),
}

/// The principals of recent callers. Clones share one cache.
#[derive(Clone)]
pub struct PrincipalCache {
    auth: AuthClient,
    entries: Cache<KeyDigest, CacheEntry>,
    revocations: Arc<RevocationState>,
    link: Arc<AuthLink>,
    counters: Arc<CacheCounters>,
}

impl PrincipalCache {
    /// An empty cache in front of this auth service.
    pub fn new(auth: AuthClient) -> Self {
        let entries = Cache::builder().max_capacity(MAX_ENTRIES).time_to_live(CACHE_TTL).build();
        let (revocations, link) = (Arc::new(RevocationState::new()), Arc::new(AuthLink::new()));
        PrincipalCache {
            auth,
            entries,
            revocations,
            link,
            counters: Arc::new(CacheCounters::new()),
        }
    }

    /// The principal of a credential, if it is cached.
    pub async fn cached(&self, credential: &Credential) -> Option<Arc<CachedPrincipal>> {
        match self.entries.get(&credential.digest()).await {
            Some(CacheEntry::Principal(principal)) if self.revocations.is_valid(&principal) => {
                self.counters.hit();
                Some(principal)
            }
            _ => None,
        }
    }

    /// The cached refusal of a credential, so that a repeated wrong credential costs neither a lookup nor a second
    /// failed attempt.
    pub(crate) async fn cached_refusal(&self, credential: &Credential) -> Option<RpcError> {
        match self.entries.get(&credential.digest()).await {
            Some(CacheEntry::Refused(code, asked)) if asked.elapsed() < UNVERIFIED_TTL => {
                Some(refusal(code))
            }
            _ => None,
        }
    }

    /// The principal of a credential. An unknown credential is E4003, an ended one E4007. If auth can't be asked,
    /// the result is E5003: never a principal, and never "unknown".
    ///
    /// Concurrent lookups of one credential share one request to auth, so no caller's own deadline bounds it. If the
    /// call that sends the request is dropped, the next one in line sends it again.
    pub async fn find(&self, credential: &Credential) -> Result<Arc<CachedPrincipal>, RpcError> {
        let digest = credential.digest();
        // A change can overtake an answer; the next answer includes it.
        for _ in 0..MAX_ATTEMPTS {
            if let Some(entry) = self.entries.get(&digest).await {
                match entry {
                    CacheEntry::Principal(principal) if self.revocations.is_valid(&principal) => {
                        return Ok(principal);
                    }
                    CacheEntry::Refused(code, asked) if asked.elapsed() < UNVERIFIED_TTL => {
                        return Err(refusal(code));
                    }
                    CacheEntry::Principal(_) | CacheEntry::Refused(..) => {
                        self.entries.invalidate(&digest).await;
                    }
                }
            }
            let answer = self.entries.try_get_with(digest, self.authenticate(credential)).await;
            let entry = answer.map_err(|status| {
                let message = "credentials can't be checked at the moment; try again";
                RpcError::new(ErrorCode::DatabaseError, message).with_cause(&*status)
            })?;
            match entry {
                CacheEntry::Principal(principal) if self.revocations.is_valid(&principal) => {
                    return Ok(principal);
                }
                CacheEntry::Principal(principal) if principal.has_expired() => {
                    return Err(refusal(ErrorCode::KeyEnded));
                }
                CacheEntry::Principal(_) => {}
                CacheEntry::Refused(code, _) => return Err(refusal(code)),
            }
        }
        let message = "this credential is being changed; try again";
        Err(RpcError::new(ErrorCode::DatabaseError, message))
    }

    async fn authenticate(&self, credential: &Credential) -> Result<CacheEntry, Status> {
        self.counters.miss();
        let asked = Instant::now();
        // The link bounds the whole call, because a lazy channel also queues.
        let authenticate = || {
            let (mut auth, request) = (self.auth.clone(), credential.request());
            async move { auth.authenticate(request).await }
        };
        match self.link.call(authenticate).await {
            Ok(response) => {
                let response = response.into_inner();
                let principal = response.principal;
                let principal =
                    principal.ok_or_else(|| Status::internal("auth returned no principal"))?;
                let generation = response.generation;
                let principal =
                    CachedPrincipal::new(credential.clone(), principal, generation, asked);
                Ok(CacheEntry::Principal(self.revocations.insert(principal)))
            }
            Err(status) if status.code() == Code::Unauthenticated => {
                match published_code(&status) {
                    Some((code, _)) if code == "E4007" => {
                        Ok(CacheEntry::Refused(ErrorCode::KeyEnded, asked))
                    }
                    // It concerns the mesh token of this process, not the caller's credential.
                    _ => Err(status),
                }
            }
            Err(status) if status.code() == Code::NotFound => {
                Ok(CacheEntry::Refused(ErrorCode::BadKey, asked))
            }
            Err(status) => Err(status),
        }
    }

    /// Applies every change that auth reports, for as long as the server runs.
    pub(crate) async fn watch_revocations(self, auth: AuthClient) {
        let mut delay = Duration::ZERO;
        loop {
            let had_message = self.read_revocations(auth.clone()).await;
            metrics::gauge!("hapa_revocation_link_up").set(0.0);
            // Jitter, so that the replicas do not reconnect at the same time.
            delay = if had_message { Duration::ZERO } else { (delay * 2).min(MAX_RECONNECT_DELAY) };
            delay += Duration::from_millis(rand::random_range(20..100));
            sleep(delay).await;
        }
    }

    /// Reads changes until the stream is lost. Returns whether it carried any message.
    async fn read_revocations(&self, mut auth: AuthClient) -> bool {
        let request = WatchRevocationsRequest { after_generation: self.revocations.generation() };
        let opened = timeout(RESPONSE_TIMEOUT, auth.watch_revocations(request)).await;
        let Ok(Ok(response)) = opened else {
            return false;
        };
        let (mut messages, mut had_message) = (response.into_inner(), false);
        while let Ok(Ok(Some(message))) = timeout(HEARTBEAT_TIMEOUT, messages.message()).await {
            self.revocations.apply(message);
            self.link.record_heartbeat();
            metrics::gauge!("hapa_revocation_link_up").set(1.0);
            had_message = true;
        }
        had_message
    }

    /// Counts the ticks since the last heartbeat of auth, for as long as the server runs.
    pub(crate) async fn count_silence(self) {
        self.link.count_silence().await;
    }

    /// Ends the calls of expired credentials, for as long as the server runs.
    pub(crate) async fn end_expired_calls(self) {
        loop {
            sleep(CHECK_INTERVAL).await;
            for principal in self.revocations.live_principals() {
                if principal.has_expired() {
                    principal.ended.cancel();
                }
            }
        }
    }

    /// Rechecks calls in progress after a change that did not end them, for as long as the server runs. Their
    /// credential may expire earlier, or its end may be among changes that were missed.
    pub(crate) async fn recheck_active_calls(self) {
        loop {
            sleep(CHECK_INTERVAL).await;
            let pending = stream::iter(self.revocations.take_pending_rechecks());
            pending
                .for_each_concurrent(MAX_CONCURRENT_RECHECKS, |principal| self.recheck(principal))
                .await;
        }
    }

    async fn recheck(&self, principal: Arc<CachedPrincipal>) {
        match self.find(&principal.credential).await {
            Ok(newer) if !has_fewer_rights(&principal.principal, &newer.principal) => {
                principal.update_expiry(&newer);
            }
            Err(fault) if fault.code() == ErrorCode::DatabaseError => {
                self.revocations.mark_for_recheck(&principal);
            }
            _ => principal.ended.cancel(),
        }
    }

    /// The size of the cache and its hits and misses.
    pub async fn stats(&self) -> PrincipalCacheStats {
        self.entries.run_pending_tasks().await;
        let (hits, misses) = self.counters.totals();
        let entries = self.entries.entry_count();
        PrincipalCacheStats { entries, hits, misses, capacity: MAX_ENTRIES, ttl: CACHE_TTL }
    }

    /// Removes every entry, so that auth is asked again; calls in progress go on. Returns the number of entries
    /// removed.
    pub async fn clear(&self) -> u64 {
        self.entries.run_pending_tasks().await;
        let entries = self.entries.entry_count();
        self.entries.invalidate_all();
        entries
    }
}

/// Whether the newer principal lacks a scope or a model of the older one.
fn has_fewer_rights(older: &Principal, newer: &Principal) -> bool {
    let lacks = |older: &[String], newer: &[String]| older.iter().any(|one| !newer.contains(one));
    let (older_models, newer_models) = (&older.allowed_models, &newer.allowed_models);
    // An empty list allows every model.
    lacks(&older.scopes, &newer.scopes)
        || (!newer_models.is_empty()
            && (older_models.is_empty() || lacks(older_models, newer_models)))
}

fn refusal(code: ErrorCode) -> RpcError {
    match code {
        ErrorCode::BadKey => unknown_credential(),
        _ => credential_ended(),
    }
}

/// The error for a credential that does not exist.
pub(crate) fn unknown_credential() -> RpcError {
    RpcError::new(ErrorCode::BadKey, "this API key or token is not known; check it for typos")
}

/// The error for a credential that has expired or was revoked.
pub(crate) fn credential_ended() -> RpcError {
    let message = "this API key or session has expired or was revoked; ask for a new one";
    RpcError::new(ErrorCode::KeyEnded, message)
}
