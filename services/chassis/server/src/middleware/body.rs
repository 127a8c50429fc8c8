//! Bodies that wrap another body: what they have in common, and the two that several layers use.

use std::pin::Pin;
use std::task::{Context, Poll};

use axum::body::Body;
use bytes::Bytes;
use hapa_core::rpc_error::RpcError;
use http_body::{Body as HttpBody, Frame, SizeHint};
use tonic::Status;

use crate::middleware::response::trailers;

/// The result of polling a body for a frame.
pub(crate) type PolledFrame = Poll<Option<Result<Frame<Bytes>, axum::Error>>>;

/// How a wrapper treats the frames of the body that it wraps.
pub(crate) trait BodyWrapper: Send + Unpin + 'static {
    /// Polls the wrapped body for its next frame.
    fn poll_frame(&mut self, body: &mut Body, cx: &mut Context<'_>) -> PolledFrame {
        Pin::new(body).poll_frame(cx)
    }

    /// Whether the wrapper itself has no more frames.
    fn is_end_stream(&self) -> bool {
        true
    }
}

/// A body with its wrapper. The body is dropped first.
pub(crate) struct WrappedBody<W> {
    body: Body,
    wrapper: W,
}

impl<W: BodyWrapper> WrappedBody<W> {
    pub(crate) fn new(body: Body, wrapper: W) -> WrappedBody<W> {
        WrappedBody { body, wrapper }
    }
}

/// Puts a wrapper around a body.
pub(crate) fn wrap(body: Body, wrapper: impl BodyWrapper) -> Body {
    Body::new(WrappedBody::new(body, wrapper))
}

impl<W: BodyWrapper> HttpBody for WrappedBody<W> {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> PolledFrame {
        let WrappedBody { body, wrapper } = &mut *self;
        wrapper.poll_frame(body, cx)
    }

    fn is_end_stream(&self) -> bool {
        self.wrapper.is_end_stream() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Holds a permit until the body is dropped.
pub(crate) struct PermitBody<P> {
    _permit: P,
}

impl<P: Send + Unpin + 'static> PermitBody<P> {
    pub(crate) fn new(permit: P) -> PermitBody<P> {
        PermitBody { _permit: permit }
    }
}

impl<P: Send + Unpin + 'static> BodyWrapper for PermitBody<P> {}

/// Ends a stream with a status when a future completes. The wrapped body is polled first, so that a handler that
/// waits for the same event can send its own status.
pub(crate) struct RevocableBody<F> {
    revoked: Pin<Box<F>>,
    fault: fn() -> RpcError,
}

impl<F: Future<Output = ()>> RevocableBody<F> {
    pub(crate) fn new(revoked: F, fault: fn() -> RpcError) -> RevocableBody<F> {
        RevocableBody { revoked: Box::pin(revoked), fault }
    }
}

impl<F: Future<Output = ()> + Send + 'static> BodyWrapper for RevocableBody<F> {
    fn poll_frame(&mut self, body: &mut Body, cx: &mut Context<'_>) -> PolledFrame {
        if let Poll::Ready(frame) = Pin::new(&mut *body).poll_frame(cx) {
            return Poll::Ready(frame);
        }
        if body.is_end_stream() || self.revoked.as_mut().poll(cx).is_pending() {
            return Poll::Pending;
        }
        // Dropping the body stops the work that feeds it.
        *body = Body::empty();
        Poll::Ready(Some(Ok(trailers(&Status::from((self.fault)())))))
    }
}
