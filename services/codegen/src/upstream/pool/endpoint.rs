//! One engine: the result of its last health probe, our requests in flight, and its circuit breaker.
//!
//! Probes run in the background and requests read their results, so no request waits for a probe. A
//! request holds an [`Attempt`], which releases everything when it is dropped.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hapa_core::circuit_breaker::{
    BreakerState, CallPermit, CircuitBreaker, CircuitBreakerConfig, FailureRate, Outcome,
};
use hapa_proto::codegen::v1::EngineFindings;
use hapa_telemetry::trace::SpanHandle;
use metrics::Gauge;
use reqwest::header::HeaderMap;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::Span;

use super::balancer::{Candidate, stable_hash};
use super::engine_problems::EngineProblems;
use super::scrape::{EngineLoad, StallDetector};
use crate::upstream::engine::{Engine, EngineError, ListedModel, Operation};

/// Five consecutive failures open the breaker, and so does a failure rate of one half. The longest open period lets a
/// recovered engine be used again within 5 s.
const BREAKER: CircuitBreakerConfig = CircuitBreakerConfig {
    consecutive_failures: 5,
    failure_rate: Some(FailureRate { window: 20, threshold: 10 }),
    min_open_period: Duration::from_secs(1),
    max_open_period: Duration::from_secs(4),
    jitter: 0.0,
    trial_timeout: Duration::from_secs(4),
};

#[derive(Debug, Default)]
struct ProbeResult {
    models: Vec<ListedModel>,
    adapters: Vec<String>,
    stall_detector: StallDetector,
    problem: Option<String>,
}

pub(super) struct Endpoint {
    /// Metric label: `host:port`, or a common label if there are too many endpoints.
    label: Arc<str>,
    pub(super) name: String,
    pub(super) id: u64,
    pub(super) engine: Engine,
    /// Cancelled when the endpoint leaves the pool. Requests in flight continue.
    pub(super) removed: CancellationToken,
    probe_result: Mutex<ProbeResult>,
    breaker: Mutex<CircuitBreaker>,
    is_up: AtomicBool,
    was_probed: AtomicBool,
    in_flight: AtomicU32,
    awaiting_first_token: AtomicU32,
    /// Numbers at the last probe. The cache usage is in thousandths.
    waiting: AtomicU32,
    running: AtomicU32,
    in_flight_at_probe: AtomicU32,
    cache_permille: AtomicU64,
    pub(super) problems: EngineProblems,
    gauges: EndpointGauges,
}

struct EndpointGauges {
    in_flight: Gauge,
    breaker: Gauge,
    up: Gauge,
}

/// The models of an endpoint, and the adapters in its memory, at its last probe.
pub(super) struct ServedModels {
    pub(super) models: Vec<ListedModel>,
    pub(super) adapters: Vec<String>,
}

impl Endpoint {
    pub(super) fn new(name: String, label: Arc<str>, engine: Engine) -> Self {
        let gauge = |gauge: fn(Arc<str>) -> Gauge| gauge(Arc::clone(&label));
        let gauges = EndpointGauges {
            in_flight: gauge(|l| metrics::gauge!("hapa_engine_requests_in_flight", "engine" => l)),
            breaker: gauge(|l| metrics::gauge!("hapa_engine_breaker_state", "engine" => l)),
            up: gauge(|l| metrics::gauge!("hapa_engine_up", "engine" => l)),
        };
        gauges.in_flight.increment(0.0);
        gauges.breaker.set(0.0);
        gauges.up.set(0.0);
        Endpoint {
            id: stable_hash(0, name.as_bytes()),
            label,
            name,
            engine,
            removed: CancellationToken::new(),
            probe_result: Mutex::default(),
            breaker: Mutex::new(CircuitBreaker::new(BREAKER)),
            // Assumed until a probe fails.
            is_up: AtomicBool::new(true),
            was_probed: AtomicBool::new(false),
            in_flight: AtomicU32::new(0),
            awaiting_first_token: AtomicU32::new(0),
            waiting: AtomicU32::new(0),
            running: AtomicU32::new(0),
            in_flight_at_probe: AtomicU32::new(0),
            cache_permille: AtomicU64::new(0),
            problems: EngineProblems::default(),
            gauges,
        }
    }

    /// The last probe succeeded and showed no stall.
    pub(super) fn is_up(&self) -> bool {
        self.is_up.load(Ordering::Relaxed)
    }

    /// Probed, up, and its circuit breaker is not open.
    pub(super) fn is_healthy(&self) -> bool {
        self.is_up() && self.was_probed() && lock(&self.breaker).state() != BreakerState::Open
    }

    pub(super) fn was_probed(&self) -> bool {
        self.was_probed.load(Ordering::Acquire)
    }

    /// Probes the engine. Returns whether its models or adapters have changed.
    pub(super) async fn probe(&self, stall_timeout: Duration) -> bool {
        let in_flight_at_probe = self.in_flight.load(Ordering::Relaxed);
        let (models, page) =
            futures_util::future::join(self.engine.models(), self.engine.metrics()).await;
        let load = page.map(|page| EngineLoad::parse(&page)).unwrap_or_default();
        // A list that needs no credential does not show that the credential is right.
        if let Err(error) = &models {
            self.problems.record_refusal(&self.name, error);
        }
        let awaiting_first_token = self.awaiting_first_token.load(Ordering::Relaxed);
        let mut result = lock(&self.probe_result);
        let is_stalled = result.stall_detector.observe(
            &load,
            awaiting_first_token,
            stall_timeout,
            Instant::now(),
        );
        let mut changed = !self.was_probed.swap(true, Ordering::AcqRel);
        result.problem = match models {
            Ok(models) => {
                changed |= !same_models(&result.models, &models);
                result.models = models;
                is_stalled.then(|| "the engine runs requests but generates no tokens".to_owned())
            }
            // The models are kept: the engine may be back before the next probe.
            Err(error) => Some(error.to_string()),
        };
        self.store_load(&load, in_flight_at_probe);
        changed |= result.adapters != load.adapters;
        result.adapters = load.adapters;
        let is_up = result.problem.is_none();
        drop(result);
        self.set_is_up(is_up);
        changed
    }

    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "not negative; such a cast saturates"
    )]
    fn store_load(&self, load: &EngineLoad, in_flight_at_probe: u32) {
        self.waiting.store(load.waiting as u32, Ordering::Relaxed);
        self.running.store(load.running as u32, Ordering::Relaxed);
        self.cache_permille.store((load.cache_usage * 1_000.0) as u64, Ordering::Relaxed);
        self.in_flight_at_probe.store(in_flight_at_probe, Ordering::Relaxed);
    }

    fn set_is_up(&self, is_up: bool) {
        let was_up = self.is_up.swap(is_up, Ordering::Relaxed);
        if is_up && !was_up {
            lock(&self.breaker).allow_trial();
        }
        self.update_gauges();
    }

    /// Records a failed connection, without waiting for the next probe.
    pub(super) fn mark_unreachable(&self, error: &EngineError) {
        lock(&self.probe_result).problem = Some(error.to_string());
        self.set_is_up(false);
    }

    /// Logs the fields that requests for this model no longer contain.
    pub(super) fn record_learned(&self, model: &str, new: &[&'static str]) {
        if !new.is_empty() {
            tracing::warn!(
                engine = self.name,
                model,
                fields = new.join(", "),
                all = self.learned().join(", "),
                "the engine does not support these request fields; they are left out from now on"
            );
        }
    }

    /// Names of the request fields that the engine does not support, for any model.
    pub(super) fn learned(&self) -> Vec<&'static str> {
        self.engine.learned().names()
    }

    /// What operators should know of the engine; `None` if nothing was learned.
    pub(super) fn findings(&self) -> Option<EngineFindings> {
        let base_url = self.engine.found_base_url().unwrap_or_default();
        let unsupported_fields: Vec<_> = self.learned().into_iter().map(str::to_owned).collect();
        let is_empty = base_url.is_empty() && unsupported_fields.is_empty();
        let name = self.name.clone();
        (!is_empty).then_some(EngineFindings { name, base_url, unsupported_fields })
    }

    /// Removes a model that the engine reports as missing.
    pub(super) fn remove_model(&self, model: &str) {
        lock(&self.probe_result).models.retain(|listed| listed.id != model);
    }

    pub(super) fn served_models(&self) -> ServedModels {
        let result = lock(&self.probe_result);
        ServedModels { models: result.models.clone(), adapters: result.adapters.clone() }
    }

    /// Whether the last probe listed the model.
    pub(super) fn lists_model(&self, model: &str) -> bool {
        lock(&self.probe_result).models.iter().any(|listed| listed.id == model)
    }

    /// Why the endpoint is not up, as a text that may be shown to clients.
    pub(super) fn problem(&self) -> Option<String> {
        lock(&self.probe_result).problem.clone()
    }

    #[expect(clippy::cast_precision_loss, reason = "thousandths of a whole")]
    pub(super) fn candidate(&self, is_resident: bool) -> Candidate {
        Candidate {
            id: self.id,
            waiting: self.waiting.load(Ordering::Relaxed),
            running: self.running.load(Ordering::Relaxed),
            in_flight: self.in_flight.load(Ordering::Relaxed),
            in_flight_at_probe: self.in_flight_at_probe.load(Ordering::Relaxed),
            cache_usage: self.cache_permille.load(Ordering::Relaxed) as f32 / 1_000.0,
            is_resident,
        }
    }

    /// Whether the breaker would admit an attempt; if not, when to try again.
    pub(super) fn admits(&self, now: Instant) -> Result<(), Instant> {
        lock(&self.breaker).check(now)
    }

    /// Starts an attempt. Without a first token within `timeout`, it counts as failed.
    pub(super) fn start_attempt(
        self: &Arc<Self>,
        now: Instant,
        timeout: Duration,
    ) -> Result<Attempt, Instant> {
        let permit = lock(&self.breaker).acquire(now)?;
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        self.awaiting_first_token.fetch_add(1, Ordering::Relaxed);
        self.gauges.in_flight.increment(1.0);
        self.update_gauges();
        let deadline = now + timeout;
        Ok(Attempt {
            endpoint: Arc::clone(self),
            permit: Some(permit),
            deadline,
            span: SpanHandle::default(),
        })
    }

    /// Marks the endpoint as removed from the pool.
    pub(super) fn retire(&self) {
        self.removed.cancel();
        self.update_gauges();
    }

    fn update_gauges(&self) {
        let is_active = !self.removed.is_cancelled();
        self.gauges.up.set(f64::from(u8::from(is_active && self.is_up())));
        let state = lock(&self.breaker).state();
        let state = if is_active { state } else { BreakerState::Closed };
        self.gauges.breaker.set(f64::from(state as u8));
    }
}

fn same_models(before: &[ListedModel], now: &[ListedModel]) -> bool {
    let key =
        |listed: &ListedModel| (listed.id.clone(), listed.parent.clone(), listed.max_model_len);
    before.iter().map(key).eq(now.iter().map(key))
}

/// One request to an endpoint, until its response has ended.
pub(crate) struct Attempt {
    pub(super) endpoint: Arc<Endpoint>,
    /// Held until the outcome is known.
    permit: Option<CallPermit>,
    pub(super) deadline: Instant,
    /// Set by `start_span`.
    span: SpanHandle,
}

impl Attempt {
    /// Starts the span of the request. Returns the headers that propagate the trace.
    pub(super) fn start_span(&mut self, parent: &Span, operation: Operation) -> HeaderMap {
        self.span = SpanHandle::client_under(parent, || format!("POST {}", operation.path()));
        self.span.set("http.request.method", "POST");
        self.span.set_server(&self.endpoint.name);
        let mut headers = HeaderMap::new();
        self.span.inject(&mut headers);
        headers
    }

    /// Records that the engine answered with a stream.
    pub(super) fn record_response(&self) {
        self.span.set("http.response.status_code", 200);
    }

    /// Records a failure before the first token.
    pub(super) fn record_failure(&self, error: &EngineError) {
        if let EngineError::Refused { status, .. } = error {
            self.span.set("http.response.status_code", i64::from(status.as_u16()));
        }
        self.span.fail(error.kind(), "the engine failed before its first token");
    }

    /// `host:port` of the engine.
    pub(super) fn endpoint_name(&self) -> &str {
        &self.endpoint.name
    }

    /// Reports the outcome to the breaker. Only the first call has an effect.
    pub(super) fn finish(&mut self, outcome: Outcome) {
        let Some(permit) = self.permit.take() else { return };
        lock(&self.endpoint.breaker).record(permit, outcome, Instant::now());
        self.endpoint.awaiting_first_token.fetch_sub(1, Ordering::Relaxed);
        self.endpoint.update_gauges();
        let label = match outcome {
            Outcome::Success => "success",
            Outcome::Failure => "failure",
            Outcome::Neutral => "neutral",
        };
        let engine = Arc::clone(&self.endpoint.label);
        metrics::counter!("hapa_engine_attempts_total", "engine" => engine, "outcome" => label)
            .increment(1);
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        // Dropped without an outcome: it timed out, or the caller cancelled.
        let timed_out = Instant::now() >= self.deadline;
        if self.permit.is_some() && timed_out {
            self.record_failure(&EngineError::Timeout);
        }
        self.finish(if timed_out { Outcome::Failure } else { Outcome::Neutral });
        self.endpoint.in_flight.fetch_sub(1, Ordering::Relaxed);
        self.endpoint.gauges.in_flight.decrement(1.0);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
