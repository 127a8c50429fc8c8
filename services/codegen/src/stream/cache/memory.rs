//! The cache in the memory of this process, limited in entries and bytes. The min_weight recently used entries are evicted.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use moka::notification::RemovalCause;
use moka::policy::EvictionPolicy;
use moka::sync::Cache;
use prost::Message as _;

use super::entry::CacheEntry;
use super::key::CacheKey;
use super::store::{CacheGeneration, Lookup, StoreStats};

/// Maximum size of all entries together.
const MAX_BYTES: u64 = 64 * 1024 * 1024;

pub(super) struct MemoryCache {
    entries: Cache<(CacheGeneration, CacheKey), Arc<CacheEntry>>,
    /// Part of every key, so that clearing is one step.
    generation: RwLock<CacheGeneration>,
    counts: Arc<Counts>,
}

#[derive(Default)]
struct Counts {
    bytes: AtomicU64,
    evictions: AtomicU64,
}

impl MemoryCache {
    pub(super) fn new(capacity: u32, ttl: Duration) -> Self {
        let counts = Arc::new(Counts::default());
        let counting = Arc::clone(&counts);
        // Every entry has at min_weight this weight, so that neither limit is exceeded.
        let min_weight = u32::try_from(MAX_BYTES / u64::from(capacity)).unwrap_or(u32::MAX).max(1);
        let entries = Cache::builder()
            .max_capacity(u64::from(min_weight) * u64::from(capacity))
            .weigher(move |_, entry: &Arc<CacheEntry>| size(entry).max(min_weight))
            .eviction_policy(EvictionPolicy::lru())
            .time_to_live(ttl)
            .eviction_listener(move |_, entry, cause| {
                counting.bytes.fetch_sub(size(&entry).into(), Ordering::Relaxed);
                if cause == RemovalCause::Size {
                    counting.evictions.fetch_add(1, Ordering::Relaxed);
                }
            })
            .build();
        MemoryCache { entries, generation: RwLock::new(CacheGeneration::new()), counts }
    }

    fn generation(&self) -> CacheGeneration {
        self.generation.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn look_up(&self, key: CacheKey, reads: bool) -> Lookup {
        let generation = self.generation();
        let entry = if reads { self.entries.get(&(generation.clone(), key)) } else { None };
        Lookup { entry, generation: Some(generation), error: None }
    }

    /// Inserts an answer, unless the cache was cleared since its lookup.
    pub(super) fn insert(&self, key: CacheKey, generation: CacheGeneration, entry: CacheEntry) {
        if generation != self.generation() {
            return;
        }
        let entry = Arc::new(entry);
        self.counts.bytes.fetch_add(size(&entry).into(), Ordering::Relaxed);
        self.entries.insert((generation, key), entry);
    }

    pub(super) fn clear(&self) -> u64 {
        self.entries.run_pending_tasks();
        let entries = self.entries.entry_count();
        *self.generation.write().unwrap_or_else(PoisonError::into_inner) = CacheGeneration::new();
        self.entries.invalidate_all();
        entries
    }

    pub(super) fn stats(&self) -> StoreStats {
        self.entries.run_pending_tasks();
        StoreStats {
            entries: Some(self.entries.entry_count()),
            bytes: Some(self.counts.bytes.load(Ordering::Relaxed)),
            evictions: self.counts.evictions.load(Ordering::Relaxed),
        }
    }
}

fn size(entry: &CacheEntry) -> u32 {
    u32::try_from(entry.encoded_len()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::super::key::CacheKeyInput;
    use super::*;

    const TTL: Duration = Duration::from_hours(1);

    fn key(number: u32) -> CacheKey {
        let body = number.to_be_bytes();
        CacheKey::new(CacheKeyInput {
            tenant: None,
            model: "m",
            revision: "",
            body: &body,
            options: &[],
        })
    }

    fn answer(bytes: usize) -> CacheEntry {
        CacheEntry::of_text(&"x".repeat(bytes))
    }

    fn insert(memory: &MemoryCache, number: u32, entry: CacheEntry) {
        let generation = memory.look_up(key(number), false).generation.unwrap();
        memory.insert(key(number), generation, entry);
    }

    #[test]
    fn entries_and_bytes_are_limited() {
        let memory = MemoryCache::new(10, TTL);
        for number in 0..30 {
            insert(&memory, number, answer(100));
        }
        let stats = memory.stats();
        assert_eq!((stats.entries, stats.evictions), (Some(10), 20));
        assert!(memory.look_up(key(29), true).entry.is_some(), "the newest is there");
        assert!(memory.look_up(key(0), true).entry.is_none());
        let memory = MemoryCache::new(1_000, TTL);
        for number in 0..200 {
            insert(&memory, number, answer(1_000_000));
        }
        let bytes = memory.stats().bytes.unwrap();
        assert!((MAX_BYTES / 2..=MAX_BYTES).contains(&bytes), "{bytes}");
    }

    #[test]
    fn an_answer_that_was_looked_up_before_a_clearing_is_not_inserted_after_it() {
        let memory = MemoryCache::new(10, TTL);
        insert(&memory, 1, answer(1));
        let before = memory.look_up(key(2), true).generation.unwrap();
        assert_eq!(memory.clear(), 1);
        memory.insert(key(2), before, answer(1));
        assert!(memory.look_up(key(1), true).entry.is_none());
        assert!(memory.look_up(key(2), true).entry.is_none());
        insert(&memory, 2, answer(1));
        assert!(memory.look_up(key(2), true).entry.is_some());
        let stats = memory.stats();
        assert_eq!(stats.entries, Some(1));
        assert_eq!(stats.bytes, Some(size(&answer(1)).into()));
    }
}
