//! What is known about a call from its first byte on; handlers and inner layers read it.

use std::sync::Arc;

use hapa_proto::auth::v1::Principal;
use tokio::time::Instant;
use tonic::{Extensions, Status};
use uuid::Uuid;

use crate::rpc::Rpc;
use crate::status::Fault;

/// Longest request id that is taken over from a caller.
const LONGEST_ID: usize = 128;

/// The span's field for the id in a request's body.
pub(crate) const BODY_ID: &str = "body_request_id";

/// One call.
#[derive(Clone, Debug)]
pub struct Call {
    /// The caller's `x-request-id`, or a new UUIDv7.
    pub request_id: Arc<str>,
    /// When it arrived.
    pub arrived: Instant,
    /// When it must have ended; none where only the caller decides.
    pub deadline: Option<Instant>,
    /// Its row of the access table, none for an unknown method.
    pub(crate) rpc: Option<&'static Rpc>,
    /// Who calls, once admitted with a key or as a service.
    pub principal: Option<Arc<Principal>>,
}

impl Call {
    /// The call that a request belongs to.
    pub fn of(extensions: &Extensions) -> Result<Call, Status> {
        let call = extensions.get::<Call>().cloned();
        call.ok_or_else(|| Fault::internal("a handler ran outside of the layers").into())
    }

    /// Puts the id that a request's body gives it beside the call's own, in every log line.
    pub fn also_named(&self, request_id: &str) {
        tracing::Span::current().record(BODY_ID, request_id);
    }

    pub(crate) fn new(presented_id: Option<&str>, rpc: Option<&'static Rpc>) -> Call {
        let id = presented_id.filter(|id| is_request_id(id));
        Call {
            request_id: id.map_or_else(|| Uuid::now_v7().to_string().into(), Arc::from),
            arrived: Instant::now(),
            deadline: None,
            rpc,
            principal: None,
        }
    }
}

/// Whether a text may name a request in logs and replies.
pub fn is_request_id(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    (1..=LONGEST_ID).contains(&text.len()) && text.bytes().all(plain)
}
