//! Client spans of calls to other services, which continue the trace of the current call. Requests outside a call have
//! no span.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use hapa_core::rpc_error::code_name;
use hapa_telemetry::trace::{SpanHandle, span_name};
use http::{HeaderMap, Request, Response};
use http_body::{Body as HttpBody, Frame, SizeHint};
use pin_project_lite::pin_project;
use tonic::body::Body;
use tonic::{Code, Status};
use tower::Service;

/// A channel that records a client span for each call.
#[derive(Clone, Debug)]
pub struct TracingChannel<S> {
    inner: S,
    /// The peer as `host:port`.
    peer: Arc<str>,
}

impl<S> TracingChannel<S> {
    /// Wraps a channel to the peer at `host:port`.
    pub(crate) fn new(inner: S, peer: &str) -> Self {
        TracingChannel { inner, peer: peer.into() }
    }
}

impl<S> Service<Request<Body>> for TracingChannel<S>
where
    S: Service<Request<Body>, Response = Response<Body>>,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = TracedResponse<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<Body>) -> TracedResponse<S::Future> {
        let span = SpanHandle::client(|| span_name(request.uri().path()).to_owned());
        if span.is_some() {
            span.set_rpc(request.uri().path());
            span.set_server(&self.peer);
        }
        span.inject(request.headers_mut());
        TracedResponse { response: self.inner.call(request), span: Some(span) }
    }
}

pin_project! {
    /// The future of a traced call.
    #[derive(Debug)]
    pub struct TracedResponse<F> {
        #[pin]
        response: F,
        span: Option<SpanHandle>,
    }
}

impl<F: Future<Output = Result<Response<Body>, E>>, E> Future for TracedResponse<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.project();
        let result = ready!(this.response.poll(cx));
        let span = this.span.take().filter(SpanHandle::is_some);
        let Some(span) = span else { return Poll::Ready(result) };
        Poll::Ready(match result {
            Ok(response) if response.headers().contains_key("grpc-status") => {
                record_status(&span, response.headers());
                Ok(response)
            }
            Ok(response) => {
                Ok(response.map(|body| Body::new(TracedBody { body, span: Some(span) })))
            }
            Err(error) => {
                span.fail("transport", "no reply arrived");
                Err(error)
            }
        })
    }
}

/// A response body that ends the span at its trailers.
struct TracedBody {
    body: Body,
    span: Option<SpanHandle>,
}

impl HttpBody for TracedBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if let Some(Ok(frame)) = &frame
            && let Some(trailers) = frame.trailers_ref()
            && let Some(span) = self.span.take()
        {
            record_status(&span, trailers);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

fn record_status(span: &SpanHandle, headers: &HeaderMap) {
    let code = headers.get("grpc-status").map(|value| Code::from_bytes(value.as_bytes()));
    let code = code.unwrap_or(Code::Unknown);
    span.set("rpc.grpc.status_code", i64::from(code as i32));
    if code != Code::Ok {
        span.fail(code_name(code), "the call to the other service failed");
    }
}
