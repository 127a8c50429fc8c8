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
use axum::middleware::from_fn_with_state;
use tower::ServiceBuilder;

use self::admission::admit;
use self::deadline::enforce_deadline;
use self::load_shed::shed_load;
use self::message_limits::limit_messages;
use self::record_call::record_call;
use self::shared::SharedState;

/// Puts the layers around the services, outermost first.
pub(crate) fn stack(services: Router, shared: &Arc<SharedState>) -> Router {
    let layers = ServiceBuilder::new()
        // Outermost: it names, counts and logs every call and every failure of the layers below, panics included.
        .layer(from_fn_with_state(Arc::clone(shared), record_call))
        // Above every layer that waits, and around the response body, so that no call outlives its deadline.
        .layer(from_fn_with_state(Arc::clone(shared), enforce_deadline))
        // Before admission, because a refusal must stay cheap under overload.
        .layer(from_fn_with_state(Arc::clone(shared), shed_load))
        // No handler runs for a caller without permission.
        .layer(from_fn_with_state(Arc::clone(shared), admit))
        // Innermost, because the limits depend on the permissions of the caller.
        .layer(from_fn_with_state(Arc::clone(shared), limit_messages));
    services.layer(layers)
}
