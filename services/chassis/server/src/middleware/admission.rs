//! Who may call what, decided alike in front of every service: deny by default, a credential to its
//! principal, the method's row of the access table, then one limiter decision.
//!
//! A call that was admitted ends when its credential does, also in the middle of a stream.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::body::Body;
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use bytes::Bytes;
use hapa_core::access::{Access, GATEWAY, Rpc};
use hapa_core::call::Call;
use hapa_core::rpc_error::{ErrorCode, Fault, read};
use hapa_store::rate_limit::failed_attempts::{
    Attempts, PasswordAttempts, WRONG_PASSWORD_PAUSE, network,
};
use hapa_store::rate_limit::{Decision, LimitConfig, Limiter, rate};
use hapa_transport::peer::{MESH_TOKEN, Proof, gateway_token};
use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderValue};
use http_body::{Body as HttpBody, Frame, SizeHint};
use secrecy::{ExposeSecret as _, SecretString};
use subtle::ConstantTimeEq as _;
use tokio::time::sleep;
use tokio_util::sync::WaitForCancellationFutureOwned;
use tonic::Status;

use crate::auth::principal_cache::{Caller, Callers, Ongoing, Presented, ended, unknown};
use crate::client_address::Proven;
use crate::middleware::{Shared, refuse, trailers};

pub(crate) struct Admission {
    proof: Proof,
    callers: Callers,
    pub(crate) limiter: Arc<Limiter>,
    limits: LimitConfig,
    attempts: Attempts,
}

pub(crate) async fn admission(
    State(shared): State<Arc<Shared>>,
    mut request: Request,
    next: Next,
) -> Response {
    let Some(mut call) = request.extensions().get::<Call>().cloned() else {
        return refuse(Fault::internal("admission ran without a call"));
    };
    let Some(rpc) = call.rpc else {
        let words =
            "there is no such method; check its name, and that client and mesh are of one version";
        return refuse(Fault::new(ErrorCode::Unsupported, words));
    };
    let kind = request.headers().get(CONTENT_TYPE).map(HeaderValue::as_bytes);
    if !kind.is_some_and(|kind| kind.starts_with(b"application/grpc")) {
        let words = "this port speaks gRPC; JSON goes through the gateway";
        return refuse(Fault::new(ErrorCode::Unsupported, words));
    }
    let admitted = shared.admission.admit(rpc, &mut call, &Shown::by(&request)).await;
    let Admitted { decision, ongoing } = match admitted {
        Ok(admitted) => admitted,
        Err(fault) => return refuse(fault),
    };
    if let Some(decision) = decision.filter(|decision| decision.retry_after.is_some()) {
        let mut response = refuse(over_limit(rpc, &call, decision));
        show(decision, response.headers_mut());
        return response;
    }
    request.extensions_mut().insert(call.clone());
    let mut response = if rpc.access == Access::Open {
        shared.admission.run_login(&call, request, next).await
    } else {
        next.run(request).await
    };
    if let Some(decision) = decision {
        show(decision, response.headers_mut());
    }
    match ongoing {
        Some(ongoing) if !response.headers().contains_key("grpc-status") => {
            let ended = Box::pin(ongoing.ended.clone().cancelled_owned());
            response.map(|body| Body::new(Held { body, ended, _ongoing: ongoing }))
        }
        _ => response,
    }
}

/// What a call shows of who makes it.
struct Shown<'a> {
    headers: &'a HeaderMap,
    proven: Option<&'a Proven>,
}

impl Shown<'_> {
    fn by(request: &Request) -> Shown<'_> {
        Shown { headers: request.headers(), proven: request.extensions().get() }
    }
}

/// A call that may pass, unless the decision says otherwise.
#[derive(Default)]
struct Admitted {
    decision: Option<Decision>,
    /// None where no credential is behind the call.
    ongoing: Option<Ongoing>,
}

impl Admission {
    pub(crate) fn new(
        proof: Proof,
        callers: Callers,
        limiter: Arc<Limiter>,
        limits: &LimitConfig,
    ) -> Self {
        let attempts = Attempts::new(Arc::clone(&limiter), limits.auth_failure_limit);
        Admission { proof, callers, limiter, limits: limits.clone(), attempts }
    }

    async fn admit(
        &self,
        rpc: &'static Rpc,
        call: &mut Call,
        shown: &Shown<'_>,
    ) -> Result<Admitted, Fault> {
        if rpc.access == Access::Public {
            return Ok(Admitted::default());
        }
        if self.is_mesh(rpc, shown) {
            call.is_mesh = true;
            call.admitted();
            return Ok(Admitted::default());
        }
        match rpc.access {
            Access::Mesh => return Err(self.not_mesh(rpc)),
            Access::Open => return Ok(Admitted::default()),
            _ => {}
        }
        let caller = Ongoing::begin(self.caller(call, shown.headers).await?);
        call.principal = Some(Arc::clone(&caller.principal));
        call.ended = Some(caller.ended.clone());
        // Before anything is refused: a refusal is its caller's too.
        call.admitted();
        check_access(rpc, &caller)?;
        let rate = rate(&caller.principal, rpc, &self.limits);
        let decision = self.limiter.decide(&caller.subject, rpc.path, rate).await;
        Ok(Admitted { decision, ongoing: Some(caller) })
    }

    /// A certificate is there on every call of its connection, so a credential that comes with one
    /// says who calls.
    fn is_mesh(&self, rpc: &Rpc, shown: &Shown<'_>) -> bool {
        let headers = shown.headers;
        match &self.proof {
            Proof::Token(token, also) => {
                let presented = headers.get(MESH_TOKEN).map(HeaderValue::as_bytes);
                let is = |presented: &[u8], token: &SecretString| {
                    bool::from(presented.ct_eq(token.expose_secret().as_bytes()))
                };
                let is_gateways = rpc.access == Access::Mesh && rpc.takes(GATEWAY);
                presented.is_some_and(|presented| {
                    std::iter::once(token).chain(also).any(|token| {
                        is(presented, token) || is_gateways && is(presented, &gateway_token(token))
                    })
                })
            }
            Proof::Certificates(_) => {
                let has_other = ["x-api-key", "authorization"];
                let has_other =
                    has_other.iter().any(|name| headers.get_all(*name).iter().any(is_set));
                let proves = shown
                    .proven
                    .is_some_and(|Proven(roles)| roles.iter().any(|role| rpc.takes(role)));
                proves && (rpc.access == Access::Mesh || !has_other)
            }
        }
    }

    fn not_mesh(&self, rpc: &Rpc) -> Fault {
        match self.proof {
            Proof::Token(..) => {
                let words =
                    "only services of the mesh call this; present its token as x-mesh-token";
                Fault::new(ErrorCode::BadKey, words)
            }
            Proof::Certificates(_) => {
                let words =
                    format!("this certificate proves no role that may call {}", rpc.method());
                Fault::new(ErrorCode::NoPermission, words)
            }
        }
    }

    /// A valid credential is let in whatever others of its network did; a wrong one is counted, and
    /// refused with E4004 where the network is over its limit.
    async fn caller(&self, call: &Call, headers: &HeaderMap) -> Result<Arc<Caller>, Fault> {
        let network = network(call.address);
        let Some(presented) = presented(headers)? else {
            return Err(self.wrong_credential(&network, unknown(), true).await);
        };
        if let Some(caller) = self.callers.known(&presented).await {
            return Ok(caller);
        }
        if let Some(fault) = self.callers.refused(&presented).await {
            return Err(self.wrong_credential(&network, fault, false).await);
        }
        let lane = match self.attempts.over_limit(&network).await {
            Some(_) => Some(self.attempts.lookup_lane(&network).await?),
            None => None,
        };
        let found = self.callers.find(&presented).await;
        drop(lane);
        match found {
            Ok(caller) => Ok(caller),
            Err(fault) => Err(self.wrong_credential(&network, fault, true).await),
        }
    }

    /// What a failed attempt is told, and whether it counts. Only what nobody has is a guess: not a
    /// credential that was valid once, and not one that can't be checked.
    async fn wrong_credential(&self, network: &str, fault: Fault, counts: bool) -> Fault {
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

    /// Runs a method that is how to get a credential. A network over its limit has one turn at a time,
    /// and what turns out wrong occupies it for a while.
    async fn run_login(&self, call: &Call, mut request: Request, next: Next) -> Response {
        let network: Arc<str> = network(call.address).into();
        let attempts = PasswordAttempts::new(self.attempts.clone(), Arc::clone(&network));
        request.extensions_mut().insert(attempts);
        let Some(over) = self.attempts.over_limit(&network).await else {
            let response = next.run(request).await;
            if was_guess(&response) {
                self.attempts.record_failure(&network).await;
            }
            return response;
        };
        let lane = match self.attempts.login_lane(&network).await {
            Ok(lane) => lane,
            Err(fault) => return refuse(fault),
        };
        let response = next.run(request).await;
        if !was_guess(&response) {
            return response;
        }
        sleep(WRONG_PASSWORD_PAUSE).await;
        drop(lane);
        refuse(over.refusal(&network))
    }
}

fn check_access(rpc: &Rpc, caller: &Caller) -> Result<(), Fault> {
    let has = |scope: &str| caller.principal.scopes.iter().any(|own| own == scope);
    match rpc.access {
        Access::Scope(scope) if !has(scope) => {
            let words =
                format!("this credential lacks the scope {scope}, which {} needs", rpc.method());
            Err(Fault::new(ErrorCode::NoPermission, words))
        }
        Access::AnyScope(scopes) if !scopes.iter().any(|scope| has(scope)) => {
            let (scopes, method) = (scopes.join(" or "), rpc.method());
            let words = format!("this credential lacks the scope {scopes}, which {method} needs");
            Err(Fault::new(ErrorCode::NoPermission, words))
        }
        Access::Own(scope) if caller.principal.session_id.is_empty() && !has(scope) => {
            let words = format!("{} needs a session, or a key with {scope}", rpc.method());
            Err(Fault::new(ErrorCode::NoPermission, words))
        }
        _ => Ok(()),
    }
}

/// What the headers present; none where it can't be a credential. An empty header, which a client with
/// an unset variable sends, is as good as none.
fn presented(headers: &HeaderMap) -> Result<Option<Presented>, Fault> {
    if let Some(key) = headers.get_all("x-api-key").iter().find(|value| is_set(value)) {
        return Ok(key.to_str().ok().and_then(|key| Presented::read(key.trim(), false)));
    }
    let bearers = headers.get_all("authorization").iter().filter_map(|value| {
        let (scheme, token) = value.to_str().ok()?.trim().split_once(' ')?;
        let token = token.trim();
        (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty()).then_some(token)
    });
    let words = "a credential is needed: an API key as x-api-key, or a key or an access token as authorization: Bearer";
    let token = { bearers }.next().ok_or_else(|| Fault::new(ErrorCode::BadKey, words))?;
    Ok(Presented::read(token, true))
}

fn is_set(value: &HeaderValue) -> bool {
    !value.as_bytes().trim_ascii().is_empty()
}

/// A guess, not a credential that was good once.
fn was_guess(response: &Response) -> bool {
    let status = Status::from_header_map(response.headers());
    let code = status.as_ref().and_then(read).map(|(code, _)| code);
    code.is_some_and(|code| code == ErrorCode::BadKey.entry().name)
}

fn over_limit(rpc: &Rpc, call: &Call, decision: Decision) -> Fault {
    let words = format!("{} may be called {} times in its window", rpc.method(), decision.limit);
    Fault::new(ErrorCode::RateLimited, words)
        .retry_after(decision.retry_after.unwrap_or_default())
        .quota(format!("{}/{}", call.actor(), rpc.method()))
}

/// The IETF draft's names: <https://datatracker.ietf.org/doc/draft-ietf-httpapi-ratelimit-headers/>.
fn show(decision: Decision, headers: &mut HeaderMap) {
    headers.insert("ratelimit-limit", decision.limit.into());
    headers.insert("ratelimit-remaining", decision.remaining.into());
    let seconds = decision.reset.as_secs() + u64::from(decision.reset.subsec_nanos() > 0);
    headers.insert("ratelimit-reset", seconds.into());
}

/// A body that ends with its credential. What is below speaks first, so that a handler which watches
/// the same token can say it in its own words.
struct Held {
    body: Body,
    ended: Pin<Box<WaitForCancellationFutureOwned>>,
    _ongoing: Ongoing,
}

impl HttpBody for Held {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        if let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(cx) {
            return Poll::Ready(frame);
        }
        if self.body.is_end_stream() || self.ended.as_mut().poll(cx).is_pending() {
            return Poll::Pending;
        }
        // Dropped now: what feeds it must not run on.
        self.body = Body::empty();
        Poll::Ready(Some(Ok(trailers(&Status::from(ended())))))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
