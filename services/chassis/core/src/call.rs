//! The context of a call. The server creates it when the request headers arrive; handlers and middleware read it.

use std::net::IpAddr;
use std::sync::Arc;

use hapa_proto::auth::v1::Principal;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::{Extensions, Status};
use uuid::Uuid;

use crate::access::Rpc;
use crate::call_stats::{CallStats, Caller};
use crate::rpc_error::RpcError;

/// Maximum length of a client's request id, in characters.
const MAX_REQUEST_ID_LEN: usize = 128;

/// The span field for the request id in the body of a request.
pub const BODY_REQUEST_ID_FIELD: &str = "body_request_id";

/// The context of one call.
#[derive(Clone, Debug)]
pub struct Call {
    /// The client's `x-request-id`, or a new UUIDv7.
    pub request_id: Arc<str>,
    /// Time of arrival.
    pub arrived: Instant,
    /// Time at which the call must have ended; `None` if only the client ends it.
    pub deadline: Option<Instant>,
    /// The access rule of the RPC; `None` for an unknown method.
    pub rpc: Option<&'static Rpc>,
    /// The client's address, as far as trusted proxies report it.
    pub address: IpAddr,
    /// The caller's identity, after admission with a key or a session.
    pub principal: Option<Arc<Principal>>,
    /// Whether the caller is a service of the mesh, or an operator with the mesh token.
    pub is_mesh: bool,
    /// Fires when the caller's credential expires or is revoked; `None` for a call without a credential.
    pub ended: Option<CancellationToken>,
    /// Statistics of the call, shared by its clones.
    stats: CallStats,
}

impl Call {
    /// The context in the extensions of a request. Fails with E5004 if there is none.
    pub fn from_extensions(extensions: &Extensions) -> Result<Call, Status> {
        let call = extensions.get::<Call>().cloned();
        call.ok_or_else(|| {
            RpcError::internal("a handler ran without the server's middleware").into()
        })
    }

    /// Whether the caller has all permissions.
    pub fn is_admin(&self) -> bool {
        self.is_mesh || self.has_scope("auth:admin")
    }

    /// Whether the caller may read data of `owner`.
    pub fn may_see(&self, owner: &str) -> bool {
        let principal = self.principal.as_ref();
        self.is_admin() || principal.is_some_and(|principal| principal.owner == owner)
    }

    /// Whether the caller's credential has a scope.
    pub fn has_scope(&self, scope: &str) -> bool {
        let principal = self.principal.as_ref();
        principal.is_some_and(|principal| principal.scopes.iter().any(|own| own == scope))
    }

    /// The caller's name in audit events and quota failures, such as `key:key_ab12`.
    pub fn actor(&self) -> String {
        match &self.principal {
            Some(principal) if principal.key_id.is_empty() => {
                format!("session:{}", principal.session_id)
            }
            Some(principal) => format!("key:{}", principal.key_id),
            None if self.is_mesh => "mesh".to_owned(),
            None => "anonymous".to_owned(),
        }
    }

    /// A copy for work that several calls may share: it has no deadline, is independent of the credential's end, and
    /// has its own statistics.
    #[must_use]
    pub fn detached(&self) -> Call {
        Call { deadline: None, ended: None, stats: CallStats::default(), ..self.clone() }
    }

    /// The statistics of the call, from which the server builds the usage event.
    pub fn stats(&self) -> &CallStats {
        &self.stats
    }

    /// Adds the request id of a request's body to every log line of the call.
    pub fn set_client_request_id(&self, request_id: &str) {
        tracing::Span::current().record(BODY_REQUEST_ID_FIELD, request_id);
    }

    /// The context of a call that has just arrived. An invalid request id is replaced by a new one.
    pub fn new(presented_id: Option<&str>, rpc: Option<&'static Rpc>, address: IpAddr) -> Call {
        let id = presented_id.filter(|id| is_request_id(id));
        Call {
            request_id: id.map_or_else(|| Uuid::now_v7().to_string().into(), Arc::from),
            arrived: Instant::now(),
            deadline: None,
            rpc,
            address,
            principal: None,
            is_mesh: false,
            ended: None,
            stats: CallStats::default(),
        }
    }

    /// Stores the caller's identity in the shared statistics, so that all clones have access to it.
    pub fn record_caller(&self) {
        let principal = self.principal.clone();
        self.stats.set_caller(Caller { principal, is_mesh: self.is_mesh });
    }

    /// A copy with the identity that admission has stored since this clone was made.
    #[must_use]
    pub fn with_recorded_caller(&self) -> Call {
        let Caller { principal, is_mesh } = self.stats.caller();
        Call { principal, is_mesh, ..self.clone() }
    }
}

/// Whether a text is a valid request id: 1 to 128 letters, digits, `-`, `_` and `.`.
pub fn is_request_id(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    (1..=MAX_REQUEST_ID_LEN).contains(&text.len()) && text.bytes().all(plain)
}
