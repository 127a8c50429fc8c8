//! Refuses work beyond what the process can carry, at once and cheaply. A call is in progress until
//! its response body has ended: counting only until the headers would not count streams at all.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use bytes::Bytes;
use hapa_core::access::Access;
use hapa_core::call::Call;
use hapa_core::rpc_error::{ErrorCode, Fault};
use http_body::{Body as HttpBody, Frame, SizeHint};
use tokio::sync::OwnedSemaphorePermit;

use crate::middleware::public_calls::PublicPermit;
use crate::middleware::{Shared, refuse};

pub(crate) async fn shed(
    State(shared): State<Arc<Shared>>,
    request: Request,
    next: Next,
) -> Response {
    let call = request.extensions().get::<Call>();
    let rpc = call.and_then(|call| call.rpc.map(|rpc| (rpc, call.address)));
    let permit = match rpc {
        // The mesh's own calls must work when users' calls are too many.
        Some((rpc, _)) if rpc.access == Access::Mesh => return next.run(request).await,
        Some((rpc, address)) if rpc.needs_no_credential() => {
            shared.public_calls.enter(rpc, address).map(Permit::Public)
        }
        _ => Arc::clone(&shared.in_flight).try_acquire_owned().ok().map(Permit::Call),
    };
    match permit {
        Some(permit) => {
            next.run(request).await.map(|body| Body::new(Held { body, _permit: permit }))
        }
        None => refuse(
            Fault::new(ErrorCode::Overloaded, "too many calls in progress; try again shortly")
                .retry_after(Duration::from_secs(1)),
        ),
    }
}

/// Given back by dropping it.
enum Permit {
    Call(#[expect(dead_code, reason = "held until it is dropped")] OwnedSemaphorePermit),
    Public(#[expect(dead_code, reason = "held until it is dropped")] PublicPermit),
}

struct Held {
    body: Body,
    _permit: Permit,
}

impl HttpBody for Held {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
