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
use http_body::{Body as HttpBody, Frame, SizeHint};
use tokio::sync::OwnedSemaphorePermit;

use crate::context::Call;
use crate::layers::{Shared, refuse};
use crate::rpc::Access;
use crate::status::{ErrorCode, Fault};

pub(crate) async fn shed(
    State(shared): State<Arc<Shared>>,
    request: Request,
    next: Next,
) -> Response {
    let access = request.extensions().get::<Call>().and_then(|call| call.rpc).map(|rpc| rpc.access);
    // Probes and the mesh's own calls must work when users' calls are too many.
    if let Some(Access::Public | Access::Mesh) = access {
        return next.run(request).await;
    }
    match Arc::clone(&shared.in_flight).try_acquire_owned() {
        Ok(permit) => next.run(request).await.map(|body| Body::new(Held { body, _permit: permit })),
        Err(_) => refuse(
            Fault::new(ErrorCode::Overloaded, "too many calls in progress; try again shortly")
                .retry_after(Duration::from_secs(1)),
        ),
    }
}

struct Held {
    body: Body,
    _permit: OwnedSemaphorePermit,
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
