//! Names every call and records how it ended: one log line, its metrics and its events. A published status replaces
//! the error of a library or a panic.
//!
//! A response body that is dropped before its trailers means that the client cancelled. The last frame of an answer
//! leaves after the outbox has written the events of the call.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt as _;
use hapa_core::access::{Access, Rpc};
use hapa_core::call::Call;
use hapa_core::call_stats::PublishedFailure;
use hapa_core::error_chain;
use hapa_core::rpc_error::{ErrorCode, RpcError, code_name, published_code, to_published_status};
use hapa_telemetry::panics;
use hapa_telemetry::trace::{SpanHandle, is_server_error};
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body::Frame;
use tonic::{Code, Status};
use tracing::{Instrument as _, Span};

use crate::client_address::client_address;
use crate::middleware::body::{BodyWrapper, CallBody, PolledFrame, WrappedBody, poll_body};
use crate::middleware::request_body::RequestAborted;
use crate::middleware::response::{refuse, trailers, write_status};
use crate::middleware::shared::SharedState;
use crate::outbox::{CompletedCall, DurabilityAck, Outbox};
use crate::server_span::{ServerSpan, start_server_span};
use crate::slow_reader::ReaderState;

const REQUEST_ID: &str = "x-request-id";
/// The metric label of methods that are not in the access table, because a client must not create label values.
const UNKNOWN_METHOD: &str = "unknown";

/// Runs a call and records it.
pub(crate) async fn record_call<Q, B: Default>(
    shared: &SharedState,
    mut request: Request<Q>,
    next: impl AsyncFnOnce(Request<WrappedBody<Q, RequestAborted>>) -> Response<B>,
) -> Response<WrappedBody<B, RecordedBody>> {
    let client_id = request.headers().get(REQUEST_ID).and_then(|value| value.to_str().ok());
    let rpc = shared.table.find(request.uri().path());
    let call = Call::new(client_id, rpc, client_address(&request, &shared.trusted_proxies));
    let mut recorder = CallRecorder::new(shared, call.clone(), &request);
    let (span, path) = (recorder.span.clone(), recorder.path);
    metrics::gauge!("hapa_requests_in_flight", "rpc" => path).increment(1.0);
    request.extensions_mut().insert(call.clone());
    let request = request.map(|body| recorder.request_aborted.watch(body));

    let run = AssertUnwindSafe(next(request)).catch_unwind().instrument(span.clone());
    let mut response =
        run.await.unwrap_or_else(|panic| span.in_scope(|| refuse(panic_fault(&*panic))));
    if let Ok(id) = HeaderValue::from_str(&call.request_id) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    if response.headers().contains_key("grpc-status") {
        if let Some(ack) = recorder.end(response.headers_mut()) {
            ack.await;
        }
        return response.map(WrappedBody::unwrapped);
    }
    response.map(|body| WrappedBody::new(body, RecordedBody { recorder, last: None }))
}

fn panic_fault(panic: &(dyn Any + Send)) -> RpcError {
    RpcError::internal(panics::describe(panic))
}

/// Records one call once, when it ends or when it is dropped.
struct CallRecorder {
    path: &'static str,
    call: Call,
    span: Span,
    trace_id: String,
    /// The same span, as a part of the trace.
    part: SpanHandle,
    outbox: Outbox,
    request_aborted: RequestAborted,
    reader: ReaderState,
    slow_call_threshold: Option<Duration>,
    /// The maximum delay between an engine's chunk and the frame that carries it.
    max_chunk_delay: Option<Duration>,
    is_ended: bool,
}

impl CallRecorder {
    fn new<Q>(shared: &SharedState, call: Call, request: &Request<Q>) -> CallRecorder {
        let path = call.rpc.map_or(UNKNOWN_METHOD, |rpc| rpc.path);
        let ServerSpan { span, part, trace_id } = start_server_span(request.headers(), &call, path);
        CallRecorder {
            path,
            call,
            span,
            trace_id,
            part,
            outbox: shared.outbox.clone(),
            request_aborted: RequestAborted::default(),
            reader: request.extensions().get::<ReaderState>().cloned().unwrap_or_default(),
            slow_call_threshold: shared.slow_call_threshold,
            max_chunk_delay: None,
            is_ended: false,
        }
    }

    /// Reads the status from headers or trailers, records the call, and writes the published status back. They may
    /// be sent when the returned acknowledgement completes.
    fn end(&mut self, headers: &mut HeaderMap) -> Option<DurabilityAck> {
        let status =
            Status::from_header_map(headers).unwrap_or_else(|| Status::unknown("no status"));
        if status.code() == Code::Ok {
            return self.close(Code::Ok, None, true);
        }
        let request_aborted = self.request_aborted.is_set();
        let status = self.span.in_scope(|| to_published_status(status, request_aborted));
        let (code, failure) = write_failure(status, headers);
        self.close(code, failure.as_ref(), true)
    }

    /// Records the call. `needs_ack`: something waits until its events are written.
    fn close(
        &mut self,
        code: Code,
        failure: Option<&PublishedFailure>,
        needs_ack: bool,
    ) -> Option<DurabilityAck> {
        if std::mem::replace(&mut self.is_ended, true) {
            return None;
        }
        let (path, elapsed) = (self.path, self.call.arrived.elapsed());
        if let Some(failure) = failure {
            self.span.record("incident_id", failure.incident_id.as_str());
        }
        self.record_outcome(code, failure, elapsed);
        self.record_latencies(elapsed);
        self.end_span(code, failure);
        let (call, trace_id) = (&self.call.with_recorded_caller(), self.trace_id.as_str());
        let completed = CompletedCall { call, path, trace_id, code, failure, elapsed };
        self.outbox.append_call(&completed, needs_ack)
    }

    /// Measures how long an engine's chunk waited until this frame.
    fn record_frame(&mut self) {
        if let Some(chunk_at) = self.call.stats().take_upstream_chunk_at() {
            self.max_chunk_delay = self.max_chunk_delay.max(Some(chunk_at.elapsed()));
        }
    }

    /// Records the mesh's own part of the duration, and logs a slow call with its phases.
    fn record_latencies(&self, elapsed: Duration) {
        let has_latency = |rpc: &&Rpc| rpc.access != Access::NoAuth && !rpc.is_watch();
        let Some(rpc) = self.call.rpc.filter(has_latency) else { return };
        let times = self.call.stats().timings();
        let overhead = elapsed.saturating_sub(times.queued + times.engine);
        metrics::histogram!("hapa_overhead_seconds", "rpc" => rpc.path).record(overhead);
        if let Some(delay) = self.max_chunk_delay {
            metrics::histogram!("hapa_inter_token_added_seconds", "rpc" => rpc.path).record(delay);
        }
        if self.slow_call_threshold.is_none_or(|threshold| elapsed <= threshold) {
            return;
        }
        let _entered = self.span.enter();
        tracing::warn!(
            duration_ms = millis(elapsed),
            queued_ms = millis(times.queued),
            engine_ms = millis(times.engine),
            first_token_ms = times.first_token.map(millis),
            first_answer_token_ms = times.first_answer_token.map(millis),
            overhead_ms = millis(overhead),
            "slow call"
        );
    }

    fn end_span(&mut self, code: Code, failure: Option<&PublishedFailure>) {
        // Taken, so that the span ends with the call and not with its body.
        let part = std::mem::take(&mut self.part);
        part.set("rpc.grpc.status_code", i64::from(code as i32));
        let Some(failure) = failure else { return };
        part.set("hapa.incident_id", failure.incident_id.clone());
        if is_server_error(code) {
            part.fail(failure.error_code.clone(), "the call failed");
        } else {
            part.set("error.type", failure.error_code.clone());
        }
    }

    fn record_outcome(&self, code: Code, failure: Option<&PublishedFailure>, elapsed: Duration) {
        let path = self.path;
        let code = code_name(code);
        metrics::gauge!("hapa_requests_in_flight", "rpc" => path).decrement(1.0);
        metrics::counter!("hapa_requests_total", "rpc" => path, "code" => code).increment(1);
        metrics::histogram!("hapa_request_duration_seconds", "rpc" => path).record(elapsed);
        let duration_ms = millis(elapsed);
        let first_answer_token_ms = self.call.stats().timings().first_answer_token.map(millis);
        let _entered = self.span.enter();
        let Some(PublishedFailure { error_code, incident_id, .. }) = failure else {
            if path.starts_with("/grpc.") {
                tracing::debug!(code, duration_ms, "call ended");
            } else {
                tracing::info!(code, duration_ms, first_answer_token_ms, "call ended");
            }
            return;
        };
        metrics::counter!("hapa_errors_total", "rpc" => path, "error_code" => error_code.clone())
            .increment(1);
        tracing::info!(
            code,
            duration_ms,
            first_answer_token_ms,
            error_code,
            incident_id,
            "call failed"
        );
    }
}

/// Writes a failed status into headers or trailers, without its causes, which stay in the process.
fn write_failure(mut status: Status, headers: &mut HeaderMap) -> (Code, Option<PublishedFailure>) {
    let causes = error_chain::take(status.metadata_mut());
    headers.remove(error_chain::CAUSES);
    write_status(&status, headers);
    let failure = published_code(&status).map(|(error_code, incident_id)| PublishedFailure {
        error_code,
        incident_id,
        message: status.message().to_owned(),
        causes,
    });
    (status.code(), failure)
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

impl Drop for CallRecorder {
    fn drop(&mut self) {
        if !self.is_ended {
            let (code, grpc, message) = if self.reader.timed_out() {
                let message = "the client stopped reading, so its stream was closed; read streams continuously";
                (ErrorCode::SlowReader, Code::ResourceExhausted, message)
            } else {
                (ErrorCode::StreamGivenUp, Code::Cancelled, "the client cancelled the call")
            };
            let error = RpcError::new(code, message);
            self.close(grpc, Some(&PublishedFailure::of(&error)), false);
        }
    }
}

/// Records the call of a response body. The wrapped body is dropped before it, so that a handler that is dropped
/// still adds its statistics.
pub(crate) struct RecordedBody {
    recorder: CallRecorder,
    /// The last frame, held until the events of the call are written.
    last: Option<(Frame<Bytes>, DurabilityAck)>,
}

impl RecordedBody {
    fn poll_last(&mut self, cx: &mut Context<'_>) -> PolledFrame {
        if let Some((_, ack)) = &mut self.last {
            ready!(Pin::new(ack).poll(cx));
        }
        Poll::Ready(self.last.take().map(|(frame, _)| Ok(frame)))
    }

    fn poll_recorded<B: CallBody>(
        &mut self,
        body: &mut Option<B>,
        cx: &mut Context<'_>,
    ) -> PolledFrame {
        if self.last.is_some() {
            return self.poll_last(cx);
        }
        let polled = {
            let _entered = self.recorder.span.enter();
            catch_unwind(AssertUnwindSafe(|| poll_body(body, cx)))
        };
        let mut frame = match polled {
            Ok(Poll::Pending) => return Poll::Pending,
            Ok(Poll::Ready(Some(Ok(frame)))) => frame,
            Ok(Poll::Ready(other)) => return Poll::Ready(other),
            Err(panic) => {
                *body = None;
                trailers(&Status::from(self.recorder.span.in_scope(|| panic_fault(&*panic))))
            }
        };
        if let Some(headers) = frame.trailers_mut()
            && let Some(ack) = self.recorder.end(headers)
        {
            self.last = Some((frame, ack));
            return self.poll_last(cx);
        }
        self.recorder.record_frame();
        Poll::Ready(Some(Ok(frame)))
    }
}

impl BodyWrapper for RecordedBody {
    fn poll_frame<B: CallBody>(
        &mut self,
        body: &mut Option<B>,
        cx: &mut Context<'_>,
    ) -> PolledFrame {
        let polled = self.poll_recorded(body, cx);
        self.recorder.reader.record_poll(&polled);
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.last.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_causes_of_a_failure_reach_its_events_and_never_the_client() {
        for is_stream in [false, true] {
            let fault = RpcError::internal("the cause");
            let incident_id = fault.incident_id().to_owned();
            let mut headers = if is_stream {
                trailers(&Status::from(fault)).into_trailers().unwrap()
            } else {
                refuse::<()>(fault).headers().clone()
            };
            assert!(headers.contains_key(error_chain::CAUSES));
            let status = Status::from_header_map(&headers).unwrap();
            let (code, failure) = write_failure(status, &mut headers);
            let failure = failure.unwrap();
            assert_eq!((code, failure.incident_id), (Code::Internal, incident_id));
            assert_eq!(failure.causes, ["the cause"]);
            assert!(!headers.contains_key(error_chain::CAUSES));
            assert_eq!(Status::from_header_map(&headers).unwrap().code(), Code::Internal);
        }
    }
}
