//! Answers kept in a Redis that replicas share: one script to look, one to keep, none waited for
//! longer than a moment.
//!
//! Every value begins with the era in which it was asked for. Clearing begins another era, so it is one
//! step, exact on every replica, and also right for answers that are still on their way. A Redis that
//! has lost the era begins a new one: it forgets too much rather than too little.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use hapa_core::config::ConfigError;
use hapa_store::redis::{Redis, RedisOptions, RedisUnavailable, Script, Value};
use secrecy::SecretString;

use super::entry::Entry;
use super::key::Key;
use super::store::{Era, Held, Looked};

/// Looks that may wait for a connection or its socket; more go to the engine at once.
const MOST_QUEUED: usize = 1024;
/// Entries that one step of clearing removes.
const AT_ONCE: i64 = 1_000;
/// In braces, which keep them on one node of a cluster: a script takes several keys. The tenant is in
/// the hash of an entry's name.
const ERA: &str = "hapa:{cache}:era";
const INDEX: &str = "hapa:{cache}:index";

pub(super) struct Shared {
    redis: Redis,
    look: Script,
    keep: Script,
    count: Script,
    clear: Script,
    capacity: u32,
    ttl: Duration,
    evictions: AtomicU64,
}

fn name(key: Key) -> String {
    format!("hapa:{{cache}}:{}", key.hex())
}

impl Shared {
    pub(super) fn new(
        url: &SecretString,
        patience: Duration,
        capacity: u32,
        ttl: Duration,
    ) -> Result<Self, ConfigError> {
        let meanwhile = "this replica asks the model for every answer";
        let manner =
            RedisOptions { reply_timeout: patience, max_queued: MOST_QUEUED, fallback: meanwhile };
        Ok(Shared {
            redis: Redis::new(url, manner)?,
            look: Script::new(include_str!("look.lua")),
            keep: Script::new(include_str!("keep.lua")),
            count: Script::new(include_str!("count.lua")),
            clear: Script::new(include_str!("clear.lua")),
            capacity,
            ttl,
            evictions: AtomicU64::new(0),
        })
    }

    pub(super) async fn look(&self, key: Key, reads: bool) -> Looked {
        let arguments = vec![Era::new().0.as_ref().into(), i64::from(reads).into()];
        let keys = vec![ERA.to_owned(), name(key)];
        match self.redis.run::<(String, Bytes)>(&self.look, keys, arguments).await {
            Ok((era, bytes)) => {
                let era = Some(Era(era.into()));
                // One that can't be read is of another version: it is as good as none.
                Looked { answer: Entry::read(&bytes).map(Arc::new), era, failed: None }
            }
            Err(away) => Looked { failed: Some(away), ..Looked::default() },
        }
    }

    pub(super) async fn keep(
        &self,
        key: Key,
        era: &Era,
        entry: &Entry,
    ) -> Result<(), RedisUnavailable> {
        let keys = vec![ERA.to_owned(), INDEX.to_owned(), name(key)];
        let ttl = i64::try_from(self.ttl.as_millis()).unwrap_or(i64::MAX).max(1);
        let arguments: Vec<Value> = vec![
            era.0.as_ref().into(),
            entry.encode_with_version().into(),
            ttl.into(),
            i64::from(self.capacity).into(),
        ];
        let evicted: u64 = self.redis.run(&self.keep, keys, arguments).await?;
        self.evictions.fetch_add(evicted, Ordering::Relaxed);
        Ok(())
    }

    /// Once the first step is done nothing from before is found; the others give the memory back.
    pub(super) async fn clear(&self) -> Result<u64, RedisUnavailable> {
        let (mut removed, mut era) = (0, Era::new().0);
        let steps = i64::from(self.capacity) / AT_ONCE + 2;
        for _ in 0..steps {
            let keys = vec![ERA.to_owned(), INDEX.to_owned()];
            let arguments = vec![era.as_ref().into(), AT_ONCE.into()];
            let (some, left): (u64, u64) = self.redis.run(&self.clear, keys, arguments).await?;
            removed += some;
            if left == 0 {
                break;
            }
            era = "".into();
        }
        Ok(removed)
    }

    pub(super) async fn held(&self) -> Held {
        let entries = self.redis.run(&self.count, vec![INDEX.to_owned()], Vec::new()).await.ok();
        Held { entries, bytes: None, evictions: self.evictions.load(Ordering::Relaxed) }
    }

    /// Whether it answers now. Asks, so that an outage ends without a call.
    pub(super) async fn probe(&self) -> bool {
        let _ = self.held().await;
        self.redis.is_up()
    }
}
