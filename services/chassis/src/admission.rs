//! Who may call what, decided alike in front of every service: deny by default, a key's digest to a
//! cached principal, the method's scope, then one limiter decision.
//!
//! Auth owns the truth and is asked over gRPC on a miss. Where it can't be asked, a key that is not
//! known yet gets UNAVAILABLE: never "wrong key", and never a pass.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use hapa_proto::auth::v1::auth_service_client::AuthServiceClient;
use hapa_proto::auth::v1::{AuthenticateRequest, Principal};
use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderValue};
use moka::future::Cache;
use secrecy::{ExposeSecret as _, SecretString};
use subtle::ConstantTimeEq as _;
use tokio::time::timeout;
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::config::LimitConfig;
use crate::context::Call;
use crate::deadline::left;
use crate::key_text::{self, KeyDigest};
use crate::layers::{Shared, refuse};
use crate::limit::{Decision, Limiter, rate};
use crate::peer::MESH_TOKEN;
use crate::rpc::{Access, Rpc};
use crate::status::{ErrorCode, Fault, read};

/// The longest that a revoked key can live in a cache.
const REMEMBERED: Duration = Duration::from_secs(5);
/// Most credentials remembered.
const MOST_REMEMBERED: u64 = 100_000;
/// Auth answers in a millisecond; past this it is as good as down.
const PATIENCE: Duration = Duration::from_secs(2);

/// What auth said about a digest.
#[derive(Clone, Debug)]
enum Known {
    Caller(Arc<Caller>),
    Refused(ErrorCode),
}

#[derive(Debug)]
struct Caller {
    key_id: Arc<str>,
    principal: Arc<Principal>,
    expires: Option<SystemTime>,
}

pub(crate) struct Admission {
    mesh_token: SecretString,
    auth: AuthServiceClient<Channel>,
    known: Cache<KeyDigest, Known>,
    limiter: Limiter,
    limits: LimitConfig,
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
        let words = format!("there is no method {}", request.uri().path());
        return refuse(Fault::new(ErrorCode::Unsupported, words));
    };
    let kind = request.headers().get(CONTENT_TYPE).map(HeaderValue::as_bytes);
    if !kind.is_some_and(|kind| kind.starts_with(b"application/grpc")) {
        let words = "this port speaks gRPC; JSON goes through the gateway";
        return refuse(Fault::new(ErrorCode::Unsupported, words));
    }
    let decision = match shared.admission.admit(rpc, &mut call, request.headers()).await {
        Ok(decision) => decision,
        Err(fault) => return refuse(fault),
    };
    if let Some(decision) = decision.filter(|decision| decision.retry_after.is_some()) {
        let mut response = refuse(over_limit(rpc, &call, decision));
        show(decision, response.headers_mut());
        return response;
    }
    request.extensions_mut().insert(call);
    let mut response = next.run(request).await;
    if let Some(decision) = decision {
        show(decision, response.headers_mut());
    }
    response
}

impl Admission {
    pub(crate) fn new(mesh_token: SecretString, auth: Channel, limits: &LimitConfig) -> Self {
        let known = Cache::builder().max_capacity(MOST_REMEMBERED).time_to_live(REMEMBERED).build();
        Admission {
            mesh_token,
            auth: AuthServiceClient::new(auth),
            known,
            limiter: Limiter::new(limits),
            limits: limits.clone(),
        }
    }

    async fn admit(
        &self,
        rpc: &'static Rpc,
        call: &mut Call,
        headers: &HeaderMap,
    ) -> Result<Option<Decision>, Fault> {
        let scope = match rpc.access {
            Access::Public => return Ok(None),
            _ if self.is_mesh(headers) => return Ok(None),
            Access::Mesh => {
                let words =
                    "only services of the mesh call this; present its token as x-mesh-token";
                return Err(Fault::new(ErrorCode::BadKey, words));
            }
            Access::AnyKey => None,
            Access::Scope(scope) => Some(scope),
        };
        let caller = self.caller(call, headers).await?;
        if let Some(scope) =
            scope.filter(|scope| !caller.principal.scopes.iter().any(|has| has == scope))
        {
            let words = format!("this key lacks the scope {scope}, which {} needs", rpc.method());
            return Err(Fault::new(ErrorCode::NoPermission, words));
        }
        call.principal = Some(Arc::clone(&caller.principal));
        let rate = rate(&caller.principal, rpc, &self.limits);
        Ok(self.limiter.decide(&caller.key_id, rpc, rate))
    }

    fn is_mesh(&self, headers: &HeaderMap) -> bool {
        let presented = headers.get(MESH_TOKEN).map(HeaderValue::as_bytes);
        let token = self.mesh_token.expose_secret().as_bytes();
        presented.is_some_and(|presented| presented.ct_eq(token).into())
    }

    async fn caller(&self, call: &Call, headers: &HeaderMap) -> Result<Arc<Caller>, Fault> {
        let digest = presented_digest(headers)?;
        let asked = self.known.try_get_with(digest, self.ask(call, digest)).await;
        let known = asked.map_err(|status| {
            let words = "credentials can't be checked at the moment; try again";
            Fault::new(ErrorCode::DatabaseError, words).because(&*status)
        })?;
        match known {
            Known::Caller(caller) if caller.expires.is_none_or(|end| SystemTime::now() < end) => {
                Ok(caller)
            }
            Known::Refused(ErrorCode::BadKey) => Err(unknown_key()),
            Known::Caller(_) | Known::Refused(_) => {
                let words = "this API key has expired or was revoked; ask for a new one";
                Err(Fault::new(ErrorCode::KeyEnded, words))
            }
        }
    }

    async fn ask(&self, call: &Call, digest: KeyDigest) -> Result<Known, Status> {
        let mut request =
            tonic::Request::new(AuthenticateRequest { credential_digest: digest.into() });
        let token = self.mesh_token.expose_secret().parse();
        request
            .metadata_mut()
            .insert(MESH_TOKEN, token.map_err(|_| Status::internal("mesh token"))?);
        let mut auth = self.auth.clone();
        // Around the whole call: a lazy channel also queues.
        let reply = timeout(left(call.deadline, PATIENCE), auth.authenticate(request)).await;
        match reply.map_err(|_| Status::deadline_exceeded("auth did not answer"))? {
            Ok(reply) => {
                let principal = reply.into_inner().principal;
                let principal = principal.ok_or_else(|| Status::internal("auth named nobody"))?;
                Ok(Known::Caller(Arc::new(Caller {
                    key_id: principal.key_id.as_str().into(),
                    expires: principal.expire_time.and_then(|time| time.try_into().ok()),
                    principal: Arc::new(principal),
                })))
            }
            Err(status) if status.code() == Code::Unauthenticated => match read(&status) {
                Some((code, _)) if code == "E4007" => Ok(Known::Refused(ErrorCode::KeyEnded)),
                // about our own token, and no word about the key
                _ => Err(status),
            },
            Err(status) if status.code() == Code::NotFound => Ok(Known::Refused(ErrorCode::BadKey)),
            Err(status) => Err(status),
        }
    }
}

fn presented_digest(headers: &HeaderMap) -> Result<KeyDigest, Fault> {
    let bearer = headers.get("authorization").and_then(|value| value.to_str().ok());
    let bearer = bearer.and_then(|value| {
        let (scheme, token) = value.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
    });
    let key = headers.get("x-api-key").and_then(|value| value.to_str().ok()).or(bearer);
    let words = "an API key is needed; present it as x-api-key, or as authorization: Bearer";
    let key = key.ok_or_else(|| Fault::new(ErrorCode::BadKey, words))?;
    key_text::digest(key).ok_or_else(unknown_key)
}

fn unknown_key() -> Fault {
    Fault::new(ErrorCode::BadKey, "this API key is not known; check it for typos")
}

fn over_limit(rpc: &Rpc, call: &Call, decision: Decision) -> Fault {
    let key = call.principal.as_ref().map_or("", |principal| &principal.key_id);
    let words = format!("{} may be called {} times in its window", rpc.method(), decision.limit);
    Fault::new(ErrorCode::RateLimited, words)
        .retry_after(decision.retry_after.unwrap_or_default())
        .quota(format!("key:{key}/{}", rpc.method()))
}

/// The IETF draft's names: <https://datatracker.ietf.org/doc/draft-ietf-httpapi-ratelimit-headers/>.
fn show(decision: Decision, headers: &mut HeaderMap) {
    headers.insert("ratelimit-limit", decision.limit.into());
    headers.insert("ratelimit-remaining", decision.remaining.into());
    let seconds = decision.reset.as_secs() + u64::from(decision.reset.subsec_nanos() > 0);
    headers.insert("ratelimit-reset", seconds.into());
}
