//! The stores of cached answers: none, the memory of this process, or a Redis that replicas share.

use std::sync::Arc;

use hapa_store::redis::RedisUnavailable;
use uuid::Uuid;

use super::entry::CacheEntry;
use super::key::CacheKey;
use super::memory::MemoryCache;
use super::redis::RedisCache;

/// The period between two clearings of the cache. An entry is found only in the generation in which its request was
/// looked up, so clearing is one step, exact also for answers in progress.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(in crate::stream) struct CacheGeneration(pub(super) Arc<str>);

impl CacheGeneration {
    pub(super) fn new() -> Self {
        CacheGeneration(Uuid::now_v7().to_string().into())
    }
}

/// The result of a lookup.
#[derive(Default)]
pub(super) struct Lookup {
    pub(super) entry: Option<Arc<CacheEntry>>,
    /// `None` if a new answer cannot be cached.
    pub(super) generation: Option<CacheGeneration>,
    pub(super) error: Option<RedisUnavailable>,
}

/// The size of a store.
#[derive(Default)]
pub(crate) struct StoreStats {
    /// `None` if unknown.
    pub(crate) entries: Option<u64>,
    /// `None` if unknown.
    pub(crate) bytes: Option<u64>,
    /// Entries that this process has evicted to make room.
    pub(crate) evictions: u64,
}

pub(super) enum Store {
    /// CACHE_TTL=0.
    Off,
    Memory(MemoryCache),
    Redis(Box<RedisCache>),
}

impl Store {
    /// Its name in cache statistics.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Store::Off => "off",
            Store::Memory(_) => "memory",
            Store::Redis(_) => "redis",
        }
    }

    /// The current generation, and if `reads` is set the entry.
    pub(super) async fn look_up(&self, key: CacheKey, reads: bool) -> Lookup {
        match self {
            Store::Off => Lookup::default(),
            Store::Memory(memory) => memory.look_up(key, reads),
            // Boxed, because its future is much larger than those of the other stores.
            Store::Redis(redis) => Box::pin(redis.look_up(key, reads)).await,
        }
    }

    pub(super) async fn clear(&self) -> Result<u64, RedisUnavailable> {
        match self {
            Store::Off => Ok(0),
            Store::Memory(memory) => Ok(memory.clear()),
            Store::Redis(redis) => redis.clear().await,
        }
    }

    pub(super) async fn stats(&self) -> StoreStats {
        match self {
            Store::Off => StoreStats { entries: Some(0), bytes: Some(0), evictions: 0 },
            Store::Memory(memory) => memory.stats(),
            Store::Redis(redis) => redis.stats().await,
        }
    }
}
