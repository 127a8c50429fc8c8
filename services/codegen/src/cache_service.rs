//! The RPCs of the caches: statistics, and clearing.

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

use crate::stream::cache::{CACHE_NAME, ResponseCache, StoreStats};

const PROFILES: &str = "user_profiles";
const ALL: &str = "all";

pub(crate) struct Caches {
    pub(crate) cache: ResponseCache,
    /// Recent callers, with their profiles.
    pub(crate) principals: PrincipalCacheHandle,
}

#[tonic::async_trait]
impl CacheService for Caches {
    async fn clear_cache(
        &self,
        request: Request<ClearCacheRequest>,
    ) -> Result<Response<ClearCacheResponse>, Status> {
        let ClearCacheRequest { cache_type, confirm } = request.into_inner();
        validate(&cache_type, confirm)?;
        let is_wanted = |name| cache_type == ALL || cache_type == name;
        // First the one that cannot fail.
        let profiles = if is_wanted(PROFILES) { Some(self.clear_principals().await) } else { None };
        let answers = if is_wanted(CACHE_NAME) { Some(self.clear_answers().await?) } else { None };
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

fn validate(cache_type: &str, confirm: bool) -> Result<(), Violations> {
    let mut violations = Violations::default();
    match cache_type {
        "" => violations.add_missing("cache_type"),
        CACHE_NAME | PROFILES | ALL => {}
        _ => violations.add_invalid("cache_type", "must be code_generation, user_profiles or all"),
    }
    if !confirm {
        violations.add_invalid(
            "confirm",
            "must be true, because cleared answers have to be generated again",
        );
    }
    violations.check()
}

impl Caches {
    async fn clear_answers(&self) -> Result<Cleared, RpcError> {
        let entries = self.cache.clear().await.map_err(|_| {
            let message = "the cache cannot be cleared, because Redis does not answer; try again";
            RpcError::new(ErrorCode::DatabaseError, message)
        })?;
        tracing::info!(entries, "response cache cleared");
        let scope = if self.cache.is_shared() { "mesh" } else { "replica" };
        Ok(Cleared {
            cache_type: CACHE_NAME.to_owned(),
            entries: saturate(entries),
            scope: scope.to_owned(),
        })
    }

    async fn clear_principals(&self) -> Cleared {
        let entries = self.principals.clear().await;
        tracing::info!(entries, "cache of callers cleared");
        Cleared {
            cache_type: PROFILES.to_owned(),
            entries: saturate(entries),
            scope: "replica".to_owned(),
        }
    }

    async fn answers(&self) -> CacheStats {
        let StoreStats { entries, bytes, evictions } = self.cache.stats().await;
        let (hits, misses) = self.cache.hits_and_misses();
        let config = self.cache.config();
        CacheStats {
            cache_type: CACHE_NAME.to_owned(),
            backend: self.cache.backend().to_owned(),
            entries: entries.map(saturate),
            bytes: bytes.map(number),
            evictions: number(evictions),
            ttl_seconds: seconds(config.cache_ttl),
            capacity: config.max_cache_size,
            ..hit_rate(hits, misses)
        }
    }

    async fn profiles(&self) -> CacheStats {
        let known = self.principals.stats().await;
        CacheStats {
            cache_type: PROFILES.to_owned(),
            backend: "memory".to_owned(),
            entries: Some(saturate(known.entries)),
            ttl_seconds: seconds(known.ttl),
            capacity: saturate(known.capacity),
            ..hit_rate(known.hits, known.misses)
        }
    }
}

fn hit_rate(hits: u64, misses: u64) -> CacheStats {
    let (hits, misses) = (number(hits), number(misses));
    let lookups = hits + misses;
    let hit_rate = if lookups > 0.0 { hits / lookups } else { 0.0 };
    CacheStats { hits, misses, hit_rate, ..CacheStats::default() }
}

fn seconds(span: Duration) -> u32 {
    u32::try_from(span.as_secs()).unwrap_or(u32::MAX)
}

fn saturate(number: u64) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

#[expect(clippy::cast_precision_loss, reason = "exact up to 2^53")]
fn number(count: u64) -> f64 {
    count as f64
}
