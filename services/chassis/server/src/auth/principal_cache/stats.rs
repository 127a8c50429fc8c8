//! How much is known of callers, and how often that helped; and to forget it.

use std::sync::atomic::{AtomicU64, Ordering};

use hapa_core::principal_cache::PrincipalCacheStats;
use metrics::Counter;

use super::{Callers, MOST_REMEMBERED, REMEMBERED};

/// Its name in metrics: what is known of a caller holds the profile.
const CACHE: &str = "user_profiles";

/// How often who calls was known, and how often auth was asked.
#[derive(Debug)]
pub(super) struct Counts {
    hits: AtomicU64,
    misses: AtomicU64,
    hits_total: Counter,
    misses_total: Counter,
}

impl Counts {
    pub(super) fn new() -> Self {
        Counts {
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
            // Looked up once: admission is on the way of every call.
            hits_total: metrics::counter!("hapa_cache_hits_total", "cache" => CACHE),
            misses_total: metrics::counter!("hapa_cache_misses_total", "cache" => CACHE),
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
}

impl Callers {
    /// How much is known, and how often that helped.
    pub async fn stats(&self) -> PrincipalCacheStats {
        self.known.run_pending_tasks().await;
        PrincipalCacheStats {
            entries: self.known.entry_count(),
            hits: self.counts.hits.load(Ordering::Relaxed),
            misses: self.counts.misses.load(Ordering::Relaxed),
            capacity: MOST_REMEMBERED,
            ttl: REMEMBERED,
        }
    }

    /// Asks auth anew about everyone; calls in progress go on. Returns how many were known.
    pub async fn forget(&self) -> u64 {
        self.known.run_pending_tasks().await;
        let entries = self.known.entry_count();
        self.known.invalidate_all();
        entries
    }
}
