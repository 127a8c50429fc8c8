//! `KeyService`: the RPCs of API keys. The secret of a key is returned by CreateKey and RotateKey
//! only.

use hapa_core::call::Call;
use hapa_core::timestamps::{micros, now, timestamp};
use hapa_core::violations::Violations;
use hapa_core::{key_format, pagination};
use hapa_proto::auth::v1::create_key_request::Expiry;
use hapa_proto::auth::v1::key_service_server::KeyService;
use hapa_proto::auth::v1::{
    CreateKeyRequest, CreateKeyResponse, GetKeyRequest, GetKeyResponse, Key, ListKeysRequest,
    ListKeysResponse, RevokeKeyRequest, RevokeKeyResponse, RotateKeyRequest, RotateKeyResponse,
    UpdateKeyRequest, UpdateKeyResponse,
};
use secrecy::ExposeSecret as _;
use tonic::{Request, Response, Status};

use crate::calendar::{add_days, add_seconds};
use crate::error::Error;
use crate::idempotency::RequestIdempotency;
use crate::pepper::Pepper;
use crate::store::{
    AuditContext, ChangeRequest, ExpiryChange, KeyChanges, KeyFilter, NewSecret, Store,
};
use crate::validation;

const MAX_TTL_DAYS: u32 = 3_650;
const MAX_OVERLAP_SECONDS: u32 = 2_592_000;
const DEFAULT_OVERLAP_SECONDS: u32 = 86_400;
const KEY_STATES: &[&str] = &["", "active", "expired", "revoked"];
const UPDATABLE_FIELDS: &[&str] =
    &["name", "scopes", "expire_time", "rate_limits", "allowed_models", "token_budget"];

pub(crate) struct KeyApi {
    pub(crate) store: Store,
    pub(crate) pepper: Pepper,
    pub(crate) default_expiry_days: u32,
}

#[tonic::async_trait]
impl KeyService for KeyApi {
    async fn create_key(
        &self,
        request: Request<CreateKeyRequest>,
    ) -> Result<Response<CreateKeyResponse>, Status> {
        let call = Call::from_extensions(request.extensions())?;
        let idempotency = RequestIdempotency::from_request(&request, &self.pepper)?;
        let change = ChangeRequest { context: AuditContext::from_call(&call), idempotency };
        let (now, first_reply) = (change.context.time, self.store.first_reply(&change).await?);
        let mut request = request.into_inner();
        let session = call.principal.as_ref().filter(|caller| !caller.session_id.is_empty());
        if let Some(session) = session.filter(|_| request.owner.is_empty()) {
            request.owner.clone_from(&session.owner);
        }
        // A repeated request is not validated again: its expire_time may have passed since.
        if first_reply.is_none() {
            validate_create(&request, now)?;
        }
        check_grant(&call, &request.scopes, !request.rate_limits.is_empty())?;
        if !call.may_see(&request.owner) {
            return Err(Error::AdminRequired("a key of another owner").into());
        }
        if let Some(reply) = first_reply {
            return Ok(reply);
        }
        let expire_time = match request.expiry {
            Some(Expiry::ExpireTime(time)) => Some(time),
            Some(Expiry::TtlDays(days)) => Some(timestamp(add_days(now, days))),
            Some(Expiry::NeverExpires(_)) => None,
            None => Some(timestamp(add_days(now, self.default_expiry_days))),
        };
        let (key_id, key_secret) = key_format::mint();
        let key = Key {
            key_id,
            name: request.name,
            owner: request.owner,
            scopes: request.scopes,
            rate_limits: request.rate_limits,
            allowed_models: request.allowed_models,
            create_time: Some(timestamp(now)),
            expire_time,
            token_budget: request.token_budget,
            ..Key::default()
        };
        let hash = self.pepper.hash_key(&key_secret)?;
        let reply = move |key| {
            let key_text = key_secret.expose_secret().to_owned();
            CreateKeyResponse { key: Some(key), key_text }
        };
        Ok(self.store.insert_key(change, key, hash, reply).await?)
    }

    async fn list_keys(
        &self,
        request: Request<ListKeysRequest>,
    ) -> Result<Response<ListKeysResponse>, Status> {
        let call = Call::from_extensions(request.extensions())?;
        let request = request.into_inner();
        if !KEY_STATES.contains(&request.state.as_str()) {
            let problem = "must be active, expired, revoked or empty";
            return Err(Violations::single("state", problem).into());
        }
        let size = pagination::page_size(request.page_size)?;
        let after = pagination::parse_page_token(&request.page_token)?;
        let owner = match &call.principal {
            Some(caller) if !call.is_admin() => {
                if !request.owner.is_empty() && request.owner != caller.owner {
                    return Ok(Response::new(ListKeysResponse::default()));
                }
                caller.owner.clone()
            }
            _ => request.owner,
        };
        let filter = KeyFilter { owner, state: request.state, scope: request.scope, now: now() };
        let keys = self.store.keys_page(&filter, &after, size + 1).await?;
        let (mut keys, has_more) = pagination::split_page(keys, size);
        let payers: Vec<_> = keys.iter().map(|key| format!("key:{}", key.key_id)).collect();
        for (key, usage) in keys.iter_mut().zip(self.store.token_usage(&payers, filter.now).await?)
        {
            key.token_usage = Some(usage);
        }
        let create_time = |key: &Key| key.create_time.as_ref().map_or(0, micros);
        let token = |key: &Key| pagination::page_token(create_time(key), &key.key_id);
        let next_page_token = keys.last().filter(|_| has_more).map(token).unwrap_or_default();
        Ok(Response::new(ListKeysResponse { keys, next_page_token }))
    }

    async fn get_key(
        &self,
        request: Request<GetKeyRequest>,
    ) -> Result<Response<GetKeyResponse>, Status> {
        let call = Call::from_extensions(request.extensions())?;
        let key = self.visible_key(&call, request.into_inner().key_id).await?;
        Ok(Response::new(GetKeyResponse { key: Some(key) }))
    }

    async fn rotate_key(
        &self,
        request: Request<RotateKeyRequest>,
    ) -> Result<Response<RotateKeyResponse>, Status> {
        let call = Call::from_extensions(request.extensions())?;
        let idempotency = RequestIdempotency::from_request(&request, &self.pepper)?;
        let request = request.into_inner();
        let overlap = request.overlap_seconds.unwrap_or(DEFAULT_OVERLAP_SECONDS);
        if overlap > MAX_OVERLAP_SECONDS {
            let problem = "must be from 0 to 2592000";
            return Err(Violations::single("overlap_seconds", problem).into());
        }
        let key = self.visible_key(&call, request.key_id).await?;
        let key_secret = key_format::renew(&key.key_id)
            .ok_or_else(|| Error::from(anyhow::anyhow!("{} is not a key id", key.key_id)))?;
        let change = ChangeRequest { context: AuditContext::from_call(&call), idempotency };
        let old_expire_time = add_seconds(change.context.time, overlap);
        let new_secret = NewSecret {
            hash: self.pepper.hash_key(&key_secret)?,
            key_id: key.key_id,
            old_expire_time,
        };
        let reply = move |key| {
            let key_text = key_secret.expose_secret().to_owned();
            RotateKeyResponse { key: Some(key), key_text }
        };
        Ok(self.store.rotate_key(change, new_secret, reply).await?)
    }

    async fn update_key(
        &self,
        request: Request<UpdateKeyRequest>,
    ) -> Result<Response<UpdateKeyResponse>, Status> {
        let call = Call::from_extensions(request.extensions())?;
        let request = request.into_inner();
        let (key_id, changes) = parse_update(request, now())?;
        self.visible_key(&call, key_id.clone()).await?;
        let scopes = changes.scopes.as_deref().unwrap_or_default();
        check_grant(&call, scopes, changes.rate_limits.is_some())?;
        self.store.update_key(AuditContext::from_call(&call), key_id.clone(), changes).await?;
        let key = Some(self.required_key(&key_id).await?);
        Ok(Response::new(UpdateKeyResponse { key }))
    }

    async fn revoke_key(
        &self,
        request: Request<RevokeKeyRequest>,
    ) -> Result<Response<RevokeKeyResponse>, Status> {
        let call = Call::from_extensions(request.extensions())?;
        let key = self.visible_key(&call, request.into_inner().key_id).await?;
        self.store.revoke_key(AuditContext::from_call(&call), key.key_id.clone()).await?;
        let key = Some(self.required_key(&key.key_id).await?);
        Ok(Response::new(RevokeKeyResponse { key }))
    }
}

impl KeyApi {
    /// A key that the caller may see. Keys of other owners are reported as not found.
    async fn visible_key(&self, call: &Call, key_id: String) -> Result<Key, Error> {
        let key_id = validation::required("key_id", key_id)?;
        match self.required_key(&key_id).await {
            Ok(key) if !call.may_see(&key.owner) => Err(Error::NotFound("key")),
            other => other,
        }
    }

    async fn required_key(&self, key_id: &str) -> Result<Key, Error> {
        let key = self.store.key_by_id(key_id, now()).await?;
        key.ok_or(Error::NotFound("key"))
    }
}

/// A caller that is not an admin can grant only scopes that it has, and no rate limits.
fn check_grant(call: &Call, scopes: &[String], sets_rate_limits: bool) -> Result<(), Error> {
    if call.is_admin() {
        return Ok(());
    }
    if sets_rate_limits {
        return Err(Error::AdminRequired("setting rate_limits"));
    }
    if scopes.iter().all(|scope| call.has_scope(scope)) {
        return Ok(());
    }
    Err(Error::ScopeNotHeld)
}

fn validate_create(request: &CreateKeyRequest, now: i64) -> Result<(), Violations> {
    let mut violations = Violations::default();
    validation::name("name", &request.name, &mut violations);
    validation::name("owner", &request.owner, &mut violations);
    if request.scopes.is_empty() {
        violations.add_missing("scopes");
    }
    validation::scopes(&request.scopes, &mut violations);
    match &request.expiry {
        Some(Expiry::ExpireTime(time)) => validation::expire_time(time, now, &mut violations),
        Some(Expiry::TtlDays(days)) if !(1..=MAX_TTL_DAYS).contains(days) => {
            violations.add_invalid("ttl_days", "must be from 1 to 3650");
        }
        Some(Expiry::NeverExpires(false)) => {
            violations.add_invalid("never_expires", "must be true if it is set");
        }
        _ => {}
    }
    validation::rate_limits(&request.rate_limits, &mut violations);
    validation::allowed_models(&request.allowed_models, &mut violations);
    validation::token_budget(request.token_budget.as_ref(), &mut violations);
    violations.check()
}

fn parse_update(request: UpdateKeyRequest, now: i64) -> Result<(String, KeyChanges), Violations> {
    let mut violations = Violations::default();
    if request.key_id.is_empty() {
        violations.add_missing("key_id");
    }
    let (mut changes, paths) = (
        KeyChanges::default(),
        validation::update_mask(request.update_mask, UPDATABLE_FIELDS, &mut violations),
    );
    for path in paths {
        match path.as_str() {
            "name" => {
                validation::name("name", &request.name, &mut violations);
                changes.name = Some(request.name.clone());
            }
            "scopes" => {
                if request.scopes.is_empty() {
                    violations.add_missing("scopes");
                }
                validation::scopes(&request.scopes, &mut violations);
                changes.scopes = Some(request.scopes.clone());
            }
            "expire_time" => {
                if let Some(time) = &request.expire_time {
                    validation::expire_time(time, now, &mut violations);
                }
                changes.expiry = match &request.expire_time {
                    Some(time) => ExpiryChange::At(micros(time)),
                    None => ExpiryChange::Never,
                };
            }
            "rate_limits" => {
                validation::rate_limits(&request.rate_limits, &mut violations);
                changes.rate_limits = Some(request.rate_limits.clone());
            }
            "allowed_models" => {
                validation::allowed_models(&request.allowed_models, &mut violations);
                changes.allowed_models = Some(request.allowed_models.clone());
            }
            _ => {
                validation::token_budget(request.token_budget.as_ref(), &mut violations);
                changes.token_budget = Some(request.token_budget.unwrap_or_default());
            }
        }
    }
    violations.check()?;
    Ok((request.key_id, changes))
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use hapa_proto::auth::v1::RateLimit;

    use super::*;

    fn invalid_fields(request: &CreateKeyRequest) -> Vec<Cow<'static, str>> {
        validate_create(request, now())
            .err()
            .map(|violations| violations.fields())
            .unwrap_or_default()
    }

    #[test]
    fn every_invalid_field_is_reported_at_once() {
        let empty = CreateKeyRequest::default();
        assert_eq!(invalid_fields(&empty), ["name", "owner", "scopes"]);
        let limit = RateLimit { method: "*".to_owned(), limit: 5, window_seconds: 0 };
        let good = CreateKeyRequest {
            name: "ci".to_owned(),
            owner: "team".to_owned(),
            scopes: vec!["codegen:generate".to_owned()],
            ..CreateKeyRequest::default()
        };
        assert_eq!(invalid_fields(&good), Vec::<&str>::new());
        let bad = CreateKeyRequest {
            scopes: vec!["codegen:everything".to_owned()],
            expiry: Some(Expiry::ExpireTime(timestamp(0))),
            rate_limits: vec![limit],
            allowed_models: vec![String::new()],
            ..good
        };
        assert_eq!(
            invalid_fields(&bad),
            ["scopes", "expire_time", "rate_limits", "allowed_models"]
        );
    }
}
