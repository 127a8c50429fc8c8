//! One attempt, from its request to its first token. An engine that refuses a field which it does not support
//! is asked again at once without it.

use std::future::poll_fn;
use std::sync::Arc;

use bytes::Bytes;
use hapa_core::circuit_breaker::Outcome;
use reqwest::StatusCode;

use super::dispatch::{EngineRequest, StartedStream};
use super::endpoint::Attempt;
use crate::upstream::engine::{
    EngineDelta, EngineError, ReadOutcome, RefusalReason, ResponseStream,
};

/// What has arrived up to the first token, and the error that followed in the same read.
struct FirstRead {
    stream: ResponseStream,
    delta: EngineDelta,
    error: Option<EngineError>,
}

/// Sends a request, and waits for its first token. Reports the outcome to the breaker.
pub(super) async fn await_first_token(
    request: &EngineRequest,
    mut attempt: Attempt,
) -> Result<StartedStream, EngineError> {
    let endpoint = Arc::clone(&attempt.endpoint);
    let mut adaptation = endpoint.engine.learned().adaptation(request.operation, &request.model);
    loop {
        let body = adaptation.apply(&request.body);
        let error = match read_first_token(request, body, &mut attempt).await {
            Ok(FirstRead { stream, delta, error }) => {
                let left_out = adaptation.left_out_of_caller(&request.body);
                endpoint.record_learned(&request.model, &adaptation.keep());
                endpoint.problems.record_answer();
                attempt.finish(Outcome::Success);
                let requested_model = request.model.clone();
                return Ok(StartedStream {
                    stream,
                    delta,
                    error,
                    left_out,
                    attempt,
                    requested_model,
                });
            }
            Err(error) => error,
        };
        attempt.record_failure(&error);
        // Nothing was generated, so this neither is a failure nor uses the retry budget.
        if !adaptation.learn_from(&error, &request.body) {
            endpoint.problems.record_refusal(&endpoint.name, &error);
            attempt.finish(outcome(&error));
            return Err(error);
        }
    }
}

async fn read_first_token(
    request: &EngineRequest,
    body: Bytes,
    attempt: &mut Attempt,
) -> Result<FirstRead, EngineError> {
    let headers = attempt.start_span(&request.span, request.operation);
    let mut stream = attempt.endpoint.engine.send(request.operation, headers, body).await?;
    attempt.record_response();
    request.answered.cancel();
    let (mut delta, mut error) = (EngineDelta::default(), None);
    while error.is_none() && !delta.has_begun() && !delta.is_done {
        error = match poll_fn(|cx| stream.poll_read(&mut delta, cx)).await {
            Ok(ReadOutcome::Data) => None,
            Ok(ReadOutcome::End) => Some(EngineError::Truncated),
            Err(error) => Some(error),
        };
    }
    match error.take_if(|_| !delta.has_begun()) {
        Some(error) => Err(error),
        None => Ok(FirstRead { stream, delta, error }),
    }
}

/// What an error before the first token means for the circuit breaker. A reply that cannot be read is a
/// failure, because callers get no answers; a rejection of one request is not.
fn outcome(error: &EngineError) -> Outcome {
    let Some((status, refusal)) = error.rejection() else { return Outcome::Failure };
    match refusal {
        RefusalReason::PathMissing => return Outcome::Neutral,
        RefusalReason::ContentFiltered => return Outcome::Success,
        // Another engine is preferred until the operator has paid.
        RefusalReason::Unpaid => return Outcome::Failure,
        _ => {}
    }
    match status {
        StatusCode::REQUEST_TIMEOUT
        | StatusCode::TOO_EARLY
        | StatusCode::TOO_MANY_REQUESTS
        | StatusCode::SERVICE_UNAVAILABLE => Outcome::Neutral,
        status if status.is_client_error() => Outcome::Success,
        _ => Outcome::Failure,
    }
}
