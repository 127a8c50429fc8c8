//! Names every call, and says how it ended: one log line, its metrics, and a published status in
//! place of whatever a library or a panic said. A call that just stops was left by its client.
//! The last frame of an answer leaves when the call is remembered in the spool.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use bytes::Bytes;
use futures_util::FutureExt as _;
use hapa_core::access::{Access, Rpc};
use hapa_core::call::Call;
use hapa_core::call_stats::Failure;
use hapa_core::rpc_error::{ErrorCode, Fault, code_name, publish, read};
use hapa_telemetry::panics;
use hapa_telemetry::trace::{Part, is_servers_failure};
use http::{HeaderMap, HeaderValue};
use http_body::{Body as HttpBody, Frame, SizeHint};
use tonic::{Code, Status};
use tracing::{Instrument as _, Span};

use crate::client_address::origin;
use crate::middleware::request_body::BrokenOff;
use crate::middleware::{Shared, refuse, trailers};
use crate::outbox::{Ended, Receipt, Spool};
use crate::server_span::arrive;
use crate::slow_reader;

const REQUEST_ID: &str = "x-request-id";
/// The label of what is not in the access table: a client must not make labels.
const UNKNOWN: &str = "unknown";

pub(crate) async fn observe(
    State(shared): State<Arc<Shared>>,
    mut request: Request,
    next: Next,
) -> Response {
    let presented = request.headers().get(REQUEST_ID).and_then(|value| value.to_str().ok());
    let rpc = shared.table.find(request.uri().path());
    let call = Call::new(presented, rpc, origin(&request, &shared.trusted_proxies));
    let mut record = Record::new(&shared, call.clone(), request.headers());
    let (span, path) = (record.span.clone(), record.path);
    metrics::gauge!("hapa_requests_in_flight", "rpc" => path).increment(1.0);
    request.extensions_mut().insert(call.clone());
    let request = request.map(|body| record.broken_off.watch(body));

    let run = AssertUnwindSafe(next.run(request)).catch_unwind().instrument(span.clone());
    let mut response =
        run.await.unwrap_or_else(|panic| span.in_scope(|| refuse(panicked(&*panic))));
    if let Ok(id) = HeaderValue::from_str(&call.request_id) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    if response.headers().contains_key("grpc-status") {
        if let Some(receipt) = record.end(response.headers_mut()) {
            receipt.await;
        }
        return response;
    }
    response.map(|body| Body::new(Observed { body, record, last: None }))
}

fn panicked(panic: &(dyn Any + Send)) -> Fault {
    Fault::internal(panics::describe(panic))
}

/// One call, counted from its begin to its end.
struct Record {
    path: &'static str,
    call: Call,
    span: Span,
    trace_id: String,
    /// The same span, as a part of the trace.
    part: Part,
    spool: Spool,
    broken_off: BrokenOff,
    slow: Option<Duration>,
    /// The longest that anything an engine said was here before the caller's connection got it.
    held: Option<Duration>,
    ended: bool,
}

impl Record {
    fn new(shared: &Shared, call: Call, headers: &HeaderMap) -> Record {
        let path = call.rpc.map_or(UNKNOWN, |rpc| rpc.path);
        let (span, part, trace_id) = arrive(headers, &call, path);
        let (spool, slow) = (shared.spool.clone(), shared.slow);
        let broken_off = BrokenOff::default();
        let (held, ended) = (None, false);
        Record { path, call, span, trace_id, part, spool, broken_off, slow, held, ended }
    }

    /// Reads how the call ended from its headers or trailers, and publishes it there. They may leave
    /// when the receipt has come.
    fn end(&mut self, headers: &mut HeaderMap) -> Option<Receipt> {
        let status =
            Status::from_header_map(headers).unwrap_or_else(|| Status::unknown("no status"));
        if status.code() == Code::Ok {
            return self.close(Code::Ok, None, true);
        }
        let broken_off = self.broken_off.is_set();
        let status = self.span.in_scope(|| publish(status, broken_off));
        if status.add_header(headers).is_err() {
            headers.insert("grpc-status", (status.code() as i32).into());
        }
        let failure = read(&status).map(|(error_code, incident_id)| Failure {
            error_code,
            incident_id,
            message: status.message().to_owned(),
        });
        self.close(status.code(), failure.as_ref(), true)
    }

    fn close(&mut self, code: Code, failure: Option<&Failure>, waits: bool) -> Option<Receipt> {
        if std::mem::replace(&mut self.ended, true) {
            return None;
        }
        let (path, elapsed) = (self.path, self.call.arrived.elapsed());
        if let Some(failure) = failure {
            self.span.record("incident_id", failure.incident_id.as_str());
        }
        self.count(code, failure, elapsed);
        self.tell_times(elapsed);
        self.trace(code, failure);
        let (call, trace_id) = (&self.call.told(), self.trace_id.as_str());
        self.spool.remember(&Ended { call, path, trace_id, code, failure, elapsed }, waits)
    }

    /// A frame goes to the caller's connection.
    fn hand_out(&mut self) {
        if let Some(heard) = self.call.report().take_heard() {
            self.held = self.held.max(Some(heard.elapsed()));
        }
    }

    /// What the mesh itself took of the time, and where the time went where it was much.
    fn tell_times(&self, elapsed: Duration) {
        let is_work = |rpc: &&Rpc| rpc.access != Access::Public && !rpc.is_watch();
        let Some(rpc) = self.call.rpc.filter(is_work) else { return };
        let times = self.call.report().times();
        let overhead = elapsed.saturating_sub(times.queued + times.engine);
        metrics::histogram!("hapa_overhead_seconds", "rpc" => rpc.path).record(overhead);
        if let Some(held) = self.held {
            metrics::histogram!("hapa_inter_token_added_seconds", "rpc" => rpc.path).record(held);
        }
        if self.slow.is_none_or(|slow| elapsed <= slow) {
            return;
        }
        let _entered = self.span.enter();
        let millis = |span: Duration| u64::try_from(span.as_millis()).unwrap_or(u64::MAX);
        tracing::warn!(
            duration_ms = millis(elapsed),
            queued_ms = millis(times.queued),
            engine_ms = millis(times.engine),
            first_token_ms = times.first_token.map(millis),
            overhead_ms = millis(overhead),
            "slow call"
        );
    }

    fn trace(&mut self, code: Code, failure: Option<&Failure>) {
        // Dropped here: the call ends now, however long its body is kept.
        let part = std::mem::take(&mut self.part);
        part.set("rpc.grpc.status_code", i64::from(code as i32));
        let Some(failure) = failure else { return };
        part.set("hapa.incident_id", failure.incident_id.clone());
        if is_servers_failure(code) {
            part.fail(failure.error_code.clone(), "the call failed");
        } else {
            part.set("error.type", failure.error_code.clone());
        }
    }

    fn count(&self, code: Code, failure: Option<&Failure>, elapsed: Duration) {
        let path = self.path;
        let code = code_name(code);
        metrics::gauge!("hapa_requests_in_flight", "rpc" => path).decrement(1.0);
        metrics::counter!("hapa_requests_total", "rpc" => path, "code" => code).increment(1);
        metrics::histogram!("hapa_request_duration_seconds", "rpc" => path).record(elapsed);
        let duration_ms = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX);
        let _entered = self.span.enter();
        let Some(Failure { error_code, incident_id, .. }) = failure else {
            if path.starts_with("/grpc.") {
                tracing::debug!(code, duration_ms, "call ended");
            } else {
                tracing::info!(code, duration_ms, "call ended");
            }
            return;
        };
        metrics::counter!("hapa_errors_total", "rpc" => path, "error_code" => error_code.clone())
            .increment(1);
        tracing::info!(code, duration_ms, error_code, incident_id, "call failed");
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        if !self.ended {
            let words = if slow_reader::is_given_up() {
                "the client stopped reading; its stream was given up"
            } else {
                "the client left"
            };
            let fault = Fault::new(ErrorCode::StreamGivenUp, words);
            self.close(Code::Cancelled, Some(&Failure::of(&fault)), false);
        }
    }
}

struct Observed {
    /// Before the record: a handler that is dropped notes what is known then.
    body: Body,
    record: Record,
    /// The last frame, held back until the call is remembered.
    last: Option<(Frame<Bytes>, Receipt)>,
}

impl Observed {
    fn poll_last(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        if let Some((_, receipt)) = &mut self.last {
            ready!(Pin::new(receipt).poll(cx));
        }
        Poll::Ready(self.last.take().map(|(frame, _)| Ok(frame)))
    }

    fn poll_observed(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let this = self;
        if this.last.is_some() {
            return this.poll_last(cx);
        }
        let polled = {
            let _entered = this.record.span.enter();
            let body = &mut this.body;
            catch_unwind(AssertUnwindSafe(|| Pin::new(body).poll_frame(cx)))
        };
        let mut frame = match polled {
            Ok(Poll::Pending) => return Poll::Pending,
            Ok(Poll::Ready(Some(Ok(frame)))) => frame,
            Ok(Poll::Ready(other)) => return Poll::Ready(other),
            Err(panic) => {
                this.body = Body::empty();
                trailers(&Status::from(this.record.span.in_scope(|| panicked(&*panic))))
            }
        };
        if let Some(headers) = frame.trailers_mut()
            && let Some(receipt) = this.record.end(headers)
        {
            this.last = Some((frame, receipt));
            return this.poll_last(cx);
        }
        this.record.hand_out();
        Poll::Ready(Some(Ok(frame)))
    }
}

impl HttpBody for Observed {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let answer = self.poll_observed(cx);
        slow_reader::asked(&answer);
        answer
    }

    fn is_end_stream(&self) -> bool {
        self.last.is_none() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
