//! The RPCs of the mesh: who presented a credential, what has changed since, and what may be spent.

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

use crate::budget;
use crate::error::Error;
use crate::last_use::Uses;
use crate::pepper::Pepper;
use crate::revocation::News;
use crate::store::{Known, Live, Store, Who};
use crate::token::Tokens;

pub(crate) struct Credentials {
    pub(crate) store: Store,
    pub(crate) pepper: Pepper,
    pub(crate) tokens: Arc<Tokens>,
    /// Longest life of a session, in microseconds.
    pub(crate) max_session_life: i64,
    pub(crate) uses: Uses,
    pub(crate) news: News,
}

type Revocations = Pin<Box<dyn Stream<Item = Result<WatchRevocationsResponse, Status>> + Send>>;

#[tonic::async_trait]
impl AuthService for Credentials {
    type WatchRevocationsStream = Revocations;

    async fn authenticate(
        &self,
        request: Request<AuthenticateRequest>,
    ) -> Result<Response<AuthenticateResponse>, Status> {
        let AuthenticateRequest { credential_digest, session_token } = request.into_inner();
        let answer = match (credential_digest.len(), session_token.is_empty()) {
            (32, true) => self.key(&credential_digest).await?,
            (0, false) => self.session(&session_token).await?,
            _ => {
                let problem = "must be a SHA-256 digest, 32 bytes, unless session_token is set";
                return Err(Violations::one("credential_digest", problem).into());
            }
        };
        Ok(Response::new(answer))
    }

    async fn watch_revocations(
        &self,
        request: Request<WatchRevocationsRequest>,
    ) -> Result<Response<Revocations>, Status> {
        let after = request.into_inner().after_generation;
        Ok(Response::new(Box::pin(self.news.clone().since(after))))
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

impl Credentials {
    async fn key(&self, digest: &[u8]) -> Result<AuthenticateResponse, Error> {
        let hashes = self.pepper.hashes(digest)?;
        let found = self.store.key_by_hash(&hashes).await?.ok_or(Error::UnknownCredential)?;
        let expired = found.expire_time.is_some_and(|end| end <= now());
        if expired || found.key.revoke_time.is_some() {
            return Err(Error::Ended);
        }
        self.uses.note(hashes);
        let generation = found.generation;
        Ok(AuthenticateResponse { principal: Some(key_principal(found)), generation })
    }

    async fn session(&self, token: &str) -> Result<AuthenticateResponse, Error> {
        let now = now();
        let claims = self.tokens.verify(token, now / 1_000_000).ok_or(Error::UnknownCredential)?;
        // A session that is forgotten ended long ago.
        let live = self.store.live_session(&claims.session_id).await?.ok_or(Error::Ended)?;
        let session_end =
            live.expire_time.min(live.create_time.saturating_add(self.max_session_life));
        if live.revoked || session_end <= now || live.who.user_id != claims.user_id {
            return Err(Error::Ended);
        }
        let expire_time = session_end.min(claims.expire_time.saturating_mul(1_000_000));
        let generation = live.generation;
        let principal = session_principal(live, claims.session_id, expire_time);
        Ok(AuthenticateResponse { principal: Some(principal), generation })
    }
}

fn key_principal(found: Known) -> Principal {
    let Known { key, expire_time, user, .. } = found;
    let mut scopes = key.scopes;
    // A key of a user may at most what the user may.
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

fn session_principal(live: Live, session_id: String, expire_time: i64) -> Principal {
    let Who { user_id, scopes, profile, has_budget } = live.who;
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
