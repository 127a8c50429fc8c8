//! Replies and leases in a Redis that replicas share. A replica waits for Redis only to look a key up.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hapa_core::config::Wrong;
use hapa_core::idempotency::{IdempotentRequest, LIFETIME};
use hapa_store::redis::{Away, Manner, Redis, Script, Value};
use rand::RngExt as _;
use secrecy::SecretString;
use tokio::sync::mpsc;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::claim::{Claim, Write};
use super::{MAX_BYTES, MAX_RECORDS, MAX_RECORDS_PER_CALLER};

/// How long a lease outlives its process.
pub(super) const LEASE: Duration = Duration::from_secs(15);
/// Between two looks at a key that another replica holds, in milliseconds.
const POLL_INTERVAL_MS: std::ops::Range<u64> = 50..150;
/// Commands that may wait for a connection or its socket; more find no Redis.
const QUEUE_CAPACITY: usize = 1_024;
/// In braces, which keep them on one node of a cluster: a script takes several keys.
const INDEX: &str = "hapa:{idempotency}:index";
const BYTES: &str = "hapa:{idempotency}:bytes";

/// What Redis knows of a key.
pub(super) enum Lookup {
    /// The first request has been answered.
    Known(Arc<[u8]>),
    /// This request is the first.
    Claimed(Claim),
    /// Redis does not answer. The claim may have been made there all the same.
    Away(Claim),
}

pub(super) struct Shared {
    redis: Arc<Redis>,
    claim: Script,
    writes: mpsc::Sender<Write>,
}

/// Writes to Redis, one after the other.
pub(super) struct Writer {
    redis: Arc<Redis>,
    writes: mpsc::Receiver<Write>,
    renew: Script,
    release: Script,
    keep: Script,
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

impl Shared {
    pub(super) fn new(url: &SecretString, patience: Duration) -> Result<(Self, Writer), Wrong> {
        let meanwhile = "this replica alone checks its idempotency keys";
        let manner = Manner { patience, most_queued: QUEUE_CAPACITY, meanwhile };
        let redis = Arc::new(Redis::new(url, manner)?);
        let (write, waiting) = mpsc::channel(QUEUE_CAPACITY);
        let writer = Writer {
            redis: Arc::clone(&redis),
            writes: waiting,
            renew: Script::new(include_str!("renew.lua")),
            release: Script::new(include_str!("release.lua")),
            keep: Script::new(include_str!("keep.lua")),
        };
        let claim = Script::new(include_str!("claim.lua"));
        Ok((Shared { redis, claim, writes: write }, writer))
    }

    /// Looks a key up, and waits while another replica runs its request.
    pub(super) async fn claim(&self, request: &IdempotentRequest) -> Lookup {
        let claim = Claim::new(request.record_id(), self.writes.clone());
        loop {
            let names = vec![record_name(request.record_id()), claim_name(request.record_id())];
            let arguments = vec![claim.token().into(), millis(LEASE)];
            let found = self.redis.ask::<(String, Bytes)>(&self.claim, names, arguments).await;
            let Ok((state, record)) = found else {
                metrics::counter!("hapa_cache_errors_total").increment(1);
                return Lookup::Away(claim);
            };
            match state.as_str() {
                "known" => return Lookup::Known(Arc::from(&*record)),
                "claimed" => return Lookup::Claimed(claim),
                _ => {}
            }
            let pause = rand::rng().random_range(POLL_INTERVAL_MS);
            sleep(Duration::from_millis(pause)).await;
        }
    }
}

impl Writer {
    /// Until the server ends, and then what was handed over before.
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

    async fn write(&self, write: Write) -> Result<(), Away> {
        match write {
            Write::Renew { record_id, token } => {
                let arguments = vec![(&*token).into(), millis(LEASE)];
                self.redis.ask(&self.renew, vec![claim_name(&record_id)], arguments).await
            }
            Write::Release { record_id, token } => {
                let arguments = vec![(&*token).into()];
                self.redis.ask(&self.release, vec![claim_name(&record_id)], arguments).await
            }
            Write::Keep { record_id, token, caller, record } => {
                let of_caller = format!("hapa:{{idempotency}}:of:{caller}");
                let names = [INDEX, BYTES].map(str::to_owned).into_iter();
                let names = [record_name(&record_id), claim_name(&record_id), of_caller]
                    .into_iter()
                    .chain(names)
                    .collect();
                let arguments = vec![
                    (&*token).into(),
                    Bytes::copy_from_slice(&record).into(),
                    millis(LIFETIME),
                    count(MAX_RECORDS),
                    count(MAX_BYTES),
                    count(MAX_RECORDS_PER_CALLER),
                ];
                self.redis.ask(&self.keep, names, arguments).await
            }
        }
    }
}
