//! What is known about a call from its first byte on; handlers and inner layers read it.

use std::net::IpAddr;
use std::sync::Arc;

use hapa_proto::auth::v1::Principal;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::{Extensions, Status};
use uuid::Uuid;

use crate::access::Rpc;
use crate::call_stats::{Caller, Report};
use crate::rpc_error::Fault;

/// Longest request id that is taken over from a caller.
const LONGEST_ID: usize = 128;

/// The span's field for the id in a request's body.
pub const BODY_ID: &str = "body_request_id";

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
    pub rpc: Option<&'static Rpc>,
    /// From where it came: the client's address, as far as trusted proxies say.
    pub address: IpAddr,
    /// Who calls, once admitted with a key or a session.
    pub principal: Option<Arc<Principal>>,
    /// Whether the caller is a service of the mesh, or an operator who holds its token.
    pub is_mesh: bool,
    /// Fires when the caller's credential ends; none where no credential is behind the call.
    pub ended: Option<CancellationToken>,
    /// What is noted about it, shared by its clones.
    report: Report,
}

impl Call {
    /// The call that a request belongs to.
    pub fn of(extensions: &Extensions) -> Result<Call, Status> {
        let call = extensions.get::<Call>().cloned();
        call.ok_or_else(|| Fault::internal("a handler ran outside of the layers").into())
    }

    /// Whether the caller may do everything.
    pub fn is_admin(&self) -> bool {
        self.is_mesh || self.has_scope("auth:admin")
    }

    /// Whether the caller may see what belongs to `owner`.
    pub fn may_see(&self, owner: &str) -> bool {
        let principal = self.principal.as_ref();
        self.is_admin() || principal.is_some_and(|principal| principal.owner == owner)
    }

    /// Whether the caller's credential has a scope.
    pub fn has_scope(&self, scope: &str) -> bool {
        let principal = self.principal.as_ref();
        principal.is_some_and(|principal| principal.scopes.iter().any(|own| own == scope))
    }

    /// Who calls, as audit and quota failures name it.
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

    /// The same call for work that others may share: no deadline and no end of a credential ends it,
    /// and what it does is noted apart.
    #[must_use]
    pub fn apart(&self) -> Call {
        Call { deadline: None, ended: None, report: Report::default(), ..self.clone() }
    }

    /// Where its handler notes what it does, for the event that remembers the call.
    pub fn report(&self) -> &Report {
        &self.report
    }

    /// Puts the id that a request's body gives it beside the call's own, in every log line.
    pub fn also_named(&self, request_id: &str) {
        tracing::Span::current().record(BODY_ID, request_id);
    }

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
            report: Report::default(),
        }
    }

    /// Says to all clones who calls.
    pub fn admitted(&self) {
        let principal = self.principal.clone();
        self.report.admit(Caller { principal, is_mesh: self.is_mesh });
    }

    /// The same call, with what admission found out since it was cloned.
    pub fn told(&self) -> Call {
        let Caller { principal, is_mesh } = self.report.caller();
        Call { principal, is_mesh, ..self.clone() }
    }
}

/// Whether a text may name a request in logs and replies.
pub fn is_request_id(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    (1..=LONGEST_ID).contains(&text.len()) && text.bytes().all(plain)
}
