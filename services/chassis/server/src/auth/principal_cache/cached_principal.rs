//! One cached answer of auth, and the calls in progress that depend on it.

use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering};
use std::time::Duration;

use hapa_core::timestamps::{micros, now};
use hapa_proto::auth::v1::{Principal, Revocation};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::credential::Credential;

/// Maximum age of an answer while auth sends no heartbeat.
pub(super) const UNVERIFIED_TTL: Duration = Duration::from_secs(5);
/// Maximum age of an answer while auth sends heartbeats. Auth sees the use of a key only when it is asked. So this
/// bounds the age of "last used": 60 s, including the time until auth writes it.
pub(super) const CACHE_TTL: Duration = Duration::from_secs(45);
/// The expiry of a credential that does not expire.
const MAX_EXPIRY: i64 = i64::MAX;

/// A principal, as auth authenticated it.
#[derive(Debug)]
pub struct CachedPrincipal {
    /// The subject of rate limits: a key, or the user of a session.
    pub subject: Arc<str>,
    /// The answer of auth.
    pub principal: Arc<Principal>,
    /// Fires when calls in progress must end.
    pub ended: CancellationToken,
    pub(super) credential: Credential,
    /// In microseconds since 1970.
    expires: AtomicI64,
    /// When auth was asked.
    pub(super) asked: Instant,
    /// The generation of auth's revocations that the answer includes.
    pub(super) generation: i64,
    /// Auth must be asked again.
    is_stale: AtomicBool,
    active_calls: AtomicUsize,
}

impl CachedPrincipal {
    pub(super) fn new(
        credential: Credential,
        principal: Principal,
        generation: i64,
        asked: Instant,
    ) -> Self {
        let subject = if principal.key_id.is_empty() {
            format!("user:{}", principal.owner)
        } else {
            format!("key:{}", principal.key_id)
        };
        CachedPrincipal {
            subject: subject.into(),
            expires: AtomicI64::new(principal.expire_time.as_ref().map_or(MAX_EXPIRY, micros)),
            principal: Arc::new(principal),
            ended: CancellationToken::new(),
            credential,
            asked,
            generation,
            is_stale: AtomicBool::new(false),
            active_calls: AtomicUsize::new(0),
        }
    }

    pub(super) fn has_expired(&self) -> bool {
        self.expires.load(Ordering::Acquire) <= now()
    }

    /// Takes over the expiry of a newer answer.
    pub(super) fn update_expiry(&self, newer: &CachedPrincipal) {
        self.expires.store(newer.expires.load(Ordering::Acquire), Ordering::Release);
    }

    pub(super) fn is_stale(&self) -> bool {
        self.is_stale.load(Ordering::Acquire)
    }

    pub(super) fn mark_stale(&self) {
        self.is_stale.store(true, Ordering::Release);
    }

    pub(super) fn has_active_calls(&self) -> bool {
        self.active_calls.load(Ordering::Acquire) > 0
    }

    /// Whether a change is newer than the answer and concerns its credential.
    pub(super) fn matches(&self, change: &Revocation) -> bool {
        let principal = &self.principal;
        let same = |named: &str, own: &str| !named.is_empty() && named == own;
        self.generation < change.generation
            && (same(&change.key_id, &principal.key_id)
                || same(&change.session_id, &principal.session_id)
                || same(&change.owner, &principal.owner))
    }

    /// Applies a change that matches.
    pub(super) fn apply(&self, change: &Revocation) {
        self.mark_stale();
        if change.ends_calls {
            self.ended.cancel();
        }
    }
}

/// A call in progress. It keeps its principal within reach of changes and of expiry, even after the cache has
/// evicted the principal.
#[derive(Debug)]
pub(crate) struct ActiveCallGuard(Arc<CachedPrincipal>);

impl ActiveCallGuard {
    pub(crate) fn start(principal: Arc<CachedPrincipal>) -> Self {
        principal.active_calls.fetch_add(1, Ordering::AcqRel);
        ActiveCallGuard(principal)
    }
}

impl Deref for ActiveCallGuard {
    type Target = CachedPrincipal;

    fn deref(&self) -> &CachedPrincipal {
        &self.0
    }
}

impl Drop for ActiveCallGuard {
    fn drop(&mut self) {
        self.0.active_calls.fetch_sub(1, Ordering::AcqRel);
    }
}
