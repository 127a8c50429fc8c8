//! What is known about a call from its first byte on; handlers and inner layers read it.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use hapa_proto::auth::v1::Principal;
use ipnet::IpNet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::{Extensions, Status};
use uuid::Uuid;

use crate::report::{Caller, Report};
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

    pub(crate) fn new(
        presented_id: Option<&str>,
        rpc: Option<&'static Rpc>,
        address: IpAddr,
    ) -> Call {
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
    pub(crate) fn admitted(&self) {
        let principal = self.principal.clone();
        self.report.admit(Caller { principal, is_mesh: self.is_mesh });
    }

    /// The same call, with what admission found out since it was cloned.
    pub(crate) fn told(&self) -> Call {
        let Caller { principal, is_mesh } = self.report.caller();
        Call { principal, is_mesh, ..self.clone() }
    }
}

/// The other end of a connection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Peer(pub(crate) IpAddr);

/// What the certificate at the other end of a connection proves.
#[derive(Clone, Debug)]
pub(crate) struct Proven(pub(crate) Arc<[&'static str]>);

/// Where a request came from. A trusted proxy appends whom it heard to x-forwarded-for, so the last
/// entry that no trusted proxy made is the client; anyone else's header is inert.
pub(crate) fn origin(request: &http::Request<axum::body::Body>, trusted: &[IpNet]) -> IpAddr {
    let peer =
        request.extensions().get::<Peer>().map_or(Ipv4Addr::UNSPECIFIED.into(), |peer| peer.0);
    let is_trusted = |address: &IpAddr| trusted.iter().any(|net| net.contains(address));
    let mut client = peer.to_canonical();
    let headers = request.headers().get_all("x-forwarded-for").iter().rev();
    let entries = headers.filter_map(|value| value.to_str().ok()).flat_map(|text| text.rsplit(','));
    for entry in entries {
        if !is_trusted(&client) {
            break;
        }
        let Ok(address) = entry.trim().parse::<IpAddr>() else { break };
        client = address.to_canonical();
    }
    client
}

/// Whether a text may name a request in logs and replies.
pub fn is_request_id(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    (1..=LONGEST_ID).contains(&text.len()) && text.bytes().all(plain)
}

#[cfg(test)]
mod tests {
    use axum::body::Body;

    use super::*;

    fn from(peer: &str, forwarded: &[&str]) -> String {
        let mut request = http::Request::new(Body::empty());
        request.extensions_mut().insert(Peer(peer.parse().unwrap()));
        for value in forwarded {
            request.headers_mut().append("x-forwarded-for", value.parse().unwrap());
        }
        origin(&request, &["127.0.0.0/8".parse().unwrap(), "10.0.0.0/8".parse().unwrap()])
            .to_string()
    }

    #[test]
    fn only_trusted_proxies_are_believed_about_where_a_call_came_from() {
        assert_eq!(from("203.0.113.7", &["198.51.100.1"]), "203.0.113.7");
        assert_eq!(from("127.0.0.1", &[]), "127.0.0.1");
        assert_eq!(from("127.0.0.1", &["198.51.100.1"]), "198.51.100.1");
        assert_eq!(from("127.0.0.1", &["6.6.6.6, 198.51.100.1, 10.1.2.3"]), "198.51.100.1");
        assert_eq!(from("::ffff:127.0.0.1", &["6.6.6.6", "198.51.100.1"]), "198.51.100.1");
        assert_eq!(from("127.0.0.1", &["6.6.6.6, nonsense"]), "127.0.0.1");
    }
}
