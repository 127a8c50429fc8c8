//! The other services' end of a trace: one span for each question that a call asks of another service,
//! which goes on with the trace there. What no call is behind has none.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use hapa_core::rpc_error::code_name;
use hapa_telemetry::trace::{Part, name};
use http::{HeaderMap, Request, Response};
use http_body::{Body as HttpBody, Frame, SizeHint};
use pin_project_lite::pin_project;
use tonic::body::Body;
use tonic::{Code, Status};
use tower::Service;

/// A connection to a service, on which calls leave spans.
#[derive(Clone, Debug)]
pub struct Traced<S> {
    inner: S,
    /// `host:port`.
    place: Arc<str>,
}

impl<S> Traced<S> {
    pub fn new(inner: S, place: &str) -> Self {
        Traced { inner, place: place.into() }
    }
}

impl<S> Service<Request<Body>> for Traced<S>
where
    S: Service<Request<Body>, Response = Response<Body>>,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Asked<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<Body>) -> Asked<S::Future> {
        let part = Part::ask(|| name(request.uri().path()).to_owned());
        if part.is_some() {
            part.set_rpc(request.uri().path());
            part.set_server(&self.place);
        }
        part.carry(request.headers_mut());
        Asked { answer: self.inner.call(request), part: Some(part) }
    }
}

pin_project! {
    /// An answer on its way.
    pub struct Asked<F> {
        #[pin]
        answer: F,
        part: Option<Part>,
    }
}

impl<F: Future<Output = Result<Response<Body>, E>>, E> Future for Asked<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.project();
        let answer = ready!(this.answer.poll(cx));
        let part = this.part.take().filter(Part::is_some);
        let Some(part) = part else { return Poll::Ready(answer) };
        Poll::Ready(match answer {
            Ok(response) if response.headers().contains_key("grpc-status") => {
                note(&part, response.headers());
                Ok(response)
            }
            Ok(response) => Ok(response.map(|body| Body::new(Heard { body, part: Some(part) }))),
            Err(error) => {
                part.fail("transport", "no answer came");
                Err(error)
            }
        })
    }
}

/// An answer until its trailers.
struct Heard {
    body: Body,
    part: Option<Part>,
}

impl HttpBody for Heard {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if let Some(Ok(frame)) = &frame
            && let Some(trailers) = frame.trailers_ref()
            && let Some(part) = self.part.take()
        {
            note(&part, trailers);
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

/// How it ended.
fn note(part: &Part, headers: &HeaderMap) {
    let code = headers.get("grpc-status").map(|value| Code::from_bytes(value.as_bytes()));
    let code = code.unwrap_or(Code::Unknown);
    part.set("rpc.grpc.status_code", i64::from(code as i32));
    if code != Code::Ok {
        part.fail(code_name(code), "the other service refused or failed");
    }
}
