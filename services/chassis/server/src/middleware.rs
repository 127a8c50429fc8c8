//! The layers in front of every service, and the order in which they stand.

pub(crate) mod admission;
mod body;
mod deadline;
mod load_shed;
mod message_limits;
pub(crate) mod public_calls;
mod record_call;
mod request_body;
mod response;
pub(crate) mod shared;

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use http::{Request, Response};
use tower::Service as _;

use self::admission::admit;
use self::body::CallBody;
use self::deadline::enforce_deadline;
use self::load_shed::shed_load;
use self::message_limits::limit_messages;
use self::record_call::record_call;
use self::shared::SharedState;

/// The services behind the layers. Clones share both.
#[derive(Clone)]
pub(crate) struct LayeredServices {
    services: Router,
    shared: Arc<SharedState>,
}

impl LayeredServices {
    pub(crate) fn new(services: Router, shared: SharedState) -> LayeredServices {
        LayeredServices { services, shared: Arc::new(shared) }
    }

    /// Runs a call through all layers, outermost first, as one future with one response body.
    pub(crate) async fn call(self, request: Request<impl CallBody>) -> Response<impl CallBody> {
        let LayeredServices { mut services, shared } = self;
        let shared = &*shared;
        // Innermost, because the limits depend on the permissions of the caller.
        let serve = async |request: Request<Body>| match services.call(request).await {
            Ok(response) => response,
        };
        let limit = async |request| limit_messages(shared, request, serve).await;
        // No handler runs for a caller without permission.
        let admit = async |request| admit(shared, request, limit).await;
        // Before admission, because a refusal must stay cheap under overload.
        let shed = async |request| shed_load(shared, request, admit).await;
        // Above every layer that waits, and around the response body, so that no call outlives its deadline.
        let enforce = async |request| enforce_deadline(shared, request, shed).await;
        // Outermost: it names, counts and logs every call and every failure of the layers below, panics included.
        record_call(shared, request, enforce).await
    }
}
