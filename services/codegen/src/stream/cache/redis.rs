//! The cache in a Redis that replicas share: one script for each operation, each with a short timeout.
//!
//! Every value begins with the cache generation of its lookup. Clearing starts another generation, so it is one step, exact
//! for every replica and for answers in progress. A Redis that has lost the generation starts a new one, so it loses
//! entries and never returns cleared ones.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use hapa_core::config::ConfigError;
use hapa_store::redis::{Redis, RedisOptions, RedisUnavailable, Script, Value};
use secrecy::SecretString;

use super::entry::CacheEntry;
use super::key::CacheKey;
use super::store::{CacheGeneration, Lookup, StoreStats};

/// Maximum number of lookups that wait for a connection or its socket. Further lookups fail at once.
const MAX_QUEUED: usize = 1024;
/// Maximum number of entries that one step of clearing removes.
const CLEAR_BATCH_SIZE: i64 = 1_000;
/// The braces keep all keys on one node of a cluster, because a script uses several. The tenant is part of the hash in
/// an entry's name.
const GENERATION: &str = "hapa:{cache}:era";
const INDEX: &str = "hapa:{cache}:index";

pub(super) struct RedisCache {
    redis: Redis,
    look_up: Script,
    insert: Script,
    count: Script,
    clear: Script,
    capacity: u32,
    ttl: Duration,
    evictions: AtomicU64,
}

fn name(key: CacheKey) -> String {
    format!("hapa:{{cache}}:{}", key.hex())
}

impl RedisCache {
    pub(super) fn new(
        url: &SecretString,
        timeout: Duration,
        capacity: u32,
        ttl: Duration,
    ) -> Result<Self, ConfigError> {
        let fallback = "this replica calls the model for every request";
        let options = RedisOptions { reply_timeout: timeout, max_queued: MAX_QUEUED, fallback };
        Ok(RedisCache {
            redis: Redis::new(url, options)?,
            look_up: Script::new(include_str!("look_up.lua")),
            insert: Script::new(include_str!("insert.lua")),
            count: Script::new(include_str!("count.lua")),
            clear: Script::new(include_str!("clear.lua")),
            capacity,
            ttl,
            evictions: AtomicU64::new(0),
        })
    }

    pub(super) async fn look_up(&self, key: CacheKey, reads: bool) -> Lookup {
        let arguments = vec![CacheGeneration::new().0.as_ref().into(), i64::from(reads).into()];
        let keys = vec![GENERATION.to_owned(), name(key)];
        match self.redis.run::<(String, Bytes)>(&self.look_up, keys, arguments).await {
            Ok((generation, bytes)) => {
                let generation = Some(CacheGeneration(generation.into()));
                // An entry of another version counts as absent.
                let entry = CacheEntry::decode_with_version(&bytes).map(Arc::new);
                Lookup { entry, generation, error: None }
            }
            Err(error) => Lookup { error: Some(error), ..Lookup::default() },
        }
    }

    pub(super) async fn insert(
        &self,
        key: CacheKey,
        generation: &CacheGeneration,
        entry: &CacheEntry,
    ) -> Result<(), RedisUnavailable> {
        let keys = vec![GENERATION.to_owned(), INDEX.to_owned(), name(key)];
        let ttl = i64::try_from(self.ttl.as_millis()).unwrap_or(i64::MAX).max(1);
        let arguments: Vec<Value> = vec![
            generation.0.as_ref().into(),
            entry.encode_with_version().into(),
            ttl.into(),
            i64::from(self.capacity).into(),
        ];
        let evicted: u64 = self.redis.run(&self.insert, keys, arguments).await?;
        self.evictions.fetch_add(evicted, Ordering::Relaxed);
        Ok(())
    }

    /// After the first step, no earlier entry is found. The other steps free the memory.
    pub(super) async fn clear(&self) -> Result<u64, RedisUnavailable> {
        let (mut removed, mut generation) = (0, CacheGeneration::new().0);
        let steps = i64::from(self.capacity) / CLEAR_BATCH_SIZE + 2;
        for _ in 0..steps {
            let keys = vec![GENERATION.to_owned(), INDEX.to_owned()];
            let arguments = vec![generation.as_ref().into(), CLEAR_BATCH_SIZE.into()];
            let (some, left): (u64, u64) = self.redis.run(&self.clear, keys, arguments).await?;
            removed += some;
            if left == 0 {
                break;
            }
            generation = "".into();
        }
        Ok(removed)
    }

    pub(super) async fn stats(&self) -> StoreStats {
        let entries = self.redis.run(&self.count, vec![INDEX.to_owned()], Vec::new()).await.ok();
        StoreStats { entries, bytes: None, evictions: self.evictions.load(Ordering::Relaxed) }
    }

    /// Whether Redis answers. Sends a request, so that the end of an outage is detected without a call.
    pub(super) async fn is_reachable(&self) -> bool {
        let _ = self.stats().await;
        self.redis.is_up()
    }
}
