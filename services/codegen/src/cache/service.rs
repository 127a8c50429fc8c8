//! The RPCs of the caches: to see how full they are, and to empty them.

use std::sync::atomic::Ordering;
use std::time::Duration;

use hapa_core::principal_cache::PrincipalCacheHandle;
use hapa_core::rpc_error::{ErrorCode, RpcError};
use hapa_core::violations::Violations;
use hapa_proto::codegen::v1::cache_service_server::CacheService;
use hapa_proto::codegen::v1::clear_cache_response::Cleared;
use hapa_proto::codegen::v1::{
    CacheStats, ClearCacheRequest, ClearCacheResponse, GetCacheStatsRequest, GetCacheStatsResponse,
};
use tonic::{Request, Response, Status};

use super::store::{Held, Store};
use super::{Cache, NAME};

const PROFILES: &str = "user_profiles";
const ALL: &str = "all";

pub(crate) struct Caches {
    pub(crate) cache: Cache,
    /// Who called lately, with their profiles.
    pub(crate) principals: PrincipalCacheHandle,
}

#[tonic::async_trait]
impl CacheService for Caches {
    async fn clear_cache(
        &self,
        request: Request<ClearCacheRequest>,
    ) -> Result<Response<ClearCacheResponse>, Status> {
        let ClearCacheRequest { cache_type, confirm } = request.into_inner();
        check(&cache_type, confirm)?;
        let is_wanted = |name| cache_type == ALL || cache_type == name;
        // First what can't fail.
        let profiles = if is_wanted(PROFILES) { Some(self.forget_callers().await) } else { None };
        let answers = if is_wanted(NAME) { Some(self.clear_answers().await?) } else { None };
        let cleared = answers.into_iter().chain(profiles).collect();
        Ok(Response::new(ClearCacheResponse { cleared }))
    }

    async fn get_cache_stats(
        &self,
        _: Request<GetCacheStatsRequest>,
    ) -> Result<Response<GetCacheStatsResponse>, Status> {
        let caches = vec![self.answers().await, self.profiles().await];
        Ok(Response::new(GetCacheStatsResponse { caches }))
    }
}

fn check(cache_type: &str, confirm: bool) -> Result<(), Violations> {
    let mut found = Violations::default();
    match cache_type {
        "" => found.add_missing("cache_type"),
        NAME | PROFILES | ALL => {}
        _ => found.add_invalid("cache_type", "must be code_generation, user_profiles or all"),
    }
    if !confirm {
        found.add_invalid("confirm", "must be true: what is cleared has to be made anew");
    }
    found.check()
}

impl Caches {
    async fn clear_answers(&self) -> Result<Cleared, RpcError> {
        let store = &self.cache.0.store;
        let entries = store.clear().await.map_err(|_| {
            let words = "the cache in Redis could not be cleared, as it does not answer; try again";
            RpcError::new(ErrorCode::DatabaseError, words)
        })?;
        tracing::info!(entries, "the cache of answers was cleared");
        let scope = if matches!(**store, Store::Redis(_)) { "mesh" } else { "replica" };
        Ok(Cleared {
            cache_type: NAME.to_owned(),
            entries: small(entries),
            scope: scope.to_owned(),
        })
    }

    async fn forget_callers(&self) -> Cleared {
        let entries = self.principals.clear().await;
        tracing::info!(entries, "what was known of callers was cleared");
        Cleared {
            cache_type: PROFILES.to_owned(),
            entries: small(entries),
            scope: "replica".to_owned(),
        }
    }

    async fn answers(&self) -> CacheStats {
        let inner = &self.cache.0;
        let Held { entries, bytes, evictions } = inner.store.held().await;
        let (hits, misses) =
            (inner.hits.load(Ordering::Relaxed), inner.misses.load(Ordering::Relaxed));
        CacheStats {
            cache_type: NAME.to_owned(),
            backend: inner.store.word().to_owned(),
            entries: entries.map(small),
            bytes: bytes.map(number),
            evictions: number(evictions),
            ttl_seconds: seconds(inner.config.cache_ttl),
            capacity: inner.config.max_cache_size,
            ..helped(hits, misses)
        }
    }

    async fn profiles(&self) -> CacheStats {
        let known = self.principals.stats().await;
        CacheStats {
            cache_type: PROFILES.to_owned(),
            backend: "memory".to_owned(),
            entries: Some(small(known.entries)),
            ttl_seconds: seconds(known.ttl),
            capacity: small(known.capacity),
            ..helped(known.hits, known.misses)
        }
    }
}

fn helped(hits: u64, misses: u64) -> CacheStats {
    let (hits, misses) = (number(hits), number(misses));
    let asked = hits + misses;
    let hit_rate = if asked > 0.0 { hits / asked } else { 0.0 };
    CacheStats { hits, misses, hit_rate, ..CacheStats::default() }
}

fn seconds(span: Duration) -> u32 {
    u32::try_from(span.as_secs()).unwrap_or(u32::MAX)
}

fn small(number: u64) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

#[expect(clippy::cast_precision_loss, reason = "exact up to 2^53, beyond which nobody counts")]
fn number(count: u64) -> f64 {
    count as f64
}
