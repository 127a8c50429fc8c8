//! Chooses the source of a response: a cached answer, the answer in progress to an identical request, or a new generation.

use std::sync::Arc;

use hapa_core::call::Call;
use hapa_core::call_stats::CallStats;
use hapa_core::rpc_error::{ErrorCode, RpcError};
use hapa_store::redis::RedisUnavailable;
use tonic::Status;

use super::cache::{CacheKey, CacheWriter, ResponseCache};
use super::generation::{Engines, Generation, GenerationJob};
use super::in_flight::{InFlightKey, InFlightRequests};
use super::respond::{Response, SubscriberContext};
use super::shared::{SharedStream, Subscription};

const CACHE_UNAVAILABLE: &str = "the cache did not answer, so the model was called";

/// See the module.
pub(crate) struct Pipeline {
    pub(crate) engines: Engines,
    cache: ResponseCache,
    in_flight: InFlightRequests,
}

/// The requests that may share an answer.
pub(crate) struct Sharing {
    pub(crate) key: CacheKey,
    /// The key or session of the caller. Answers in progress are shared only within it.
    pub(crate) subject: Arc<str>,
    /// Whether neither a cached answer nor one in progress may be used.
    pub(crate) is_fresh: bool,
}

impl Pipeline {
    pub(crate) fn new(engines: Engines, cache: ResponseCache) -> Pipeline {
        Pipeline { engines, cache, in_flight: InFlightRequests::default() }
    }

    /// The response from the cache, or else from a generation. It has started when this returns.
    pub(crate) async fn respond_cached(
        &self,
        call: &Call,
        sharing: Sharing,
        mut context: SubscriberContext,
        job: GenerationJob,
    ) -> Result<Response, Status> {
        let Sharing { key, subject, is_fresh } = sharing;
        let found = self.cache.look_up(key, !is_fresh).await;
        if let Some(error) = found.error {
            warn_of_cache_error(error, &mut context);
        }
        if let Some(items) = found.items {
            self.cache.count(true, &context.stats);
            return Ok(Response::known(items, context));
        }
        let writer = found.generation.clone().map(|generation| self.cache.writer(key, generation));
        let is_shared = !is_fresh && !self.cache.is_off();
        let in_flight_key = is_shared.then_some((subject, found.generation, key));
        let generation = || Generation::new(job, call, self.engines.clone());
        let subscription = self.get_or_start(in_flight_key, &context.stats, writer, generation);
        let has_joined = subscription.has_joined;
        if is_shared && (has_joined || found.error.is_none()) {
            self.cache.count(has_joined, &context.stats);
        }
        Response::subscribed(subscription, context, has_joined).begin().await
    }

    /// The response from the answer in progress to an identical request, or else from a new generation. Nothing happens
    /// before it is polled; call `begin` first.
    pub(crate) fn subscribe(
        &self,
        call: &Call,
        sharing: Sharing,
        context: SubscriberContext,
        job: GenerationJob,
    ) -> Response {
        let key = (!sharing.is_fresh).then_some((sharing.subject, None, sharing.key));
        let generation = || Generation::new(job, call, self.engines.clone());
        let subscription = self.get_or_start(key, &context.stats, None, generation);
        Response::subscribed(subscription, context, false)
    }

    /// Subscribes to the answer in progress with this key, or else to a new one. Without a key, the new one is not shared.
    fn get_or_start(
        &self,
        key: Option<InFlightKey>,
        stats: &CallStats,
        writer: Option<CacheWriter>,
        generation: impl FnOnce() -> Generation,
    ) -> Subscription {
        let start = |entry| SharedStream::start(generation(), stats, writer, entry);
        let Some(key) = key else { return start(None) };
        let subscribe = |stream: &Arc<SharedStream>| stream.subscribe(stats);
        self.in_flight.get_or_start(key, subscribe, |entry| start(Some(entry)))
    }
}

/// Every response reports it. The errors service receives only failures of requests that were sent to Redis, so not
/// one for each call during an outage.
fn warn_of_cache_error(error: RedisUnavailable, context: &mut SubscriberContext) {
    context.warn(format!("{}: {CACHE_UNAVAILABLE}", ErrorCode::CacheError));
    if error.was_sent {
        let error = RpcError::new(ErrorCode::CacheError, CACHE_UNAVAILABLE);
        context.stats.record_recovered_error(&error);
    }
}
