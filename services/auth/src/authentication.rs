//! `AuthService`: the RPCs that other services call to authenticate credentials, to follow revocations,
//! and to reserve and settle tokens.

use std::pin::Pin;
use std::sync::Arc;

use futures_util::Stream;
use hapa_core::timestamps::{now, timestamp};
use hapa_core::violations::Violations;
use hapa_proto::auth::v1::auth_service_server::AuthService;
use hapa_proto::auth::v1::{
    AuthenticateRequest, AuthenticateResponse, Principal, ReserveTokensRequest,
    ReserveTokensResponse, SettleTokensRequest, SettleTokensResponse, WatchRevocationsRequest,
    WatchRevocationsResponse,
};
use tonic::{Request, Response, Status};

use crate::access_token::AccessTokens;
use crate::budget;
use crate::error::Error;
use crate::last_used::LastUsedTracker;
use crate::pepper::Pepper;
use crate::revocation_feed::RevocationFeed;
use crate::store::{ActiveSession, KeyWithOwner, Store, UserRef};

pub(crate) struct AuthApi {
    pub(crate) store: Store,
    pub(crate) pepper: Pepper,
    pub(crate) tokens: Arc<AccessTokens>,
    /// Maximum lifetime of a session, refreshed or not.
    pub(crate) max_session_age_micros: i64,
    pub(crate) last_used: LastUsedTracker,
    pub(crate) revocation_feed: RevocationFeed,
}

type RevocationStream =
    Pin<Box<dyn Stream<Item = Result<WatchRevocationsResponse, Status>> + Send>>;

#[tonic::async_trait]
impl AuthService for AuthApi {
    type WatchRevocationsStream = RevocationStream;

    async fn authenticate(
        &self,
        request: Request<AuthenticateRequest>,
    ) -> Result<Response<AuthenticateResponse>, Status> {
        let AuthenticateRequest { credential_digest, session_token } = request.into_inner();
        let response = match (credential_digest.len(), session_token.is_empty()) {
            (32, true) => self.authenticate_key(&credential_digest).await?,
            (0, false) => self.authenticate_session(&session_token).await?,
            _ => {
                let problem = "must be a SHA-256 digest, 32 bytes, unless session_token is set";
                return Err(Violations::single("credential_digest", problem).into());
            }
        };
        Ok(Response::new(response))
    }

    async fn watch_revocations(
        &self,
        request: Request<WatchRevocationsRequest>,
    ) -> Result<Response<RevocationStream>, Status> {
        let after = request.into_inner().after_generation;
        Ok(Response::new(Box::pin(self.revocation_feed.clone().subscribe(after))))
    }

    async fn reserve_tokens(
        &self,
        request: Request<ReserveTokensRequest>,
    ) -> Result<Response<ReserveTokensResponse>, Status> {
        budget::reserve(&self.store, request.into_inner()).await?;
        Ok(Response::new(ReserveTokensResponse {}))
    }

    async fn settle_tokens(
        &self,
        request: Request<SettleTokensRequest>,
    ) -> Result<Response<SettleTokensResponse>, Status> {
        budget::settle(&self.store, request.into_inner()).await?;
        Ok(Response::new(SettleTokensResponse {}))
    }
}

impl AuthApi {
    async fn authenticate_key(&self, digest: &[u8]) -> Result<AuthenticateResponse, Error> {
        let hashes = self.pepper.hashes(digest)?;
        let key_with_owner =
            self.store.key_by_hash(&hashes).await?.ok_or(Error::UnknownCredential)?;
        let has_expired = key_with_owner.expire_time.is_some_and(|end| end <= now());
        if has_expired || key_with_owner.key.revoke_time.is_some() {
            return Err(Error::ExpiredOrRevoked);
        }
        self.last_used.record(hashes);
        let generation = key_with_owner.generation;
        Ok(AuthenticateResponse { principal: Some(key_principal(key_with_owner)), generation })
    }

    async fn authenticate_session(&self, token: &str) -> Result<AuthenticateResponse, Error> {
        let now = now();
        let claims = self.tokens.verify(token, now / 1_000_000).ok_or(Error::UnknownCredential)?;
        // A session that is not in the store ended long ago and was purged.
        let session =
            self.store.active_session(&claims.session_id).await?.ok_or(Error::ExpiredOrRevoked)?;
        let session_expire_time = session
            .expire_time
            .min(session.create_time.saturating_add(self.max_session_age_micros));
        if session.is_revoked
            || session_expire_time <= now
            || session.user.user_id != claims.user_id
        {
            return Err(Error::ExpiredOrRevoked);
        }
        let expire_time = session_expire_time.min(claims.expire_time.saturating_mul(1_000_000));
        let generation = session.generation;
        let principal = session_principal(session, claims.session_id, expire_time);
        Ok(AuthenticateResponse { principal: Some(principal), generation })
    }
}

fn key_principal(key_with_owner: KeyWithOwner) -> Principal {
    let KeyWithOwner { key, expire_time, user, .. } = key_with_owner;
    let mut scopes = key.scopes;
    // The key of a user never has a scope that the user lacks.
    if let Some(user) = &user {
        scopes.retain(|scope| user.scopes.contains(scope));
    }
    Principal {
        key_id: key.key_id,
        owner: key.owner,
        scopes,
        rate_limits: key.rate_limits,
        allowed_models: key.allowed_models,
        expire_time: expire_time.map(timestamp),
        has_token_budget: key.token_budget.is_some()
            || user.as_ref().is_some_and(|user| user.has_budget),
        user_id: user.as_ref().map(|user| user.user_id.clone()).unwrap_or_default(),
        profile: user.and_then(|user| user.profile),
        ..Principal::default()
    }
}

fn session_principal(session: ActiveSession, session_id: String, expire_time: i64) -> Principal {
    let UserRef { user_id, scopes, profile, has_budget } = session.user;
    Principal {
        owner: user_id.clone(),
        user_id,
        session_id,
        scopes,
        profile,
        has_token_budget: has_budget,
        expire_time: Some(timestamp(expire_time)),
        ..Principal::default()
    }
}
