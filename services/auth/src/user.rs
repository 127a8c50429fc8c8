//! The RPCs of users and their profiles.

use hapa_core::access::DEFAULT_SCOPES;
use hapa_core::call::Call;
use hapa_core::pagination;
use hapa_core::timestamps::{micros, now};
use hapa_core::violations::Violations;
use hapa_proto::auth::v1::user_service_server::UserService;
use hapa_proto::auth::v1::{
    CreateUserRequest, CreateUserResponse, DeleteUserRequest, DeleteUserResponse,
    GetProfileRequest, GetProfileResponse, GetUserRequest, GetUserResponse, ListUsersRequest,
    ListUsersResponse, UpdateProfileRequest, UpdateProfileResponse, UpdateUserRequest,
    UpdateUserResponse, User,
};
use hapa_proto::user_profile;
use secrecy::SecretString;
use tonic::{Request, Response, Status};

use crate::error::Error;
use crate::idempotency::Repeatable;
use crate::password::Passwords;
use crate::pepper::Pepper;
use crate::store::{Attempt, By, NewUser, Store, UserChanges};
use crate::{check, ids};

const MUTABLE: &[&str] = &["email", "name", "password", "scopes", "token_budget"];
/// What a user may change about itself.
const OWN: &[&str] = &["name", "password"];

pub(crate) struct Users {
    pub(crate) store: Store,
    pub(crate) pepper: Pepper,
    pub(crate) passwords: Passwords,
}

#[tonic::async_trait]
impl UserService for Users {
    async fn create_user(
        &self,
        request: Request<CreateUserRequest>,
    ) -> Result<Response<CreateUserResponse>, Status> {
        let call = Call::of(request.extensions())?;
        let repeatable = Repeatable::of(&request, &self.pepper)?;
        let attempt = Attempt { by: By::of(&call), request: repeatable };
        // Before the password is hashed, which is the dear part.
        if let Some(reply) = self.store.first_reply(&attempt).await? {
            return Ok(reply);
        }
        let mut request = request.into_inner();
        let email = check_new(&request)?;
        let password = std::mem::take(&mut request.password);
        let password_hash = self.hash(password).await?;
        let user = User {
            user_id: ids::user(),
            name: if request.name.is_empty() { email.clone() } else { request.name },
            email,
            scopes: if request.scopes.is_empty() {
                DEFAULT_SCOPES.iter().map(|&scope| scope.to_owned()).collect()
            } else {
                request.scopes
            },
            token_budget: request.token_budget,
            ..User::default()
        };
        let profile = request.profile.unwrap_or_default();
        let new = NewUser { user, password_hash, identity: None, profile };
        let reply = |user| CreateUserResponse { user: Some(user) };
        Ok(self.store.insert_user(attempt, new, reply).await?)
    }

    async fn get_user(
        &self,
        request: Request<GetUserRequest>,
    ) -> Result<Response<GetUserResponse>, Status> {
        let call = Call::of(request.extensions())?;
        let user_id = visible(&call, request.into_inner().user_id)?;
        let user = Some(self.shown(&user_id).await?);
        Ok(Response::new(GetUserResponse { user }))
    }

    async fn list_users(
        &self,
        request: Request<ListUsersRequest>,
    ) -> Result<Response<ListUsersResponse>, Status> {
        let request = request.into_inner();
        let size = pagination::size(request.page_size)?;
        let after = pagination::after(&request.page_token)?;
        let email = request.email.trim().to_lowercase();
        let users = self.store.users_page(&email, &after, size + 1).await?;
        let (mut users, more) = pagination::cut(users, size);
        let payers: Vec<_> = users.iter().map(|user| format!("user:{}", user.user_id)).collect();
        for (user, usage) in users.iter_mut().zip(self.store.usage(&payers, now()).await?) {
            user.token_usage = Some(usage);
        }
        let created = |user: &User| user.create_time.as_ref().map_or(0, micros);
        let token = |user: &User| pagination::token(created(user), &user.user_id);
        let next_page_token = users.last().filter(|_| more).map(token).unwrap_or_default();
        Ok(Response::new(ListUsersResponse { users, next_page_token }))
    }

    async fn update_user(
        &self,
        request: Request<UpdateUserRequest>,
    ) -> Result<Response<UpdateUserResponse>, Status> {
        let call = Call::of(request.extensions())?;
        let mut request = request.into_inner();
        let user_id = visible(&call, std::mem::take(&mut request.user_id))?;
        let current = std::mem::take(&mut request.current_password);
        let (mut changes, password) = changes(&call, request)?;
        if let Some(password) = password {
            if !call.is_admin() {
                self.check_password(&user_id, current).await?;
            }
            changes.password_hash = self.hash(password).await?;
        }
        self.store.update_user(By::of(&call), user_id.clone(), changes).await?;
        let user = Some(self.shown(&user_id).await?);
        Ok(Response::new(UpdateUserResponse { user }))
    }

    async fn delete_user(
        &self,
        request: Request<DeleteUserRequest>,
    ) -> Result<Response<DeleteUserResponse>, Status> {
        let call = Call::of(request.extensions())?;
        let user_id = visible(&call, request.into_inner().user_id)?;
        let (keys, sessions) = self.store.delete_user(By::of(&call), user_id).await?;
        let count = |number| u32::try_from(number).unwrap_or(u32::MAX);
        Ok(Response::new(DeleteUserResponse {
            revoked_keys: count(keys),
            revoked_sessions: count(sessions),
        }))
    }

    async fn get_profile(
        &self,
        request: Request<GetProfileRequest>,
    ) -> Result<Response<GetProfileResponse>, Status> {
        let call = Call::of(request.extensions())?;
        let user_id = visible(&call, request.into_inner().user_id)?;
        let profile = self.store.profile(&user_id).await?;
        let profile = Some(profile.ok_or(Error::NoSuch("user"))?);
        Ok(Response::new(GetProfileResponse { profile }))
    }

    async fn update_profile(
        &self,
        request: Request<UpdateProfileRequest>,
    ) -> Result<Response<UpdateProfileResponse>, Status> {
        let call = Call::of(request.extensions())?;
        let request = request.into_inner();
        let user_id = visible(&call, request.user_id)?;
        let (profile, mut found) = (request.profile.unwrap_or_default(), Violations::default());
        found.extend(user_profile::violations(&profile));
        found.check()?;
        self.store.set_profile(By::of(&call), user_id, profile.clone()).await?;
        Ok(Response::new(UpdateProfileResponse { profile: Some(profile) }))
    }
}

impl Users {
    async fn shown(&self, user_id: &str) -> Result<User, Error> {
        self.store.user_by_id(user_id, now()).await?.ok_or(Error::NoSuch("user"))
    }

    async fn hash(&self, password: String) -> Result<Option<String>, Error> {
        if password.is_empty() {
            return Ok(None);
        }
        Ok(Some(self.passwords.hash(&SecretString::from(password)).await?))
    }

    async fn check_password(&self, user_id: &str, password: String) -> Result<(), Error> {
        let user = self.store.user_by_id(user_id, now()).await?;
        let user = user.ok_or(Error::NoSuch("user"))?;
        let (_, hash) = self.store.user_by_email(&user.email).await?.unwrap_or((user, None));
        let password = SecretString::from(password);
        if self.passwords.verify(&password, hash.as_deref()).await? {
            return Ok(());
        }
        Err(Error::BadPassword)
    }
}

/// The user that is meant, where the caller may see it.
pub(crate) fn visible(call: &Call, user_id: String) -> Result<String, Error> {
    let user_id = check::required("user_id", user_id)?;
    let own = call.principal.as_ref().map(|caller| caller.user_id.clone());
    let own = own.filter(|own| !own.is_empty());
    if user_id == "me" {
        let words = "this credential belongs to no user; name one";
        return own.ok_or_else(|| Error::from(Violations::one("user_id", words)));
    }
    if call.is_admin() || own.as_ref() == Some(&user_id) {
        return Ok(user_id);
    }
    Err(Error::NoSuch("user"))
}

fn check_new(request: &CreateUserRequest) -> Result<String, Violations> {
    let mut found = Violations::default();
    let email = check::email(&request.email, &mut found);
    if !request.name.is_empty() {
        check::name("name", &request.name, &mut found);
    }
    if !request.password.is_empty() {
        check::password(&request.password, &mut found);
    }
    check::scopes(&request.scopes, &mut found);
    check::budget(request.token_budget.as_ref(), &mut found);
    if let Some(given) = &request.profile {
        found.extend(user_profile::violations(given));
    }
    found.check()?;
    Ok(email)
}

/// What to set, and the new password where one is.
fn changes(
    call: &Call,
    request: UpdateUserRequest,
) -> Result<(UserChanges, Option<String>), Error> {
    let mut found = Violations::default();
    let paths = check::mask(request.update_mask, MUTABLE, &mut found);
    let (mut changes, mut password) = (UserChanges::default(), None);
    for path in &paths {
        match path.as_str() {
            "email" => changes.email = Some(check::email(&request.email, &mut found)),
            "name" => {
                check::name("name", &request.name, &mut found);
                changes.name = Some(request.name.clone());
            }
            "password" => {
                check::password(&request.password, &mut found);
                password = Some(request.password.clone());
            }
            "scopes" => {
                check::scopes(&request.scopes, &mut found);
                changes.scopes = Some(request.scopes.clone());
            }
            _ => {
                check::budget(request.token_budget.as_ref(), &mut found);
                changes.token_budget = Some(request.token_budget.unwrap_or_default());
            }
        }
    }
    found.check()?;
    let is_foreign = |field: &&str| !OWN.contains(field) && paths.iter().any(|path| path == field);
    if let Some(field) = MUTABLE.iter().copied().find(is_foreign).filter(|_| !call.is_admin()) {
        return Err(Error::NotAllowed(field));
    }
    Ok((changes, password))
}
