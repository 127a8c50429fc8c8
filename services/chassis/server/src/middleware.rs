//! The way into every service: one function stacks the layers, and says why each stands where it does.

pub(crate) mod admission;
mod deadline;
mod load_shed;
mod message_limits;
pub(crate) mod public_calls;
mod record_call;
mod request_body;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::middleware::from_fn_with_state;
use axum::response::Response;
use bytes::Bytes;
use hapa_core::access::Table;
use hapa_core::rpc_error::Fault;
use http::HeaderMap;
use http_body::Frame;
use ipnet::IpNet;
use tokio::sync::Semaphore;
use tonic::Status;
use tower::ServiceBuilder;

use self::admission::{Admission, admission};
use self::deadline::deadline;
use self::load_shed::shed;
use self::message_limits::receive;
use self::public_calls::PublicCalls;
use self::record_call::observe;
use crate::outbox::Spool;

/// What the layers of one server share.
pub(crate) struct Shared {
    pub(crate) table: Table,
    pub(crate) request_timeout: Duration,
    pub(crate) trusted_proxies: Vec<IpNet>,
    pub(crate) in_flight: Arc<Semaphore>,
    pub(crate) public_calls: PublicCalls,
    /// Bytes of messages that may be arriving at once.
    pub(crate) request_memory: Arc<Semaphore>,
    pub(crate) admission: Admission,
    pub(crate) spool: Spool,
    /// A call that takes longer is logged as slow; none where none is.
    pub(crate) slow: Option<Duration>,
}

/// Outermost first.
pub(crate) fn stack(services: Router, shared: &Arc<Shared>) -> Router {
    let layers = ServiceBuilder::new()
        // Names, counts and logs every call and everything that goes wrong below, panics included;
        // so nothing may stand above it.
        .layer(from_fn_with_state(Arc::clone(shared), observe))
        // Above all that waits, and around the response body, so that no call outlives its time.
        .layer(from_fn_with_state(Arc::clone(shared), deadline))
        // Before admission: refusing must stay cheap when there is too much to do.
        .layer(from_fn_with_state(Arc::clone(shared), shed))
        // No handler runs without a caller who may call it.
        .layer(from_fn_with_state(Arc::clone(shared), admission))
        // Innermost: it bounds what a handler reads, by what the caller may do.
        .layer(from_fn_with_state(Arc::clone(shared), receive));
    services.layer(layers)
}

/// A refusal as a response without a body.
pub(crate) fn refuse(fault: Fault) -> Response {
    Status::from(fault).into_http::<Body>()
}

/// A status as the last frame of a stream.
pub(crate) fn trailers(status: &Status) -> Frame<Bytes> {
    let mut headers = HeaderMap::new();
    if status.add_header(&mut headers).is_err() {
        headers.insert("grpc-status", (status.code() as i32).into());
    }
    Frame::trailers(headers)
}
