//! `SessionService`: login, token refresh, list and revocation of sessions.

use std::sync::Arc;
use std::time::Duration;

use hapa_core::call::Call;
use hapa_core::password_attempts::PasswordAttempts;
use hapa_core::timestamps::{DAY, now};
use hapa_core::violations::Violations;
use hapa_proto::auth::v1::create_session_request::{Password, Proof};
use hapa_proto::auth::v1::session_service_server::SessionService;
use hapa_proto::auth::v1::{
    CreateSessionRequest, CreateSessionResponse, ListSessionsRequest, ListSessionsResponse,
    RefreshSessionRequest, RefreshSessionResponse, RevokeSessionRequest, RevokeSessionResponse,
    Session, User,
};
use hapa_proto::codegen::v1::UserProfile;
use secrecy::{ExposeSecret as _, SecretString};
use tokio::time::sleep;
use tonic::{Request, Response, Status};

use crate::access_token::{AccessTokenClaims, AccessTokens};
use crate::calendar::add_days;
use crate::error::Error;
use crate::oidc::OidcVerifier;
use crate::password::PasswordHasher;
use crate::pepper::Pepper;
use crate::store::{
    AuditContext, ChangeRequest, NewSession, NewUser, RefreshExpiry, RefreshOutcome, Store,
};
use crate::user::visible_user_id;
use crate::{ids, login, validation};

const MAX_PASSWORD_BYTES: usize = 1_024;
const MAX_REFRESH_TOKEN_BYTES: usize = 128;
const PURGE_INTERVAL: Duration = Duration::from_hours(1);
/// How long ended sessions are kept, in microseconds, so that a late refresh fails with E4007.
const RETENTION_PERIOD: i64 = 30 * DAY;

pub(crate) struct SessionApi {
    pub(crate) store: Store,
    pub(crate) pepper: Pepper,
    pub(crate) password_hasher: PasswordHasher,
    pub(crate) tokens: Arc<AccessTokens>,
    pub(crate) oidc: Option<OidcVerifier>,
    pub(crate) access_token_minutes: u32,
    pub(crate) session_days: u32,
    /// Maximum lifetime of a session, refreshed or not.
    pub(crate) max_session_age_micros: i64,
}

#[tonic::async_trait]
impl SessionService for SessionApi {
    async fn create_session(
        &self,
        request: Request<CreateSessionRequest>,
    ) -> Result<Response<CreateSessionResponse>, Status> {
        let context = AuditContext::from_call(&Call::from_extensions(request.extensions())?);
        let attempts = PasswordAttempts::from_extensions(request.extensions());
        let (user_id, method) = match login::parse_proof(request.into_inner())? {
            Proof::Password(proof) => {
                let attempt = attempts?.begin(&proof.email).await?;
                let user_id = self.log_in_with_password(proof).await;
                if let Err(Error::InvalidLogin) = &user_id {
                    attempt.record_wrong_password().await;
                }
                (user_id?, "password")
            }
            Proof::IdToken(token) => {
                (self.log_in_with_id_token(&context, &token).await?, "identity_provider")
            }
        };
        let refresh_token = ids::new_refresh_token();
        let new_session = NewSession {
            session_id: ids::new_session_id(),
            user_id,
            method,
            expire_time: add_days(context.time, self.session_days)
                .min(context.time.saturating_add(self.max_session_age_micros)),
            refresh_hash: self.pepper.hash_token(refresh_token.expose_secret())?,
        };
        let session = self.store.insert_session(context, new_session).await?;
        let access_token = self.access_token(&session)?.expose_secret().to_owned();
        Ok(Response::new(CreateSessionResponse {
            session: Some(session),
            access_token,
            token_type: "bearer".to_owned(),
            expires_in: self.access_token_minutes * 60,
            refresh_token: refresh_token.expose_secret().to_owned(),
        }))
    }

    async fn refresh_session(
        &self,
        request: Request<RefreshSessionRequest>,
    ) -> Result<Response<RefreshSessionResponse>, Status> {
        let context = AuditContext::from_call(&Call::from_extensions(request.extensions())?);
        let token = validation::required("refresh_token", request.into_inner().refresh_token);
        let token = token?;
        if token.len() > MAX_REFRESH_TOKEN_BYTES {
            return Err(Error::InvalidLogin.into());
        }
        let next_token = ids::new_refresh_token();
        let hashes = self.pepper.hashes_of_token(&token)?;
        let next_hash = self.pepper.hash_token(next_token.expose_secret())?;
        let expiry = RefreshExpiry {
            idle_expire_time: add_days(context.time, self.session_days),
            max_age_micros: self.max_session_age_micros,
        };
        let session = match self.store.refresh_session(context, hashes, next_hash, expiry).await? {
            RefreshOutcome::Session(session) => session,
            RefreshOutcome::UnknownToken => return Err(Error::InvalidLogin.into()),
            RefreshOutcome::SessionEnded => return Err(Error::ExpiredOrRevoked.into()),
        };
        let access_token = self.access_token(&session)?.expose_secret().to_owned();
        Ok(Response::new(RefreshSessionResponse {
            session: Some(session),
            access_token,
            token_type: "bearer".to_owned(),
            expires_in: self.access_token_minutes * 60,
            refresh_token: next_token.expose_secret().to_owned(),
        }))
    }

    async fn list_sessions(
        &self,
        request: Request<ListSessionsRequest>,
    ) -> Result<Response<ListSessionsResponse>, Status> {
        let call = Call::from_extensions(request.extensions())?;
        let user_id = request.into_inner().user_id;
        let user_id = if user_id.is_empty() { "me".to_owned() } else { user_id };
        let user_id = self.existing_user_id(visible_user_id(&call, user_id)?).await?;
        let sessions = self.store.sessions_of(&user_id, now()).await?;
        Ok(Response::new(ListSessionsResponse { sessions }))
    }

    async fn revoke_session(
        &self,
        request: Request<RevokeSessionRequest>,
    ) -> Result<Response<RevokeSessionResponse>, Status> {
        let call = Call::from_extensions(request.extensions())?;
        let RevokeSessionRequest { session_id, all_of_user } = request.into_inner();
        let revoked = match (session_id.is_empty(), all_of_user.is_empty()) {
            (false, true) => {
                let session = self.store.session_by_id(&session_id).await?;
                let session = session.filter(|session| call.may_see(&session.user_id));
                session.ok_or(Error::NotFound("session"))?;
                self.store.revoke_session(AuditContext::from_call(&call), session_id).await?
            }
            (true, false) => {
                let user_id = self.existing_user_id(visible_user_id(&call, all_of_user)?).await?;
                self.store.revoke_sessions(AuditContext::from_call(&call), user_id).await?
            }
            _ => {
                let problem = "or all_of_user must be set, and only one of them";
                return Err(Violations::single("session_id", problem).into());
            }
        };
        let revoked_sessions = u32::try_from(revoked).unwrap_or(u32::MAX);
        Ok(Response::new(RevokeSessionResponse { revoked_sessions }))
    }
}

impl SessionApi {
    /// An unknown email address takes as long as a wrong password and fails with the same error.
    async fn log_in_with_password(&self, proof: Password) -> Result<String, Error> {
        let mut violations = Violations::default();
        let email = validation::email(&proof.email, &mut violations);
        if proof.password.is_empty() {
            violations.add_missing("password.password");
        } else if proof.password.len() > MAX_PASSWORD_BYTES {
            violations.add_invalid("password.password", "is too long");
        }
        violations.check()?;
        let user = self.store.user_by_email(&email).await?;
        let (user, hash) = user.map_or((None, None), |(user, hash)| (Some(user), hash));
        let password = SecretString::from(proof.password);
        let is_correct = self.password_hasher.verify(&password, hash.as_deref()).await?;
        user.filter(|_| is_correct).map(|user| user.user_id).ok_or(Error::InvalidLogin)
    }

    /// The user of a verified ID token: the one linked to its subject, else the one with its verified
    /// email address, which is then linked, else a new one.
    async fn log_in_with_id_token(
        &self,
        context: &AuditContext,
        token: &str,
    ) -> Result<String, Error> {
        let oidc = self.oidc.as_ref().ok_or(Error::OidcNotConfigured)?;
        let verified = oidc.verify(token, context.time / 1_000_000).await?;
        let identity = format!("{} {}", oidc.issuer(), verified.subject);
        if let Some(user) = self.store.user_by_identity(&identity).await? {
            return Ok(user.user_id);
        }
        // An unverified address may belong to somebody else. It must not give access to the account
        // with that address, and must not create one: that would take the address from its owner.
        if !verified.email_verified {
            let reason = "email address is not verified, and the subject has no account";
            tracing::info!(reason, "rejected an ID token");
            return Err(Error::InvalidLogin);
        }
        if let Some((user, _)) = self.store.user_by_email(&verified.email).await? {
            let user_id = user.user_id;
            let is_linked = self
                .store
                .link_identity(context.clone(), user_id.clone(), identity.clone())
                .await?;
            return if is_linked { Ok(user_id) } else { self.linked_user_id(&identity).await };
        }
        let user = User {
            user_id: ids::new_user_id(),
            email: verified.email,
            name: verified.name,
            scopes: oidc.scopes().to_vec(),
            ..User::default()
        };
        let user_id = user.user_id.clone();
        let new_user = NewUser {
            user,
            password_hash: None,
            identity: Some(identity.clone()),
            profile: UserProfile::default(),
        };
        let change = ChangeRequest { context: context.clone(), idempotency: None };
        match self.store.insert_user(change, new_user, |user| user).await {
            Ok(_) => Ok(user_id),
            Err(Error::EmailTaken) => self.linked_user_id(&identity).await,
            Err(error) => Err(error),
        }
    }

    /// The user that a concurrent login with the same identity has created or linked.
    async fn linked_user_id(&self, identity: &str) -> Result<String, Error> {
        let user = self.store.user_by_identity(identity).await?;
        user.map(|user| user.user_id).ok_or(Error::InvalidLogin)
    }

    fn access_token(&self, session: &Session) -> Result<SecretString, Error> {
        let issue_time = now() / 1_000_000;
        self.tokens.issue(&AccessTokenClaims {
            user_id: session.user_id.clone(),
            session_id: session.session_id.clone(),
            token_id: ids::new_session_id(),
            issue_time,
            expire_time: issue_time + i64::from(self.access_token_minutes) * 60,
        })
    }

    async fn existing_user_id(&self, user_id: String) -> Result<String, Error> {
        match self.store.user_by_id(&user_id, now()).await? {
            Some(_) => Ok(user_id),
            None => Err(Error::NotFound("user")),
        }
    }
}

/// Every [`PURGE_INTERVAL`], deletes sessions that ended [`RETENTION_PERIOD`] ago. Before that, it
/// shortens sessions that were created under a longer SESSION_MAX_DAYS to the current maximum.
pub(crate) async fn purge_ended_sessions(store: Store, max_age_micros: i64) {
    loop {
        let purge = async {
            store.cap_session_age(max_age_micros).await?;
            store.delete_sessions_ended_before(now() - RETENTION_PERIOD).await
        };
        if let Err(error) = purge.await {
            tracing::warn!(%error, "cannot purge ended sessions; next attempt in an hour");
        }
        sleep(PURGE_INTERVAL).await;
    }
}
