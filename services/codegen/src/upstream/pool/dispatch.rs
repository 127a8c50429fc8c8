//! The retry loop: sends a request to an endpoint, and to another one while attempts fail before
//! their first token.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hapa_core::call_stats::CallStats;
use reqwest::StatusCode;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::Span;

use super::EnginePool;
use super::endpoint::{Attempt, Endpoint};
use super::first_token::await_first_token;
use super::snapshot::{EndpointQuery, NoEndpoint};
use crate::upstream::engine::{EngineDelta, EngineError, Operation, RefusalReason, ResponseStream};

/// Maximum number of endpoints that one call tries.
const MAX_ATTEMPTS: usize = 3;
/// Minimum `retry-after` of a call that finds all circuits open.
const MIN_CIRCUIT_RETRY_DELAY: Duration = Duration::from_millis(100);

/// A request that any engine can answer.
pub(crate) struct EngineRequest {
    pub(crate) operation: Operation,
    pub(crate) body: Bytes,
    pub(crate) model: String,
    /// Requests with the same value prefer the same endpoint.
    pub(crate) affinity: Option<u64>,
    /// Receives the failures that a retry recovered from.
    pub(crate) report: CallStats,
    /// Cancelled when an engine has answered: from then on the prompt counts as read.
    pub(crate) answered: CancellationToken,
    /// Parent of the span of each attempt.
    pub(crate) span: Span,
}

/// A response stream whose first token has arrived.
pub(crate) struct StartedStream {
    pub(crate) stream: ResponseStream,
    /// What has arrived so far.
    pub(crate) delta: EngineDelta,
    /// Set if the stream failed in the same read as its first token.
    pub(crate) error: Option<EngineError>,
    /// The fields of callers that the engine does not support, so that its default applies.
    pub(crate) left_out: Vec<&'static str>,
    pub(super) attempt: Attempt,
    pub(super) requested_model: String,
}

impl StartedStream {
    /// The endpoint that answers: `host:port`.
    pub(crate) fn endpoint_name(&self) -> &str {
        self.attempt.endpoint_name()
    }

    /// Whether this is the requested model or one that the endpoint lists. Engines may put any
    /// model name into a response.
    pub(crate) fn is_served_model(&self, name: &str) -> bool {
        name == self.requested_model || self.attempt.endpoint.lists_model(name)
    }
}

/// Why no response has started.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DispatchError {
    #[error("no engine serves a model at the moment; try again")]
    NoModel,
    /// The circuit breaker of every suitable endpoint is open, for at least this long.
    #[error(
        "all engines for this model are failing (circuit open); try again after the indicated delay"
    )]
    CircuitOpen(Duration),
    /// The error of the last attempt.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

impl DispatchError {
    /// Value of the `error.type` span attribute, from a fixed list.
    pub(crate) fn kind(&self) -> String {
        match self {
            DispatchError::NoModel => "no_engine".to_owned(),
            DispatchError::CircuitOpen(_) => "circuit_open".to_owned(),
            DispatchError::Engine(error) => error.kind(),
        }
    }
}

/// What follows a failed attempt.
enum RetryDecision {
    Retry(Attempt),
    /// No retry; with a metric label if a retry could have helped.
    GiveUp(Option<&'static str>),
}

impl EnginePool {
    /// Tries endpoints until a first token arrives or no retry is allowed. Cancel-safe.
    pub(crate) async fn start_stream(
        &self,
        request: EngineRequest,
    ) -> Result<StartedStream, DispatchError> {
        self.ready_snapshot().await;
        self.0.retry_budget.deposit();
        let (mut tried, mut failed) = (Vec::new(), Vec::new());
        let mut attempt = self.pick(&request, &tried).map_err(|none| no_endpoint_error(&none))?;
        loop {
            tried.push(attempt.endpoint.id);
            let (error, decision) = match self.run_attempt(&request, attempt, &tried).await {
                Ok(started) => {
                    record_recovered(&request.report, failed);
                    return Ok(started);
                }
                Err(failure) => failure,
            };
            match decision {
                RetryDecision::Retry(next) => {
                    failed.push(error);
                    attempt = next;
                }
                RetryDecision::GiveUp(reason) => {
                    count_retries(reason.unwrap_or_default(), usize::from(reason.is_some()));
                    count_retries("failed", failed.len());
                    return Err(error.into());
                }
            }
        }
    }

    /// Runs one attempt up to its first token; if that fails, decides about the retry.
    async fn run_attempt(
        &self,
        request: &EngineRequest,
        attempt: Attempt,
        tried: &[u64],
    ) -> Result<StartedStream, (EngineError, RetryDecision)> {
        let (endpoint, deadline) = (Arc::clone(&attempt.endpoint), attempt.deadline);
        let mut first = std::pin::pin!(await_first_token(request, attempt));
        let error = tokio::select! {
            biased;
            started = &mut first => match started {
                Ok(started) => return Ok(started),
                Err(error) => error,
            },
            () = sleep_until(deadline) => match self.decide_retry(request, tried) {
                // Dropping the attempt cancels the work of its engine.
                RetryDecision::Retry(next) => {
                    return Err((EngineError::Timeout, RetryDecision::Retry(next)));
                }
                // No other endpoint is allowed, so this one may take as long as the caller waits.
                RetryDecision::GiveUp(_) => match first.await {
                    Ok(started) => return Ok(started),
                    Err(error) => error,
                },
            },
        };
        if matches!(&error, EngineError::Unreachable(how) if how.is_connect()) {
            endpoint.mark_unreachable(&error);
        }
        if error.has_reason(RefusalReason::PathMissing) {
            let now = Instant::now();
            endpoint.problems.mark_operation_missing(request.operation, &request.model, now);
        }
        let is_served_elsewhere = error.has_reason(RefusalReason::ModelMissing)
            && self.remove_model(&endpoint, &request.model);
        let decision = if is_retryable(&error) || is_served_elsewhere {
            self.decide_retry(request, tried)
        } else {
            RetryDecision::GiveUp(None)
        };
        Err((error, decision))
    }

    /// Removes a model that an engine reports as missing. Returns whether another endpoint serves it.
    fn remove_model(&self, endpoint: &Endpoint, model: &str) -> bool {
        if self.snapshot().serves(model) {
            endpoint.remove_model(model);
            self.rebuild();
        }
        self.snapshot().serves(model)
    }

    fn decide_retry(&self, request: &EngineRequest, tried: &[u64]) -> RetryDecision {
        if tried.len() >= MAX_ATTEMPTS {
            return RetryDecision::GiveUp(Some("exhausted"));
        }
        // Picked before the withdrawal, so that only a possible retry costs budget.
        let Ok(next) = self.pick(request, tried) else {
            return RetryDecision::GiveUp(Some("exhausted"));
        };
        if self.0.retry_budget.try_withdraw(Instant::now()) {
            RetryDecision::Retry(next)
        } else {
            RetryDecision::GiveUp(Some("budget"))
        }
    }

    pub(super) fn pick(
        &self,
        request: &EngineRequest,
        tried: &[u64],
    ) -> Result<Attempt, NoEndpoint> {
        let (snapshot, now) = (self.snapshot(), Instant::now());
        let mut tried = tried.to_vec();
        loop {
            let query = EndpointQuery {
                model: &request.model,
                operation: request.operation,
                affinity: request.affinity,
                tried: &tried,
            };
            let endpoint = snapshot.pick(&query, now, &mut rand::random)?;
            match endpoint.start_attempt(now, self.0.timeouts.attempt) {
                Ok(attempt) => return Ok(attempt),
                // Another call took the breaker's trial meanwhile. Each endpoint is skipped once.
                Err(_) => tried.push(endpoint.id),
            }
        }
    }
}

/// Whether another engine may succeed.
fn is_retryable(error: &EngineError) -> bool {
    let Some((status, refusal)) = error.rejection() else { return true };
    match refusal {
        // Another engine may accept the credential of this server, or another chat template is there.
        RefusalReason::PathMissing
        | RefusalReason::SystemRoleRefused
        | RefusalReason::CredentialRejected
        | RefusalReason::Unpaid => true,
        // Without a caller's field the engine refuses something that this server adds.
        RefusalReason::FieldRefused { field, .. } => field.caller_field().is_none(),
        RefusalReason::ContextTooLong
        | RefusalReason::ModelMissing
        | RefusalReason::ContentFiltered => false,
        RefusalReason::Other => {
            let retryable =
                [StatusCode::REQUEST_TIMEOUT, StatusCode::TOO_EARLY, StatusCode::TOO_MANY_REQUESTS];
            retryable.contains(&status) || !status.is_client_error()
        }
    }
}

fn no_endpoint_error(none: &NoEndpoint) -> DispatchError {
    match *none {
        NoEndpoint::NoneLeft => DispatchError::NoModel,
        NoEndpoint::CircuitOpen(until) => {
            let wait = until.saturating_duration_since(Instant::now());
            DispatchError::CircuitOpen(wait.max(MIN_CIRCUIT_RETRY_DELAY))
        }
    }
}

/// Records failures that no caller saw, because a retry succeeded.
fn record_recovered(report: &CallStats, failed: Vec<EngineError>) {
    count_retries("recovered", failed.len());
    for error in failed {
        report.record_recovered_error(
            &crate::error::Error::from(DispatchError::from(error)).into_rpc_error(false, ""),
        );
    }
}

fn count_retries(outcome: &'static str, count: usize) {
    if count > 0 {
        metrics::counter!("hapa_engine_retries_total", "outcome" => outcome)
            .increment(count as u64);
    }
}
