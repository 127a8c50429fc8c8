//! A handle on the server's cache of authenticated principals, for services that report on caches and clear them.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;

/// The state of the cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrincipalCacheStats {
    /// Cached credentials, with the profiles of their users.
    pub entries: u64,
    /// Calls whose principal was cached.
    pub hits: u64,
    /// Calls whose principal was requested from the auth service.
    pub misses: u64,
    /// The maximum number of entries.
    pub capacity: u64,
    /// The maximum age of an entry.
    pub ttl: Duration,
}

type Operation<T> = Arc<dyn Fn() -> BoxFuture<'static, T> + Send + Sync>;

/// A handle on the cache. Clones share one cache.
#[derive(Clone)]
pub struct PrincipalCacheHandle {
    stats: Operation<PrincipalCacheStats>,
    clear: Operation<u64>,
}

impl PrincipalCacheHandle {
    /// A handle from the two operations of a cache.
    pub fn new(
        stats: impl Fn() -> BoxFuture<'static, PrincipalCacheStats> + Send + Sync + 'static,
        clear: impl Fn() -> BoxFuture<'static, u64> + Send + Sync + 'static,
    ) -> Self {
        PrincipalCacheHandle { stats: Arc::new(stats), clear: Arc::new(clear) }
    }

    /// The state of the cache.
    pub async fn stats(&self) -> PrincipalCacheStats {
        (self.stats)().await
    }

    /// Removes every entry, so that the next calls request their principals from the auth service. Calls in progress
    /// are not affected. Returns the number of removed entries.
    pub async fn clear(&self) -> u64 {
        (self.clear)().await
    }
}

impl fmt::Debug for PrincipalCacheHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PrincipalCacheHandle")
    }
}
