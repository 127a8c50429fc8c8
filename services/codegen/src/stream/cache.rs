//! The response cache: complete answers by request, in this process or in a Redis that replicas share.
//!
//! The cache never fails a call. If it does not answer in time, the model is called, with a warning.

mod entry;
mod key;
mod memory;
mod redis;
mod store;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hapa_core::call_stats::CallStats;
use hapa_core::health_check::HealthCheck;
use hapa_core::service::ServiceSpec;
use hapa_store::redis::RedisUnavailable;
use secrecy::SecretString;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use self::entry::CacheEntry;
pub(crate) use self::key::{CacheKey, CacheKeyInput};
use self::memory::MemoryCache;
use self::redis::RedisCache;
pub(super) use self::store::CacheGeneration;
pub(crate) use self::store::StoreStats;
use self::store::{Lookup, Store};
use super::item::{AnswerEnd, StreamItem};
use super::shared::SharedStream;

/// Name of the cache in metrics and in the API.
pub(crate) const CACHE_NAME: &str = "code_generation";
/// Maximum number of answers that wait to be written to Redis. Further answers are not cached.
const WRITE_QUEUE_CAPACITY: usize = 256;

/// The settings.
#[derive(clap::Args, Clone, Debug)]
#[group(id = "cache")]
pub struct CacheConfig {
    /// How long an answer is cached, in seconds; 0 turns the cache off.
    #[arg(long, env = "CACHE_TTL", default_value = "1800", value_parser = hapa_core::config::seconds_or_none)]
    pub cache_ttl: Duration,
    /// Maximum number of cached answers: in REDIS_URL for all replicas together, or else in each replica.
    #[arg(long, env = "MAX_CACHE_SIZE", default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub max_cache_size: u32,
    /// Maximum wait for a cached answer or an idempotency key in Redis, in seconds. Then the model is called.
    #[arg(long, env = "CACHE_TIMEOUT_SECONDS", default_value = "0.1", value_parser = hapa_core::config::seconds)]
    pub cache_timeout_seconds: Duration,
}

/// Clones share one cache.
#[derive(Clone)]
pub(crate) struct ResponseCache(Arc<CacheInner>);

struct CacheInner {
    store: Arc<Store>,
    hits: AtomicU64,
    misses: AtomicU64,
    config: CacheConfig,
    writes: mpsc::Sender<PendingWrite>,
}

/// An answer that waits to be written to Redis. It holds its stream, so that identical requests join that meanwhile.
struct PendingWrite {
    key: CacheKey,
    generation: CacheGeneration,
    entry: CacheEntry,
    _stream: Arc<SharedStream>,
}

/// Writes one answer to the cache once it is complete.
pub(super) struct CacheWriter {
    store: Arc<Store>,
    writes: mpsc::Sender<PendingWrite>,
    key: CacheKey,
    generation: CacheGeneration,
}

/// The result of a lookup.
pub(super) struct CacheResult {
    /// The items of a cached answer.
    pub(super) items: Option<Vec<StreamItem>>,
    /// `None` if the answer cannot be cached.
    pub(super) generation: Option<CacheGeneration>,
    /// The cache did not answer.
    pub(super) error: Option<RedisUnavailable>,
}

impl ResponseCache {
    pub(crate) fn new(
        config: &CacheConfig,
        redis_url: Option<&SecretString>,
        spec: &mut ServiceSpec,
    ) -> anyhow::Result<Self> {
        let CacheConfig { cache_ttl: ttl, max_cache_size: capacity, cache_timeout_seconds } =
            *config;
        let store = Arc::new(match redis_url {
            _ if ttl.is_zero() => Store::Off,
            None => Store::Memory(MemoryCache::new(capacity, ttl)),
            Some(url) => {
                let redis = RedisCache::new(url, cache_timeout_seconds, capacity, ttl)?;
                Store::Redis(Box::new(redis))
            }
        });
        let (writes, pending) = mpsc::channel(WRITE_QUEUE_CAPACITY);
        if matches!(*store, Store::Redis(_)) {
            let target = Arc::clone(&store);
            spec.spawn_until(|end| run_writer(target, pending, end));
            spec.check(redis_check(Arc::clone(&store)));
        }
        let (hits, misses) = Default::default();
        let inner = CacheInner { store, hits, misses, config: config.clone(), writes };
        Ok(ResponseCache(Arc::new(inner)))
    }

    /// Whether CACHE_TTL turns the cache off.
    pub(super) fn is_off(&self) -> bool {
        matches!(*self.0.store, Store::Off)
    }

    /// Looks up an answer. Without `reads`, only the generation, with which a new answer can be cached.
    pub(super) async fn look_up(&self, key: CacheKey, reads: bool) -> CacheResult {
        let Lookup { entry, generation, error } = self.0.store.look_up(key, reads).await;
        if error.is_some() {
            metrics::counter!("hapa_cache_errors_total").increment(1);
        }
        CacheResult { items: entry.map(|entry| entry.items()), generation, error }
    }

    pub(super) fn writer(&self, key: CacheKey, generation: CacheGeneration) -> CacheWriter {
        let (store, writes) = (Arc::clone(&self.0.store), self.0.writes.clone());
        CacheWriter { store, writes, key, generation }
    }

    /// Counts a request that needed no model call, or one that did.
    pub(super) fn count(&self, is_hit: bool, stats: &CallStats) {
        stats.record_cache_lookup(is_hit);
        if is_hit {
            self.0.hits.fetch_add(1, Ordering::Relaxed);
            metrics::counter!("hapa_cache_hits_total", "cache" => CACHE_NAME).increment(1);
        } else {
            self.0.misses.fetch_add(1, Ordering::Relaxed);
            metrics::counter!("hapa_cache_misses_total", "cache" => CACHE_NAME).increment(1);
        }
    }

    /// Removes all answers. Returns their number.
    pub(crate) async fn clear(&self) -> Result<u64, RedisUnavailable> {
        self.0.store.clear().await
    }

    /// Whether all replicas share the cache.
    pub(crate) fn is_shared(&self) -> bool {
        matches!(*self.0.store, Store::Redis(_))
    }

    /// "off", "memory" or "redis".
    pub(crate) fn backend(&self) -> &'static str {
        self.0.store.name()
    }

    pub(crate) async fn stats(&self) -> StoreStats {
        self.0.store.stats().await
    }

    /// Requests of this replica that needed no model call, and those that did.
    pub(crate) fn hits_and_misses(&self) -> (u64, u64) {
        (self.0.hits.load(Ordering::Relaxed), self.0.misses.load(Ordering::Relaxed))
    }

    pub(crate) fn config(&self) -> &CacheConfig {
        &self.0.config
    }
}

impl CacheWriter {
    /// Writes an answer, unless it is too large or empty.
    pub(super) fn write(
        self,
        items: &VecDeque<StreamItem>,
        finish: &AnswerEnd,
        stream: &Arc<SharedStream>,
    ) {
        let CacheWriter { store, writes, key, generation } = self;
        let Some(entry) = CacheEntry::new(items, finish) else { return };
        match &*store {
            Store::Off => {}
            Store::Memory(memory) => memory.insert(key, generation, entry),
            Store::Redis(_) => {
                let write = PendingWrite { key, generation, entry, _stream: Arc::clone(stream) };
                if writes.try_send(write).is_err() {
                    metrics::counter!("hapa_cache_errors_total").increment(1);
                }
            }
        }
    }
}

/// Writes answers to Redis one by one. Each is tried once.
async fn run_writer(
    store: Arc<Store>,
    mut pending: mpsc::Receiver<PendingWrite>,
    end: CancellationToken,
) {
    let Store::Redis(redis) = &*store else { return };
    loop {
        let write = tokio::select! {
            biased;
            () = end.cancelled() => return,
            write = pending.recv() => write,
        };
        let Some(PendingWrite { key, generation, entry, _stream }) = write else { return };
        if redis.insert(key, &generation, &entry).await.is_err() {
            metrics::counter!("hapa_cache_errors_total").increment(1);
        }
    }
}

/// Has the name of the rate limiter's check, because both report on the same Redis.
fn redis_check(store: Arc<Store>) -> HealthCheck {
    let run = move || {
        let store = Arc::clone(&store);
        async move {
            match &*store {
                Store::Redis(redis) if !redis.is_reachable().await => {
                    Err("Redis does not answer: this replica calls the model for every request"
                        .to_owned())
                }
                _ => Ok(()),
            }
        }
    };
    HealthCheck::new("redis", "Redis does not answer", run)
}
