//! Bodies that wrap another body: what they have in common, and the two that several layers use.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use hapa_core::rpc_error::RpcError;
use http_body::{Body, Frame, SizeHint};
use tonic::Status;

use crate::middleware::response::trailers;

/// The result of polling a body for a frame.
pub(crate) type PolledFrame = Poll<Option<Result<Frame<Bytes>, axum::Error>>>;

/// The body of a request or of a response.
pub(crate) trait CallBody:
    Body<Data = Bytes, Error = axum::Error> + Send + Unpin + 'static
{
}

impl<B: Body<Data = Bytes, Error = axum::Error> + Send + Unpin + 'static> CallBody for B {}

/// How a wrapper treats the frames of the body that it wraps.
pub(crate) trait BodyWrapper: Send + Unpin + 'static {
    /// Polls the wrapped body for its next frame. Without a body, there is none. A wrapper that removes the body drops
    /// the work that feeds it.
    fn poll_frame<B: CallBody>(
        &mut self,
        body: &mut Option<B>,
        cx: &mut Context<'_>,
    ) -> PolledFrame {
        poll_body(body, cx)
    }

    /// Whether the wrapper itself has no more frames.
    fn is_end_stream(&self) -> bool {
        true
    }
}

/// A body with its wrapper. The body is dropped first. By default, a body without frames.
pub(crate) struct WrappedBody<B, W> {
    body: Option<B>,
    wrapper: Option<W>,
}

impl<B, W> Default for WrappedBody<B, W> {
    fn default() -> Self {
        WrappedBody { body: None, wrapper: None }
    }
}

impl<B, W> WrappedBody<B, W> {
    pub(crate) fn new(body: B, wrapper: W) -> WrappedBody<B, W> {
        WrappedBody { body: Some(body), wrapper: Some(wrapper) }
    }

    /// A body that this layer leaves as it is.
    pub(crate) fn unwrapped(body: B) -> WrappedBody<B, W> {
        WrappedBody { body: Some(body), wrapper: None }
    }
}

impl<B: CallBody, W: BodyWrapper> Body for WrappedBody<B, W> {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> PolledFrame {
        let WrappedBody { body, wrapper } = &mut *self;
        match wrapper {
            Some(wrapper) => wrapper.poll_frame(body, cx),
            None => poll_body(body, cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.wrapper.as_ref().is_none_or(BodyWrapper::is_end_stream)
            && has_ended(self.body.as_ref())
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or_else(|| SizeHint::with_exact(0), Body::size_hint)
    }
}

/// Polls a body, if there is one.
pub(crate) fn poll_body<B: CallBody>(body: &mut Option<B>, cx: &mut Context<'_>) -> PolledFrame {
    body.as_mut().map_or(Poll::Ready(None), |body| Pin::new(body).poll_frame(cx))
}

fn has_ended<B: CallBody>(body: Option<&B>) -> bool {
    body.is_none_or(Body::is_end_stream)
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
    fn poll_frame<B: CallBody>(
        &mut self,
        body: &mut Option<B>,
        cx: &mut Context<'_>,
    ) -> PolledFrame {
        if let Poll::Ready(frame) = poll_body(body, cx) {
            return Poll::Ready(frame);
        }
        if has_ended(body.as_ref()) || self.revoked.as_mut().poll(cx).is_pending() {
            return Poll::Pending;
        }
        *body = None;
        Poll::Ready(Some(Ok(trailers(&Status::from((self.fault)())))))
    }
}
