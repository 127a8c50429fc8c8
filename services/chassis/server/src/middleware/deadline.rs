//! Deadlines: a call ends at its deadline, also in the middle of a stream.
//!
//! tonic's own timeouts end at the response headers and answer CANCELLED. This layer covers the response body and
//! answers DEADLINE_EXCEEDED. The layers below are polled first, so that a handler that observes the same deadline
//! can say which dependency was slow.

use hapa_core::access::Access;
use hapa_core::call::Call;
use hapa_core::grpc_timeout::grpc_timeout;
use hapa_core::rpc_error::{ErrorCode, RpcError};
use http::{Request, Response};
use tokio::time::{Sleep, sleep_until, timeout_at};

use crate::middleware::body::{RevocableBody, WrappedBody};
use crate::middleware::response::refuse;
use crate::middleware::shared::SharedState;

/// Sets the deadline of a call and ends the call when it passes.
pub(crate) async fn enforce_deadline<Q, B: Default>(
    shared: &SharedState,
    mut request: Request<Q>,
    next: impl AsyncFnOnce(Request<Q>) -> Response<B>,
) -> Response<WrappedBody<B, RevocableBody<Sleep>>> {
    let client_timeout = match grpc_timeout(request.headers()) {
        Ok(timeout) => timeout,
        Err(fault) => return refuse(fault),
    };
    let Some(call) = request.extensions_mut().get_mut::<Call>() else {
        return next(request).await.map(WrappedBody::unwrapped);
    };
    // Streams of services and probes have no maximum duration.
    let max_timeout = match call.rpc.map(|rpc| rpc.access) {
        Some(Access::NoAuth | Access::Service) => None,
        _ => Some(shared.request_timeout),
    };
    let Some(timeout) = client_timeout.into_iter().chain(max_timeout).min() else {
        return next(request).await.map(WrappedBody::unwrapped);
    };
    let deadline = call.arrived + timeout;
    call.deadline = Some(deadline);
    let is_model_call = call.rpc.is_some_and(|rpc| rpc.is_model_call);
    let error = if is_model_call { model_timeout } else { deadline_exceeded };
    match timeout_at(deadline, next(request)).await {
        Ok(response) => {
            let ends = RevocableBody::new(sleep_until(deadline), error);
            response.map(|body| WrappedBody::new(body, ends))
        }
        Err(_) => refuse(error()),
    }
}

const MESSAGE: &str = "the call's deadline has passed; allow more time or ask for less";

fn model_timeout() -> RpcError {
    RpcError::new(ErrorCode::ModelTimeout, MESSAGE)
}

fn deadline_exceeded() -> RpcError {
    RpcError::new(ErrorCode::DeadlineExceeded, MESSAGE)
}
