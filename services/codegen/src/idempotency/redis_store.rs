//! Replies and leases in a Redis that all replicas share. A request waits for Redis only to look up its
//! key; all writes run in the background.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hapa_core::config::ConfigError;
use hapa_core::idempotency::{IdempotentRequest, RECORD_TTL};
use hapa_store::redis::{Redis, RedisOptions, RedisUnavailable, Script, Value};
use rand::RngExt as _;
use secrecy::SecretString;
use tokio::sync::mpsc;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::claim::{Claim, LeaseWrite};
use super::{MAX_BYTES, MAX_RECORDS, MAX_RECORDS_PER_CALLER};

/// Life of a lease that is not renewed, for example because its process died.
pub(super) const LEASE_TTL: Duration = Duration::from_secs(15);
/// Interval of polling a key that another replica has claimed, in milliseconds.
const POLL_INTERVAL_MS: std::ops::Range<u64> = 50..150;
/// Maximum number of queued commands; further ones fail as if Redis were down.
const QUEUE_CAPACITY: usize = 1_024;
/// The braces are a hash tag: they keep all keys on one cluster node, as multi-key scripts require.
const INDEX: &str = "hapa:{idempotency}:index";
const BYTES: &str = "hapa:{idempotency}:bytes";

/// The result of claiming a key.
pub(super) enum ClaimOutcome {
    /// The first request has been answered.
    Answered(Arc<[u8]>),
    /// This request is the first.
    Claimed(Claim),
    /// Redis does not answer. It may have recorded the claim nevertheless.
    Unavailable(Claim),
}

pub(super) struct RedisStore {
    redis: Arc<Redis>,
    claim: Script,
    writes: mpsc::Sender<LeaseWrite>,
}

/// The background task that writes to Redis, one write after another.
pub(super) struct LeaseWriter {
    redis: Arc<Redis>,
    writes: mpsc::Receiver<LeaseWrite>,
    renew: Script,
    release: Script,
    store_reply: Script,
}

fn record_name(record_id: &str) -> String {
    format!("hapa:{{idempotency}}:{record_id}")
}

fn claim_name(record_id: &str) -> String {
    format!("hapa:{{idempotency}}:claim:{record_id}")
}

fn millis(span: Duration) -> Value {
    i64::try_from(span.as_millis()).unwrap_or(i64::MAX).into()
}

fn count(number: usize) -> Value {
    i64::try_from(number).unwrap_or(i64::MAX).into()
}

impl RedisStore {
    pub(super) fn new(
        url: &SecretString,
        patience: Duration,
    ) -> Result<(Self, LeaseWriter), ConfigError> {
        let meanwhile = "idempotency keys are checked by this replica only";
        let manner = RedisOptions {
            reply_timeout: patience,
            max_queued: QUEUE_CAPACITY,
            fallback: meanwhile,
        };
        let redis = Arc::new(Redis::new(url, manner)?);
        let (write, waiting) = mpsc::channel(QUEUE_CAPACITY);
        let writer = LeaseWriter {
            redis: Arc::clone(&redis),
            writes: waiting,
            renew: Script::new(include_str!("renew.lua")),
            release: Script::new(include_str!("release.lua")),
            store_reply: Script::new(include_str!("store_reply.lua")),
        };
        let claim = Script::new(include_str!("claim.lua"));
        Ok((RedisStore { redis, claim, writes: write }, writer))
    }

    /// Claims a key. Waits while another replica runs its request.
    pub(super) async fn claim(&self, request: &IdempotentRequest) -> ClaimOutcome {
        let claim = Claim::new(request.record_id(), self.writes.clone());
        loop {
            let names = vec![record_name(request.record_id()), claim_name(request.record_id())];
            let arguments = vec![claim.token().into(), millis(LEASE_TTL)];
            let reply = self.redis.run::<(String, Bytes)>(&self.claim, names, arguments).await;
            let Ok((state, record)) = reply else {
                metrics::counter!("hapa_cache_errors_total").increment(1);
                return ClaimOutcome::Unavailable(claim);
            };
            match state.as_str() {
                "known" => return ClaimOutcome::Answered(Arc::from(&*record)),
                "claimed" => return ClaimOutcome::Claimed(claim),
                _ => {}
            }
            let pause = rand::rng().random_range(POLL_INTERVAL_MS);
            sleep(Duration::from_millis(pause)).await;
        }
    }
}

impl LeaseWriter {
    /// Runs until the server ends, then completes the queued writes.
    pub(super) async fn run(mut self, end: CancellationToken) {
        loop {
            let write = tokio::select! {
                biased;
                write = self.writes.recv() => write,
                () = end.cancelled() => return,
            };
            let Some(write) = write else { return };
            if self.write(write).await.is_err() {
                metrics::counter!("hapa_cache_errors_total").increment(1);
            }
        }
    }

    async fn write(&self, write: LeaseWrite) -> Result<(), RedisUnavailable> {
        match write {
            LeaseWrite::Renew { record_id, token } => {
                let arguments = vec![(&*token).into(), millis(LEASE_TTL)];
                self.redis.run(&self.renew, vec![claim_name(&record_id)], arguments).await
            }
            LeaseWrite::Release { record_id, token } => {
                let arguments = vec![(&*token).into()];
                self.redis.run(&self.release, vec![claim_name(&record_id)], arguments).await
            }
            LeaseWrite::StoreReply { record_id, token, caller, record } => {
                let of_caller = format!("hapa:{{idempotency}}:of:{caller}");
                let names = [INDEX, BYTES].map(str::to_owned).into_iter();
                let names = [record_name(&record_id), claim_name(&record_id), of_caller]
                    .into_iter()
                    .chain(names)
                    .collect();
                let arguments = vec![
                    (&*token).into(),
                    Bytes::copy_from_slice(&record).into(),
                    millis(RECORD_TTL),
                    count(MAX_RECORDS),
                    count(MAX_BYTES),
                    count(MAX_RECORDS_PER_CALLER),
                ];
                self.redis.run(&self.store_reply, names, arguments).await
            }
        }
    }
}
