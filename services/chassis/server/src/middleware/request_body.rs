//! Detects requests that break off. A library's error about such a call is the client's doing.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};

use crate::middleware::body::{BodyWrapper, CallBody, PolledFrame, WrappedBody, poll_body};

/// Whether reading the request body has failed. Clones share one flag.
#[derive(Clone, Debug, Default)]
pub(crate) struct RequestAborted(Arc<AtomicBool>);

impl RequestAborted {
    pub(crate) fn is_set(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    /// The same body, which sets the flag if it fails.
    pub(crate) fn watch<B>(&self, body: B) -> WrappedBody<B, RequestAborted> {
        WrappedBody::new(body, self.clone())
    }
}

impl BodyWrapper for RequestAborted {
    fn poll_frame<B: CallBody>(
        &mut self,
        body: &mut Option<B>,
        cx: &mut Context<'_>,
    ) -> PolledFrame {
        let frame = ready!(poll_body(body, cx));
        if let Some(Err(_)) = &frame {
            self.0.store(true, Ordering::Release);
        }
        Poll::Ready(frame)
    }
}
