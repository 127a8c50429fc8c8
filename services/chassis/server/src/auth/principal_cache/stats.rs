//! Counters of the principal cache.

use std::sync::atomic::{AtomicU64, Ordering};

use metrics::Counter;

/// The metric label of the cache: a principal contains the user's profile.
const CACHE_LABEL: &str = "user_profiles";

/// Hits and misses, for metrics and for reports.
#[derive(Debug)]
pub(super) struct CacheCounters {
    hits: AtomicU64,
    misses: AtomicU64,
    hits_total: Counter,
    misses_total: Counter,
}

impl CacheCounters {
    pub(super) fn new() -> Self {
        CacheCounters {
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
            // Kept, because every call increments one of them.
            hits_total: metrics::counter!("hapa_cache_hits_total", "cache" => CACHE_LABEL),
            misses_total: metrics::counter!("hapa_cache_misses_total", "cache" => CACHE_LABEL),
        }
    }

    pub(super) fn hit(&self) {
        self.hits.fetch_add(1, Ordering::Relaxed);
        self.hits_total.increment(1);
    }

    pub(super) fn miss(&self) {
        self.misses.fetch_add(1, Ordering::Relaxed);
        self.misses_total.increment(1);
    }

    /// Hits and misses since the start.
    pub(super) fn totals(&self) -> (u64, u64) {
        (self.hits.load(Ordering::Relaxed), self.misses.load(Ordering::Relaxed))
    }
}
