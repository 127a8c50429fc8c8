//! Admission, the same in front of every service. It denies by default, authenticates the credential, checks the
//! access rule of the method, and asks the rate limiter once.
//!
//! An admitted call ends when its credential ends, also in the middle of a stream.

use std::sync::Arc;

use hapa_core::access::{Access, GATEWAY_ROLE, Rpc};
use hapa_core::call::Call;
use hapa_core::rpc_error::{ErrorCode, RpcError, published_code};
use hapa_transport::peer::{MESH_TOKEN, ServiceAuth, gateway_token};
use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderValue, Request, Response};
use secrecy::{ExposeSecret as _, SecretString};
use subtle::ConstantTimeEq as _;
use tokio::time::sleep;
use tokio_util::sync::WaitForCancellationFutureOwned;
use tonic::Status;

use crate::auth::principal_cache::{
    ActiveCallGuard, CachedPrincipal, Credential, PrincipalCache, credential_ended,
    unknown_credential,
};
use crate::client_address::CertificateRoles;
use crate::middleware::body::{PermitBody, RevocableBody, WrappedBody};
use crate::middleware::response::refuse;
use crate::middleware::shared::SharedState;
use crate::rate_limit::failed_attempts::{FailedAttempts, WRONG_PASSWORD_DELAY, network};
use crate::rate_limit::{Decision, LimitConfig, Limiter, rate};

/// Identifies callers and decides whether they may call.
pub(crate) struct Admission {
    proof: ServiceAuth,
    principals: PrincipalCache,
    pub(crate) limiter: Arc<Limiter>,
    limits: LimitConfig,
    attempts: FailedAttempts,
}

/// The body of a call that ends with its credential.
type AdmittedBody<B> = WrappedBody<
    WrappedBody<B, RevocableBody<WaitForCancellationFutureOwned>>,
    PermitBody<ActiveCallGuard>,
>;

/// Refuses a call without permission, and runs any other until its credential ends.
pub(crate) async fn admit<Q, B: Default>(
    shared: &SharedState,
    mut request: Request<Q>,
    next: impl AsyncFnOnce(Request<Q>) -> Response<B>,
) -> Response<AdmittedBody<B>> {
    let Some(mut call) = request.extensions().get::<Call>().cloned() else {
        return refuse(RpcError::internal("admission ran without a call"));
    };
    let Some(rpc) = call.rpc else {
        let message =
            "there is no such method; check its name, and that client and mesh are of one version";
        return refuse(RpcError::new(ErrorCode::Unsupported, message));
    };
    let content_type = request.headers().get(CONTENT_TYPE).map(HeaderValue::as_bytes);
    if !content_type.is_some_and(|value| value.starts_with(b"application/grpc")) {
        let message = "this port accepts gRPC only; send JSON to the gateway";
        return refuse(RpcError::new(ErrorCode::Unsupported, message));
    }
    let identity = PresentedIdentity::of(&request);
    let Admitted { decision, active_call } =
        match shared.admission.decide(rpc, &mut call, &identity).await {
            Ok(admitted) => admitted,
            Err(fault) => return refuse(fault),
        };
    if let Some(decision) = decision.filter(|decision| decision.retry_after.is_some()) {
        let mut response: Response<_> = refuse(rate_limited(rpc, &call, decision));
        write_rate_limit(decision, response.headers_mut());
        return response;
    }
    request.extensions_mut().insert(call.clone());
    let mut response = if rpc.access == Access::Login {
        shared.admission.run_login(&call, request, next).await
    } else {
        next(request).await
    };
    if let Some(decision) = decision {
        write_rate_limit(decision, response.headers_mut());
    }
    match active_call {
        Some(active_call) if !response.headers().contains_key("grpc-status") => {
            let ended = active_call.ended.clone().cancelled_owned();
            let revocable = RevocableBody::new(ended, credential_ended);
            response.map(|body| {
                WrappedBody::new(WrappedBody::new(body, revocable), PermitBody::new(active_call))
            })
        }
        _ => response.map(|body| WrappedBody::unwrapped(WrappedBody::unwrapped(body))),
    }
}

/// The parts of a request that identify its caller.
struct PresentedIdentity<'a> {
    headers: &'a HeaderMap,
    certificate: Option<&'a CertificateRoles>,
}

impl PresentedIdentity<'_> {
    fn of<Q>(request: &Request<Q>) -> PresentedIdentity<'_> {
        PresentedIdentity { headers: request.headers(), certificate: request.extensions().get() }
    }
}

/// A call with permission, which the rate limiter may still refuse.
#[derive(Default)]
struct Admitted {
    decision: Option<Decision>,
    /// `None`: the call has no credential.
    active_call: Option<ActiveCallGuard>,
}

impl Admission {
    pub(crate) fn new(
        proof: ServiceAuth,
        principals: PrincipalCache,
        limiter: Arc<Limiter>,
        limits: &LimitConfig,
    ) -> Self {
        let attempts = FailedAttempts::new(Arc::clone(&limiter), limits.auth_failure_limit);
        Admission { proof, principals, limiter, limits: limits.clone(), attempts }
    }

    /// Identifies the caller, checks its permission and asks the rate limiter.
    async fn decide(
        &self,
        rpc: &'static Rpc,
        call: &mut Call,
        identity: &PresentedIdentity<'_>,
    ) -> Result<Admitted, RpcError> {
        if rpc.access == Access::NoAuth {
            return Ok(Admitted::default());
        }
        if self.is_service(rpc, identity) {
            call.is_mesh = true;
            call.record_caller();
            return Ok(Admitted::default());
        }
        match rpc.access {
            Access::Service => return Err(self.not_a_service(rpc)),
            Access::Login => return Ok(Admitted::default()),
            _ => {}
        }
        let caller = self.authenticate(call, identity.headers).await?;
        let active_call = ActiveCallGuard::start(caller);
        call.principal = Some(Arc::clone(&active_call.principal));
        call.ended = Some(active_call.ended.clone());
        // Before any refusal, because refused calls are recorded with their caller too.
        call.record_caller();
        check_access(rpc, &active_call)?;
        let rate = rate(&active_call.principal, rpc, &self.limits);
        let decision = self.limiter.decide(&active_call.subject, rpc.path, rate).await;
        Ok(Admitted { decision, active_call: Some(active_call) })
    }

    /// Whether the caller is a service, or an operator with the credentials of one.
    ///
    /// Every call of a connection has the client certificate of the connection, so a credential in the headers
    /// takes precedence over it.
    fn is_service(&self, rpc: &Rpc, identity: &PresentedIdentity<'_>) -> bool {
        let headers = identity.headers;
        match &self.proof {
            ServiceAuth::Token(token, previous) => {
                let presented = headers.get(MESH_TOKEN).map(HeaderValue::as_bytes);
                let is = |presented: &[u8], token: &SecretString| {
                    bool::from(presented.ct_eq(token.expose_secret().as_bytes()))
                };
                let is_gateways = rpc.access == Access::Service && rpc.allows(GATEWAY_ROLE);
                presented.is_some_and(|presented| {
                    std::iter::once(token).chain(previous).any(|token| {
                        is(presented, token) || is_gateways && is(presented, &gateway_token(token))
                    })
                })
            }
            ServiceAuth::Certificates(_) => {
                let has_credential = ["x-api-key", "authorization"]
                    .iter()
                    .any(|name| headers.get_all(*name).iter().any(is_set));
                let is_allowed = identity.certificate.is_some_and(|CertificateRoles(roles)| {
                    roles.iter().any(|role| rpc.allows(role))
                });
                is_allowed && (rpc.access == Access::Service || !has_credential)
            }
        }
    }

    fn not_a_service(&self, rpc: &Rpc) -> RpcError {
        match self.proof {
            ServiceAuth::Token(..) => {
                let message =
                    "only services of the mesh may call this; send its token as x-mesh-token";
                RpcError::new(ErrorCode::BadKey, message)
            }
            ServiceAuth::Certificates(_) => {
                let message =
                    format!("this certificate has no role that may call {}", rpc.method());
                RpcError::new(ErrorCode::NoPermission, message)
            }
        }
    }

    /// Authenticates the caller. A valid credential passes whatever other clients of its network did. A wrong one
    /// counts as a failed attempt, and is refused with E4004 if its network is over its limit.
    async fn authenticate(
        &self,
        call: &Call,
        headers: &HeaderMap,
    ) -> Result<Arc<CachedPrincipal>, RpcError> {
        let network = network(call.address);
        let Some(credential) = credential(headers)? else {
            return Err(self.record_auth_failure(&network, unknown_credential(), true).await);
        };
        if let Some(caller) = self.principals.cached(&credential).await {
            return Ok(caller);
        }
        if let Some(fault) = self.principals.cached_refusal(&credential).await {
            return Err(self.record_auth_failure(&network, fault, false).await);
        }
        let lane = match self.attempts.over_limit(&network).await {
            Some(_) => Some(self.attempts.lookup_lane(&network).await?),
            None => None,
        };
        let found = self.principals.find(&credential).await;
        drop(lane);
        match found {
            Ok(caller) => Ok(caller),
            Err(fault) => Err(self.record_auth_failure(&network, fault, true).await),
        }
    }

    /// Counts a failed attempt and returns its error. Only an unknown credential is an attempt: not one that was
    /// valid once, and not one that can't be checked.
    async fn record_auth_failure(&self, network: &str, fault: RpcError, counts: bool) -> RpcError {
        if fault.code() != ErrorCode::BadKey {
            return fault;
        }
        if let Some(over) = self.attempts.over_limit(network).await {
            return over.refusal(network);
        }
        if counts {
            self.attempts.record_failure(network).await;
        }
        fault
    }

    /// Runs a method that issues credentials. A network over its limit may run one login at a time, and a wrong
    /// password delays the next one.
    async fn run_login<Q, B: Default>(
        &self,
        call: &Call,
        mut request: Request<Q>,
        next: impl AsyncFnOnce(Request<Q>) -> Response<B>,
    ) -> Response<B> {
        let network: Arc<str> = network(call.address).into();
        let attempts = self.attempts.password_attempts(Arc::clone(&network));
        request.extensions_mut().insert(attempts);
        let Some(over) = self.attempts.over_limit(&network).await else {
            let response = next(request).await;
            if is_bad_credential(&response) {
                self.attempts.record_failure(&network).await;
            }
            return response;
        };
        let lane = match self.attempts.login_lane(&network).await {
            Ok(lane) => lane,
            Err(fault) => return refuse(fault),
        };
        let response = next(request).await;
        if !is_bad_credential(&response) {
            return response;
        }
        sleep(WRONG_PASSWORD_DELAY).await;
        drop(lane);
        refuse(over.refusal(&network))
    }
}

fn check_access(rpc: &Rpc, caller: &CachedPrincipal) -> Result<(), RpcError> {
    let has = |scope: &str| caller.principal.scopes.iter().any(|own| own == scope);
    let message = match rpc.access {
        Access::Scope(scope) if !has(scope) => {
            format!("this credential lacks the scope {scope}, which {} needs", rpc.method())
        }
        Access::AnyScope(scopes) if !scopes.iter().any(|scope| has(scope)) => {
            let (scopes, method) = (scopes.join(" or "), rpc.method());
            format!("this credential lacks the scope {scopes}, which {method} needs")
        }
        Access::SelfOrScope(scope) if caller.principal.session_id.is_empty() && !has(scope) => {
            format!("{} needs a session, or a key with {scope}", rpc.method())
        }
        _ => return Ok(()),
    };
    Err(RpcError::new(ErrorCode::NoPermission, message))
}

/// The credential in the headers; `None` if its text can't be one. An empty header, which a client with an unset
/// variable sends, counts as missing.
fn credential(headers: &HeaderMap) -> Result<Option<Credential>, RpcError> {
    if let Some(key) = headers.get_all("x-api-key").iter().find(|value| is_set(value)) {
        return Ok(key.to_str().ok().and_then(|key| Credential::parse(key.trim(), false)));
    }
    let mut tokens = headers.get_all("authorization").iter().filter_map(|value| {
        let (scheme, token) = value.to_str().ok()?.trim().split_once(' ')?;
        let token = token.trim();
        (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty()).then_some(token)
    });
    let message = "a credential is needed: an API key as x-api-key, or a key or an access token as authorization: Bearer";
    let token = tokens.next().ok_or_else(|| RpcError::new(ErrorCode::BadKey, message))?;
    Ok(Credential::parse(token, true))
}

fn is_set(value: &HeaderValue) -> bool {
    !value.as_bytes().trim_ascii().is_empty()
}

/// Whether a login failed because of an unknown credential, and not because one has ended.
fn is_bad_credential<B>(response: &Response<B>) -> bool {
    let status = Status::from_header_map(response.headers());
    let code = status.as_ref().and_then(published_code).map(|(code, _)| code);
    code.is_some_and(|code| code == ErrorCode::BadKey.entry().name)
}

fn rate_limited(rpc: &Rpc, call: &Call, decision: Decision) -> RpcError {
    let (method, limit) = (rpc.method(), decision.limit);
    let message = format!("{method} may be called {limit} times in its window");
    RpcError::new(ErrorCode::RateLimited, message)
        .retry_after(decision.retry_after.unwrap_or_default())
        .quota(format!("{}/{method}", call.actor()))
}

/// Writes the headers of the IETF draft: <https://datatracker.ietf.org/doc/draft-ietf-httpapi-ratelimit-headers/>.
fn write_rate_limit(decision: Decision, headers: &mut HeaderMap) {
    headers.insert("ratelimit-limit", decision.limit.into());
    headers.insert("ratelimit-remaining", decision.remaining.into());
    let seconds = decision.reset.as_secs() + u64::from(decision.reset.subsec_nanos() > 0);
    headers.insert("ratelimit-reset", seconds.into());
}
