//! Load shedding: refuses calls beyond the capacity of the process, at once and cheaply.
//!
//! A call counts as in progress until its response body has ended. A count that ended at the response headers would
//! not include streams.

use std::sync::Arc;
use std::time::Duration;

use hapa_core::access::Access;
use hapa_core::call::Call;
use hapa_core::rpc_error::{ErrorCode, RpcError};
use http::{Request, Response};
use tokio::sync::OwnedSemaphorePermit;

use crate::middleware::body::{PermitBody, WrappedBody};
use crate::middleware::public_calls::PublicPermit;
use crate::middleware::response::refuse;
use crate::middleware::shared::SharedState;

/// Refuses a call if its pool has no permit left.
pub(crate) async fn shed_load<Q, B: Default>(
    shared: &SharedState,
    request: Request<Q>,
    next: impl AsyncFnOnce(Request<Q>) -> Response<B>,
) -> Response<WrappedBody<B, PermitBody<CallPermit>>> {
    let call = request.extensions().get::<Call>();
    let rpc = call.and_then(|call| call.rpc.map(|rpc| (rpc, call.address)));
    let permit = match rpc {
        // Calls between services must work while users make too many calls.
        Some((rpc, _)) if rpc.access == Access::Service => {
            return next(request).await.map(WrappedBody::unwrapped);
        }
        Some((rpc, address)) if rpc.needs_no_credential() => {
            shared.public_calls.enter(rpc, address).map(CallPermit::Public)
        }
        _ => Arc::clone(&shared.in_flight).try_acquire_owned().ok().map(CallPermit::InFlight),
    };
    match permit {
        Some(permit) => {
            next(request).await.map(|body| WrappedBody::new(body, PermitBody::new(permit)))
        }
        None => refuse(
            RpcError::new(ErrorCode::Overloaded, "too many calls in progress; try again shortly")
                .retry_after(Duration::from_secs(1)),
        ),
    }
}

/// A permit for one call, released when it is dropped.
pub(crate) enum CallPermit {
    InFlight(#[expect(dead_code, reason = "held until it is dropped")] OwnedSemaphorePermit),
    Public(#[expect(dead_code, reason = "held until it is dropped")] PublicPermit),
}
