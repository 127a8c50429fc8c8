//! The RPCs of sessions: a proof for a pair of tokens, a refresh token for the next pair, the end.

use std::sync::Arc;
use std::time::Duration;

use hapa_core::call::Call;
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
use hapa_store::rate_limit::failed_attempts::PasswordAttempts;
use secrecy::{ExposeSecret as _, SecretString};
use tokio::time::sleep;
use tonic::{Request, Response, Status};

use crate::error::Error;
use crate::identity::Identity;
use crate::password::Passwords;
use crate::pepper::Pepper;
use crate::store::{Attempt, By, Ends, NewSession, NewUser, Refreshed, Store};
use crate::times::in_days;
use crate::token::{Claims, Tokens};
use crate::user::visible;
use crate::{check, ids, login};

const LONGEST_PASSWORD: usize = 1_024;
const LONGEST_REFRESH: usize = 128;
/// How often ended sessions are forgotten, and how long they are kept to tell a late refresh why.
const FORGETTING: Duration = Duration::from_hours(1);
const KEPT: i64 = 30 * DAY;

pub(crate) struct Sessions {
    pub(crate) store: Store,
    pub(crate) pepper: Pepper,
    pub(crate) passwords: Passwords,
    pub(crate) tokens: Arc<Tokens>,
    pub(crate) identity: Option<Identity>,
    pub(crate) access_minutes: u32,
    pub(crate) session_days: u32,
    /// Longest life of a session, however often it is refreshed, in microseconds.
    pub(crate) max_session_life: i64,
}

#[tonic::async_trait]
impl SessionService for Sessions {
    async fn create_session(
        &self,
        request: Request<CreateSessionRequest>,
    ) -> Result<Response<CreateSessionResponse>, Status> {
        let by = By::of(&Call::of(request.extensions())?);
        let attempts = PasswordAttempts::of(request.extensions());
        let (user_id, method) = match login::proof(request.into_inner())? {
            Proof::Password(proof) => {
                let attempt = attempts?.begin(&proof.email).await?;
                let user_id = self.by_password(proof).await;
                if let Err(Error::BadProof) = &user_id {
                    attempt.record_wrong_password().await;
                }
                (user_id?, "password")
            }
            Proof::IdToken(token) => (self.by_token(&by, &token).await?, "identity_provider"),
        };
        let refresh_token = ids::refresh_token();
        let new = NewSession {
            session_id: ids::session(),
            user_id,
            method,
            expire_time: in_days(by.time, self.session_days)
                .min(by.time.saturating_add(self.max_session_life)),
            refresh_hash: self.pepper.hash_text(refresh_token.expose_secret())?,
        };
        let session = self.store.insert_session(by, new).await?;
        let access_token = self.access_token(&session)?.expose_secret().to_owned();
        Ok(Response::new(CreateSessionResponse {
            session: Some(session),
            access_token,
            token_type: "bearer".to_owned(),
            expires_in: self.access_minutes * 60,
            refresh_token: refresh_token.expose_secret().to_owned(),
        }))
    }

    async fn refresh_session(
        &self,
        request: Request<RefreshSessionRequest>,
    ) -> Result<Response<RefreshSessionResponse>, Status> {
        let by = By::of(&Call::of(request.extensions())?);
        let token = check::required("refresh_token", request.into_inner().refresh_token);
        let token = token?;
        if token.len() > LONGEST_REFRESH {
            return Err(Error::BadProof.into());
        }
        let next = ids::refresh_token();
        let hashes = self.pepper.hashes_of_text(&token)?;
        let next_hash = self.pepper.hash_text(next.expose_secret())?;
        let ends =
            Ends { idle: in_days(by.time, self.session_days), max_life: self.max_session_life };
        let session = match self.store.refresh_session(by, hashes, next_hash, ends).await? {
            Refreshed::Session(session) => session,
            Refreshed::Unknown => return Err(Error::BadProof.into()),
            Refreshed::Ended => return Err(Error::Ended.into()),
        };
        let access_token = self.access_token(&session)?.expose_secret().to_owned();
        Ok(Response::new(RefreshSessionResponse {
            session: Some(session),
            access_token,
            token_type: "bearer".to_owned(),
            expires_in: self.access_minutes * 60,
            refresh_token: next.expose_secret().to_owned(),
        }))
    }

    async fn list_sessions(
        &self,
        request: Request<ListSessionsRequest>,
    ) -> Result<Response<ListSessionsResponse>, Status> {
        let call = Call::of(request.extensions())?;
        let user_id = request.into_inner().user_id;
        let user_id = if user_id.is_empty() { "me".to_owned() } else { user_id };
        let user_id = self.existing(visible(&call, user_id)?).await?;
        let sessions = self.store.sessions_of(&user_id, now()).await?;
        Ok(Response::new(ListSessionsResponse { sessions }))
    }

    async fn revoke_session(
        &self,
        request: Request<RevokeSessionRequest>,
    ) -> Result<Response<RevokeSessionResponse>, Status> {
        let call = Call::of(request.extensions())?;
        let RevokeSessionRequest { session_id, all_of_user } = request.into_inner();
        let revoked = match (session_id.is_empty(), all_of_user.is_empty()) {
            (false, true) => {
                let session = self.store.session_by_id(&session_id).await?;
                let session = session.filter(|session| call.may_see(&session.user_id));
                session.ok_or(Error::NoSuch("session"))?;
                self.store.revoke_session(By::of(&call), session_id).await?
            }
            (true, false) => {
                let user_id = self.existing(visible(&call, all_of_user)?).await?;
                self.store.revoke_sessions(By::of(&call), user_id).await?
            }
            _ => {
                let problem = "or all_of_user must be set, and only one of them";
                return Err(Violations::one("session_id", problem).into());
            }
        };
        let revoked_sessions = u32::try_from(revoked).unwrap_or(u32::MAX);
        Ok(Response::new(RevokeSessionResponse { revoked_sessions }))
    }
}

impl Sessions {
    /// An unknown address takes as long as a wrong password, and is told the same.
    async fn by_password(&self, proof: Password) -> Result<String, Error> {
        let mut found = Violations::default();
        let email = check::email(&proof.email, &mut found);
        if proof.password.is_empty() {
            found.missing("password.password");
        } else if proof.password.len() > LONGEST_PASSWORD {
            found.wrong("password.password", "is too long");
        }
        found.check()?;
        let user = self.store.user_by_email(&email).await?;
        let (user, hash) = user.map_or((None, None), |(user, hash)| (Some(user), hash));
        let password = SecretString::from(proof.password);
        let fits = self.passwords.verify(&password, hash.as_deref()).await?;
        user.filter(|_| fits).map(|user| user.user_id).ok_or(Error::BadProof)
    }

    /// Whom the identity provider vouches for: known by its subject, or by its verified address
    /// the first time, or new.
    async fn by_token(&self, by: &By, token: &str) -> Result<String, Error> {
        let provider = self.identity.as_ref().ok_or(Error::NoProvider)?;
        let person = provider.verify(token, by.time / 1_000_000).await?;
        let identity = format!("{} {}", provider.issuer(), person.subject);
        if let Some(user) = self.store.user_by_identity(&identity).await? {
            return Ok(user.user_id);
        }
        // An unverified address may be anyone's. It must not open the account that has it, nor create
        // one: that would take the address from its owner.
        if !person.email_verified {
            let reason = "its address is not verified, and its subject has no account";
            tracing::info!(reason, "an ID token was refused");
            return Err(Error::BadProof);
        }
        if let Some((user, _)) = self.store.user_by_email(&person.email).await? {
            let user_id = user.user_id;
            let tied =
                self.store.tie_identity(by.clone(), user_id.clone(), identity.clone()).await?;
            return if tied { Ok(user_id) } else { self.known_by(&identity).await };
        }
        let user = User {
            user_id: ids::user(),
            email: person.email,
            name: person.name,
            scopes: provider.scopes().to_vec(),
            ..User::default()
        };
        let user_id = user.user_id.clone();
        let new = NewUser {
            user,
            password_hash: None,
            identity: Some(identity.clone()),
            profile: UserProfile::default(),
        };
        let attempt = Attempt { by: by.clone(), request: None };
        match self.store.insert_user(attempt, new, |user| user).await {
            Ok(_) => Ok(user_id),
            Err(Error::EmailTaken) => self.known_by(&identity).await,
            Err(error) => Err(error),
        }
    }

    /// The user that another login of the same person has created or tied meanwhile.
    async fn known_by(&self, identity: &str) -> Result<String, Error> {
        let user = self.store.user_by_identity(identity).await?;
        user.map(|user| user.user_id).ok_or(Error::BadProof)
    }

    fn access_token(&self, session: &Session) -> Result<SecretString, Error> {
        let issue_time = now() / 1_000_000;
        self.tokens.issue(&Claims {
            user_id: session.user_id.clone(),
            session_id: session.session_id.clone(),
            token_id: ids::session(),
            issue_time,
            expire_time: issue_time + i64::from(self.access_minutes) * 60,
        })
    }

    async fn existing(&self, user_id: String) -> Result<String, Error> {
        match self.store.user_by_id(&user_id, now()).await? {
            Some(_) => Ok(user_id),
            None => Err(Error::NoSuch("user")),
        }
    }
}

/// Forgets sessions long after their end, for as long as the server runs. Sessions that were made
/// under a longer SESSION_MAX_DAYS, or none, get the end that this one gives them.
pub(crate) async fn forget(store: Store, max_life: i64) {
    loop {
        let ended = async {
            store.end_sessions_after(max_life).await?;
            store.forget_sessions(now() - KEPT).await
        };
        if let Err(error) = ended.await {
            tracing::warn!(%error, "old sessions were not forgotten; tried again later");
        }
        sleep(FORGETTING).await;
    }
}
