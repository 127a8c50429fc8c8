//! A call ends when its time is up, also in the middle of a stream.
//!
//! tonic's own timeouts end at the response's headers and say CANCELLED; this one covers the body
//! and says DEADLINE_EXCEEDED. What is below gets to speak first, so that a handler which watches
//! the same deadline can say what broke.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::body::Body;
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use bytes::Bytes;
use hapa_core::access::Access;
use hapa_core::call::Call;
use hapa_core::grpc_timeout::grpc_timeout;
use hapa_core::rpc_error::{ErrorCode, Fault};
use http_body::{Body as HttpBody, Frame, SizeHint};
use pin_project_lite::pin_project;
use tokio::time::{Sleep, sleep_until, timeout_at};
use tonic::Status;

use crate::middleware::{Shared, refuse, trailers};

pub(crate) async fn deadline(
    State(shared): State<Arc<Shared>>,
    mut request: Request,
    next: Next,
) -> Response {
    let asked = match grpc_timeout(request.headers()) {
        Ok(asked) => asked,
        Err(fault) => return refuse(fault),
    };
    let Some(call) = request.extensions_mut().get_mut::<Call>() else {
        return next.run(request).await;
    };
    // What services and probes watch lives as long as they want.
    let bound = match call.rpc.map(|rpc| rpc.access) {
        Some(Access::Public | Access::Mesh) => None,
        _ => Some(shared.request_timeout),
    };
    let Some(span) = asked.into_iter().chain(bound).min() else {
        return next.run(request).await;
    };
    let at = call.arrived + span;
    call.deadline = Some(at);
    match timeout_at(at, next.run(request)).await {
        Ok(response) => response.map(|body| Body::new(Timed { body, timer: sleep_until(at) })),
        Err(_) => refuse(passed()),
    }
}

fn passed() -> Fault {
    Fault::new(
        ErrorCode::ModelTimeout,
        "the call's deadline has passed; allow more time or ask for less",
    )
}

pin_project! {
    struct Timed {
        body: Body,
        #[pin]
        timer: Sleep,
    }
}

impl HttpBody for Timed {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let this = self.project();
        if let Poll::Ready(frame) = Pin::new(&mut *this.body).poll_frame(cx) {
            return Poll::Ready(frame);
        }
        if this.body.is_end_stream() || this.timer.poll(cx).is_pending() {
            return Poll::Pending;
        }
        // Dropped now: what feeds it must not run on.
        *this.body = Body::empty();
        Poll::Ready(Some(Ok(trailers(&Status::from(passed())))))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
