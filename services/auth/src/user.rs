//! `UserService`: the RPCs of users and their profiles.

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
use crate::idempotency::RequestIdempotency;
use crate::password::PasswordHasher;
use crate::pepper::Pepper;
use crate::store::{AuditContext, ChangeRequest, NewUser, Store, UserChanges};
use crate::{ids, validation};

const UPDATABLE_FIELDS: &[&str] = &["email", "name", "password", "scopes", "token_budget"];
/// Fields that a user may update without being an admin.
const SELF_UPDATABLE_FIELDS: &[&str] = &["name", "password"];

pub(crate) struct UserApi {
    pub(crate) store: Store,
    pub(crate) pepper: Pepper,
    pub(crate) password_hasher: PasswordHasher,
}

#[tonic::async_trait]
impl UserService for UserApi {
    async fn create_user(
        &self,
        request: Request<CreateUserRequest>,
    ) -> Result<Response<CreateUserResponse>, Status> {
        let call = Call::from_extensions(request.extensions())?;
        let idempotency = RequestIdempotency::from_request(&request, &self.pepper)?;
        let change = ChangeRequest { context: AuditContext::from_call(&call), idempotency };
        // Checked before the password is hashed, which is expensive.
        if let Some(reply) = self.store.first_reply(&change).await? {
            return Ok(reply);
        }
        let mut request = request.into_inner();
        let email = validate_create(&request)?;
        let password = std::mem::take(&mut request.password);
        let password_hash = self.hash_password(password).await?;
        let user = User {
            user_id: ids::new_user_id(),
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
        let new_user = NewUser { user, password_hash, identity: None, profile };
        let reply = |user| CreateUserResponse { user: Some(user) };
        Ok(self.store.insert_user(change, new_user, reply).await?)
    }

    async fn get_user(
        &self,
        request: Request<GetUserRequest>,
    ) -> Result<Response<GetUserResponse>, Status> {
        let call = Call::from_extensions(request.extensions())?;
        let user_id = visible_user_id(&call, request.into_inner().user_id)?;
        let user = Some(self.required_user(&user_id).await?);
        Ok(Response::new(GetUserResponse { user }))
    }

    async fn list_users(
        &self,
        request: Request<ListUsersRequest>,
    ) -> Result<Response<ListUsersResponse>, Status> {
        let request = request.into_inner();
        let size = pagination::page_size(request.page_size)?;
        let after = pagination::parse_page_token(&request.page_token)?;
        let email = request.email.trim().to_lowercase();
        let users = self.store.users_page(&email, &after, size + 1).await?;
        let (mut users, has_more) = pagination::split_page(users, size);
        let payers: Vec<_> = users.iter().map(|user| format!("user:{}", user.user_id)).collect();
        for (user, usage) in users.iter_mut().zip(self.store.token_usage(&payers, now()).await?) {
            user.token_usage = Some(usage);
        }
        let create_time = |user: &User| user.create_time.as_ref().map_or(0, micros);
        let token = |user: &User| pagination::page_token(create_time(user), &user.user_id);
        let next_page_token = users.last().filter(|_| has_more).map(token).unwrap_or_default();
        Ok(Response::new(ListUsersResponse { users, next_page_token }))
    }

    async fn update_user(
        &self,
        request: Request<UpdateUserRequest>,
    ) -> Result<Response<UpdateUserResponse>, Status> {
        let call = Call::from_extensions(request.extensions())?;
        let mut request = request.into_inner();
        let user_id = visible_user_id(&call, std::mem::take(&mut request.user_id))?;
        let current = std::mem::take(&mut request.current_password);
        let (mut changes, password) = parse_update(&call, request)?;
        if let Some(password) = password {
            if !call.is_admin() {
                self.verify_password(&user_id, current).await?;
            }
            changes.password_hash = self.hash_password(password).await?;
        }
        self.store.update_user(AuditContext::from_call(&call), user_id.clone(), changes).await?;
        let user = Some(self.required_user(&user_id).await?);
        Ok(Response::new(UpdateUserResponse { user }))
    }

    async fn delete_user(
        &self,
        request: Request<DeleteUserRequest>,
    ) -> Result<Response<DeleteUserResponse>, Status> {
        let call = Call::from_extensions(request.extensions())?;
        let user_id = visible_user_id(&call, request.into_inner().user_id)?;
        let (keys, sessions) =
            self.store.delete_user(AuditContext::from_call(&call), user_id).await?;
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
        let call = Call::from_extensions(request.extensions())?;
        let user_id = visible_user_id(&call, request.into_inner().user_id)?;
        let profile = self.store.profile(&user_id).await?;
        let profile = Some(profile.ok_or(Error::NotFound("user"))?);
        Ok(Response::new(GetProfileResponse { profile }))
    }

    async fn update_profile(
        &self,
        request: Request<UpdateProfileRequest>,
    ) -> Result<Response<UpdateProfileResponse>, Status> {
        let call = Call::from_extensions(request.extensions())?;
        let request = request.into_inner();
        let user_id = visible_user_id(&call, request.user_id)?;
        let (profile, mut violations) =
            (request.profile.unwrap_or_default(), Violations::default());
        violations.extend(user_profile::violations(&profile));
        violations.check()?;
        self.store.set_profile(AuditContext::from_call(&call), user_id, profile.clone()).await?;
        Ok(Response::new(UpdateProfileResponse { profile: Some(profile) }))
    }
}

impl UserApi {
    async fn required_user(&self, user_id: &str) -> Result<User, Error> {
        self.store.user_by_id(user_id, now()).await?.ok_or(Error::NotFound("user"))
    }

    async fn hash_password(&self, password: String) -> Result<Option<String>, Error> {
        if password.is_empty() {
            return Ok(None);
        }
        Ok(Some(self.password_hasher.hash(&SecretString::from(password)).await?))
    }

    async fn verify_password(&self, user_id: &str, password: String) -> Result<(), Error> {
        let user = self.store.user_by_id(user_id, now()).await?;
        let user = user.ok_or(Error::NotFound("user"))?;
        let (_, hash) = self.store.user_by_email(&user.email).await?.unwrap_or((user, None));
        let password = SecretString::from(password);
        if self.password_hasher.verify(&password, hash.as_deref()).await? {
            return Ok(());
        }
        Err(Error::WrongPassword)
    }
}

/// The requested user id, if the caller may see that user; `me` is the caller itself.
pub(crate) fn visible_user_id(call: &Call, user_id: String) -> Result<String, Error> {
    let user_id = validation::required("user_id", user_id)?;
    let own_user_id = call.principal.as_ref().map(|caller| caller.user_id.clone());
    let own_user_id = own_user_id.filter(|own_user_id| !own_user_id.is_empty());
    if user_id == "me" {
        let problem = "must be a user id: this credential belongs to no user";
        return own_user_id.ok_or_else(|| Error::from(Violations::single("user_id", problem)));
    }
    if call.is_admin() || own_user_id.as_ref() == Some(&user_id) {
        return Ok(user_id);
    }
    Err(Error::NotFound("user"))
}

fn validate_create(request: &CreateUserRequest) -> Result<String, Violations> {
    let mut violations = Violations::default();
    let email = validation::email(&request.email, &mut violations);
    if !request.name.is_empty() {
        validation::name("name", &request.name, &mut violations);
    }
    if !request.password.is_empty() {
        validation::password(&request.password, &mut violations);
    }
    validation::scopes(&request.scopes, &mut violations);
    validation::token_budget(request.token_budget.as_ref(), &mut violations);
    if let Some(profile) = &request.profile {
        violations.extend(user_profile::violations(profile));
    }
    violations.check()?;
    Ok(email)
}

/// The changes of an update, and the new password if it sets one.
fn parse_update(
    call: &Call,
    request: UpdateUserRequest,
) -> Result<(UserChanges, Option<String>), Error> {
    let mut violations = Violations::default();
    let paths = validation::update_mask(request.update_mask, UPDATABLE_FIELDS, &mut violations);
    let (mut changes, mut password) = (UserChanges::default(), None);
    for path in &paths {
        match path.as_str() {
            "email" => changes.email = Some(validation::email(&request.email, &mut violations)),
            "name" => {
                validation::name("name", &request.name, &mut violations);
                changes.name = Some(request.name.clone());
            }
            "password" => {
                validation::password(&request.password, &mut violations);
                password = Some(request.password.clone());
            }
            "scopes" => {
                validation::scopes(&request.scopes, &mut violations);
                changes.scopes = Some(request.scopes.clone());
            }
            _ => {
                validation::token_budget(request.token_budget.as_ref(), &mut violations);
                changes.token_budget = Some(request.token_budget.unwrap_or_default());
            }
        }
    }
    violations.check()?;
    let is_admin_only = |field: &&str| {
        !SELF_UPDATABLE_FIELDS.contains(field) && paths.iter().any(|path| path == field)
    };
    if let Some(field) =
        UPDATABLE_FIELDS.iter().copied().find(is_admin_only).filter(|_| !call.is_admin())
    {
        return Err(Error::AdminRequired(field));
    }
    Ok((changes, password))
}
