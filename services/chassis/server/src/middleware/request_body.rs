//! Detects requests that break off. A library's error about such a call is the client's doing.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};

use axum::body::Body;
use http_body::Body as _;

use crate::middleware::body::{BodyWrapper, PolledFrame, wrap};

/// Whether reading the request body has failed. Clones share one flag.
#[derive(Clone, Debug, Default)]
pub(crate) struct RequestAborted(Arc<AtomicBool>);

impl RequestAborted {
    pub(crate) fn is_set(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    /// The same body, which sets the flag if it fails.
    pub(crate) fn watch(&self, body: Body) -> Body {
        wrap(body, self.clone())
    }
}

impl BodyWrapper for RequestAborted {
    fn poll_frame(&mut self, body: &mut Body, cx: &mut Context<'_>) -> PolledFrame {
        let frame = ready!(Pin::new(body).poll_frame(cx));
        if let Some(Err(_)) = &frame {
            self.0.store(true, Ordering::Release);
        }
        Poll::Ready(frame)
    }
}
