//! The RPCs of keys: check, decide, store, answer. A key's text leaves in the replies of CreateKey
//! and RotateKey alone.

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

use crate::check;
use crate::error::Error;
use crate::idempotency::Repeatable;
use crate::pepper::Pepper;
use crate::store::{Attempt, By, Changes, End, Filter, NewText, Store};
use crate::times::{in_days, in_seconds};

const LONGEST_LIFE: u32 = 3_650;
const LONGEST_OVERLAP: u32 = 2_592_000;
const DEFAULT_OVERLAP: u32 = 86_400;
const STATES: &[&str] = &["", "active", "expired", "revoked"];
const MUTABLE: &[&str] =
    &["name", "scopes", "expire_time", "rate_limits", "allowed_models", "token_budget"];

pub(crate) struct Keys {
    pub(crate) store: Store,
    pub(crate) pepper: Pepper,
    pub(crate) default_days: u32,
}

#[tonic::async_trait]
impl KeyService for Keys {
    async fn create_key(
        &self,
        request: Request<CreateKeyRequest>,
    ) -> Result<Response<CreateKeyResponse>, Status> {
        let call = Call::of(request.extensions())?;
        let repeatable = Repeatable::of(&request, &self.pepper)?;
        let attempt = Attempt { by: By::of(&call), request: repeatable };
        let (now, first) = (attempt.by.time, self.store.first_reply(&attempt).await?);
        let mut request = request.into_inner();
        let session = call.principal.as_ref().filter(|caller| !caller.session_id.is_empty());
        if let Some(session) = session.filter(|_| request.owner.is_empty()) {
            request.owner.clone_from(&session.owner);
        }
        // What was good then may not be now: the key's end may have passed.
        if first.is_none() {
            check_new(&request, now)?;
        }
        may_give(&call, &request.scopes, !request.rate_limits.is_empty())?;
        if !call.may_see(&request.owner) {
            return Err(Error::NotAllowed("a key of another owner").into());
        }
        if let Some(reply) = first {
            return Ok(reply);
        }
        let expire_time = match request.expiry {
            Some(Expiry::ExpireTime(time)) => Some(time),
            Some(Expiry::TtlDays(days)) => Some(timestamp(in_days(now, days))),
            Some(Expiry::NeverExpires(_)) => None,
            None => Some(timestamp(in_days(now, self.default_days))),
        };
        let (key_id, text) = key_format::mint();
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
        let hash = self.pepper.hash_key(&text)?;
        let reply = move |key| {
            let key_text = text.expose_secret().to_owned();
            CreateKeyResponse { key: Some(key), key_text }
        };
        Ok(self.store.insert_key(attempt, key, hash, reply).await?)
    }

    async fn list_keys(
        &self,
        request: Request<ListKeysRequest>,
    ) -> Result<Response<ListKeysResponse>, Status> {
        let call = Call::of(request.extensions())?;
        let request = request.into_inner();
        if !STATES.contains(&request.state.as_str()) {
            let problem = "must be active, expired or revoked, or nothing";
            return Err(Violations::one("state", problem).into());
        }
        let size = pagination::size(request.page_size)?;
        let after = pagination::after(&request.page_token)?;
        let owner = match &call.principal {
            Some(caller) if !call.is_admin() => {
                if !request.owner.is_empty() && request.owner != caller.owner {
                    return Ok(Response::new(ListKeysResponse::default()));
                }
                caller.owner.clone()
            }
            _ => request.owner,
        };
        let filter = Filter { owner, state: request.state, scope: request.scope, now: now() };
        let keys = self.store.keys_page(&filter, &after, size + 1).await?;
        let (mut keys, more) = pagination::cut(keys, size);
        let payers: Vec<_> = keys.iter().map(|key| format!("key:{}", key.key_id)).collect();
        for (key, usage) in keys.iter_mut().zip(self.store.usage(&payers, filter.now).await?) {
            key.token_usage = Some(usage);
        }
        let created = |key: &Key| key.create_time.as_ref().map_or(0, micros);
        let token = |key: &Key| pagination::token(created(key), &key.key_id);
        let next_page_token = keys.last().filter(|_| more).map(token).unwrap_or_default();
        Ok(Response::new(ListKeysResponse { keys, next_page_token }))
    }

    async fn get_key(
        &self,
        request: Request<GetKeyRequest>,
    ) -> Result<Response<GetKeyResponse>, Status> {
        let call = Call::of(request.extensions())?;
        let key = self.visible(&call, request.into_inner().key_id).await?;
        Ok(Response::new(GetKeyResponse { key: Some(key) }))
    }

    async fn rotate_key(
        &self,
        request: Request<RotateKeyRequest>,
    ) -> Result<Response<RotateKeyResponse>, Status> {
        let call = Call::of(request.extensions())?;
        let repeatable = Repeatable::of(&request, &self.pepper)?;
        let request = request.into_inner();
        let overlap = request.overlap_seconds.unwrap_or(DEFAULT_OVERLAP);
        if overlap > LONGEST_OVERLAP {
            let problem = "must be from 0 to 2592000";
            return Err(Violations::one("overlap_seconds", problem).into());
        }
        let key = self.visible(&call, request.key_id).await?;
        let text = key_format::renew(&key.key_id)
            .ok_or_else(|| Error::from(anyhow::anyhow!("{} is no public id", key.key_id)))?;
        let attempt = Attempt { by: By::of(&call), request: repeatable };
        let old_end = in_seconds(attempt.by.time, overlap);
        let new = NewText { hash: self.pepper.hash_key(&text)?, key_id: key.key_id, old_end };
        let reply = move |key| {
            let key_text = text.expose_secret().to_owned();
            RotateKeyResponse { key: Some(key), key_text }
        };
        Ok(self.store.rotate_key(attempt, new, reply).await?)
    }

    async fn update_key(
        &self,
        request: Request<UpdateKeyRequest>,
    ) -> Result<Response<UpdateKeyResponse>, Status> {
        let call = Call::of(request.extensions())?;
        let request = request.into_inner();
        let (key_id, changes) = changes(request, now())?;
        self.visible(&call, key_id.clone()).await?;
        let scopes = changes.scopes.as_deref().unwrap_or_default();
        may_give(&call, scopes, changes.rate_limits.is_some())?;
        self.store.update_key(By::of(&call), key_id.clone(), changes).await?;
        let key = Some(self.key(&key_id).await?);
        Ok(Response::new(UpdateKeyResponse { key }))
    }

    async fn revoke_key(
        &self,
        request: Request<RevokeKeyRequest>,
    ) -> Result<Response<RevokeKeyResponse>, Status> {
        let call = Call::of(request.extensions())?;
        let key = self.visible(&call, request.into_inner().key_id).await?;
        self.store.revoke_key(By::of(&call), key.key_id.clone()).await?;
        let key = Some(self.key(&key.key_id).await?);
        Ok(Response::new(RevokeKeyResponse { key }))
    }
}

impl Keys {
    /// A key that the caller may see; another's does not exist for it.
    async fn visible(&self, call: &Call, key_id: String) -> Result<Key, Error> {
        let key_id = check::required("key_id", key_id)?;
        match self.key(&key_id).await {
            Ok(key) if !call.may_see(&key.owner) => Err(Error::NoSuch("key")),
            other => other,
        }
    }

    async fn key(&self, key_id: &str) -> Result<Key, Error> {
        let key = self.store.key_by_id(key_id, now()).await?;
        key.ok_or(Error::NoSuch("key"))
    }
}

/// Who is no admin gives no more than it has.
fn may_give(call: &Call, scopes: &[String], sets_limits: bool) -> Result<(), Error> {
    if call.is_admin() {
        return Ok(());
    }
    if sets_limits {
        return Err(Error::NotAllowed("setting rate_limits"));
    }
    if scopes.iter().all(|scope| call.has_scope(scope)) {
        return Ok(());
    }
    Err(Error::ScopeNotHeld)
}

fn check_new(request: &CreateKeyRequest, now: i64) -> Result<(), Violations> {
    let mut found = Violations::default();
    check::name("name", &request.name, &mut found);
    check::name("owner", &request.owner, &mut found);
    if request.scopes.is_empty() {
        found.missing("scopes");
    }
    check::scopes(&request.scopes, &mut found);
    match &request.expiry {
        Some(Expiry::ExpireTime(time)) => check::end(time, now, &mut found),
        Some(Expiry::TtlDays(days)) if !(1..=LONGEST_LIFE).contains(days) => {
            found.wrong("ttl_days", "must be from 1 to 3650");
        }
        Some(Expiry::NeverExpires(false)) => {
            found.wrong("never_expires", "must be true where it is set");
        }
        _ => {}
    }
    check::limits(&request.rate_limits, &mut found);
    check::models(&request.allowed_models, &mut found);
    check::budget(request.token_budget.as_ref(), &mut found);
    found.check()
}

fn changes(request: UpdateKeyRequest, now: i64) -> Result<(String, Changes), Violations> {
    let mut found = Violations::default();
    if request.key_id.is_empty() {
        found.missing("key_id");
    }
    let (mut changes, paths) =
        (Changes::default(), check::mask(request.update_mask, MUTABLE, &mut found));
    for path in paths {
        match path.as_str() {
            "name" => {
                check::name("name", &request.name, &mut found);
                changes.name = Some(request.name.clone());
            }
            "scopes" => {
                if request.scopes.is_empty() {
                    found.missing("scopes");
                }
                check::scopes(&request.scopes, &mut found);
                changes.scopes = Some(request.scopes.clone());
            }
            "expire_time" => {
                if let Some(time) = &request.expire_time {
                    check::end(time, now, &mut found);
                }
                changes.end = match &request.expire_time {
                    Some(time) => End::At(micros(time)),
                    None => End::Never,
                };
            }
            "rate_limits" => {
                check::limits(&request.rate_limits, &mut found);
                changes.rate_limits = Some(request.rate_limits.clone());
            }
            "allowed_models" => {
                check::models(&request.allowed_models, &mut found);
                changes.allowed_models = Some(request.allowed_models.clone());
            }
            _ => {
                check::budget(request.token_budget.as_ref(), &mut found);
                changes.token_budget = Some(request.token_budget.unwrap_or_default());
            }
        }
    }
    found.check()?;
    Ok((request.key_id, changes))
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use hapa_proto::auth::v1::RateLimit;

    use super::*;

    fn fields(request: &CreateKeyRequest) -> Vec<Cow<'static, str>> {
        check_new(request, now()).err().map(|found| found.fields()).unwrap_or_default()
    }

    #[test]
    fn every_wrong_field_is_named_at_once() {
        let empty = CreateKeyRequest::default();
        assert_eq!(fields(&empty), ["name", "owner", "scopes"]);
        let limit = RateLimit { method: "*".to_owned(), limit: 5, window_seconds: 0 };
        let good = CreateKeyRequest {
            name: "ci".to_owned(),
            owner: "team".to_owned(),
            scopes: vec!["codegen:generate".to_owned()],
            ..CreateKeyRequest::default()
        };
        assert_eq!(fields(&good), Vec::<&str>::new());
        let bad = CreateKeyRequest {
            scopes: vec!["codegen:everything".to_owned()],
            expiry: Some(Expiry::ExpireTime(timestamp(0))),
            rate_limits: vec![limit],
            allowed_models: vec![String::new()],
            ..good
        };
        assert_eq!(fields(&bad), ["scopes", "expire_time", "rate_limits", "allowed_models"]);
    }
}
