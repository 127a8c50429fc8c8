//! The RPCs of keys: check, decide, store, answer. A key's text leaves in CreateKey's reply alone.

use std::collections::HashSet;
use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use hapa_chassis::rpc::SCOPES;
use hapa_chassis::{Violations, key_text};
use hapa_proto::auth::v1::create_key_request::Expiry;
use hapa_proto::auth::v1::key_service_server::KeyService;
use hapa_proto::auth::v1::{
    CreateKeyRequest, CreateKeyResponse, GetKeyRequest, GetKeyResponse, Key, ListKeysRequest,
    ListKeysResponse, RateLimit, RevokeKeyRequest, RevokeKeyResponse,
};
use prost_types::Timestamp;
use secrecy::{ExposeSecret as _, SecretString};
use tonic::{Request, Response, Status};

use crate::credential::hash;
use crate::error::Error;
use crate::store::{After, Store};

const MICROS_PER_DAY: i64 = 86_400_000_000;
const LONGEST_NAME: usize = 100;
const MOST_LIMITS: usize = 32;
const MOST_CALLS: u32 = 1_000_000;
const LONGEST_WINDOW: u32 = 86_400;
const MOST_MODELS: usize = 64;
const LONGEST_LIFE: u32 = 3_650;
const DEFAULT_PAGE: i32 = 50;
const LARGEST_PAGE: i32 = 1_000;

pub(crate) struct Keys {
    pub(crate) store: Store,
    pub(crate) pepper: SecretString,
    pub(crate) default_days: u32,
}

#[tonic::async_trait]
impl KeyService for Keys {
    async fn create_key(
        &self,
        request: Request<CreateKeyRequest>,
    ) -> Result<Response<CreateKeyResponse>, Status> {
        let request = request.into_inner();
        let create_time = now();
        check(&request, create_time).map_err(Error::from)?;
        let expire_time = match request.expiry {
            Some(Expiry::ExpireTime(time)) => Some(time),
            Some(Expiry::TtlDays(days)) => Some(in_days(create_time, days)),
            Some(Expiry::NeverExpires(_)) => None,
            None => Some(in_days(create_time, self.default_days)),
        };
        let (key_id, text) = key_text::mint();
        let digest = key_text::digest(text.expose_secret());
        let digest = digest.ok_or_else(|| anyhow::anyhow!("a minted key is not well-formed"));
        let key = Key {
            key_id,
            name: request.name,
            owner: request.owner,
            scopes: request.scopes,
            rate_limits: request.rate_limits,
            allowed_models: request.allowed_models,
            create_time: Some(timestamp(create_time)),
            expire_time,
            revoke_time: None,
        };
        self.store.insert(&key, &hash(&self.pepper, &digest.map_err(Error::from)?)?).await?;
        let key_text = text.expose_secret().to_owned();
        Ok(Response::new(CreateKeyResponse { key: Some(key), key_text }))
    }

    async fn list_keys(
        &self,
        request: Request<ListKeysRequest>,
    ) -> Result<Response<ListKeysResponse>, Status> {
        let request = request.into_inner();
        let size = match request.page_size {
            0 => DEFAULT_PAGE,
            size @ 1..=LARGEST_PAGE => size,
            _ => return Err(wrong("page_size", "must be from 0 to 1000").into()),
        };
        let after = after(&request.page_token)?;
        // One more than asked for tells whether there is a next page.
        let mut keys = self.store.page(&request.owner, &after, i64::from(size) + 1).await?;
        let more = keys.len() > usize::try_from(size).unwrap_or(usize::MAX);
        if more {
            keys.pop();
        }
        let next_page_token = keys.last().filter(|_| more).map(page_token).unwrap_or_default();
        Ok(Response::new(ListKeysResponse { keys, next_page_token }))
    }

    async fn get_key(
        &self,
        request: Request<GetKeyRequest>,
    ) -> Result<Response<GetKeyResponse>, Status> {
        let key_id = required_id(request.into_inner().key_id)?;
        let key = self.store.by_id(&key_id).await?;
        let key = Some(key.ok_or(Error::NoSuchKey(key_id))?);
        Ok(Response::new(GetKeyResponse { key }))
    }

    async fn revoke_key(
        &self,
        request: Request<RevokeKeyRequest>,
    ) -> Result<Response<RevokeKeyResponse>, Status> {
        let key_id = required_id(request.into_inner().key_id)?;
        let key = self.store.revoke(&key_id, now()).await?;
        let key = Some(key.ok_or(Error::NoSuchKey(key_id))?);
        Ok(Response::new(RevokeKeyResponse { key }))
    }
}

/// Microseconds since 1970.
pub(crate) fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_micros()).unwrap_or(i64::MAX)
}

pub(crate) fn timestamp(micros: i64) -> Timestamp {
    let nanos = i32::try_from(micros.rem_euclid(1_000_000) * 1_000).unwrap_or_default();
    Timestamp { seconds: micros.div_euclid(1_000_000), nanos }
}

pub(crate) fn micros(time: &Timestamp) -> i64 {
    time.seconds.saturating_mul(1_000_000).saturating_add(i64::from(time.nanos / 1_000))
}

fn in_days(from: i64, days: u32) -> Timestamp {
    timestamp(from + i64::from(days) * MICROS_PER_DAY)
}

fn wrong(field: &'static str, problem: &str) -> Error {
    Violations::one(field, problem).into()
}

fn required_id(key_id: String) -> Result<String, Error> {
    let mut found = Violations::default();
    if key_id.is_empty() {
        found.missing("key_id");
    }
    found.check()?;
    Ok(key_id)
}

fn check(request: &CreateKeyRequest, now: i64) -> Result<(), Violations> {
    let mut found = Violations::default();
    for (field, text) in [("name", &request.name), ("owner", &request.owner)] {
        if text.trim().is_empty() {
            found.missing(field);
        } else if text.chars().count() > LONGEST_NAME || text.chars().any(char::is_control) {
            found.wrong(field, "must be 1 to 100 characters without control characters");
        }
    }
    if request.scopes.is_empty() {
        found.missing("scopes");
    }
    if let Some(unknown) = request.scopes.iter().find(|scope| !SCOPES.contains(&scope.as_str())) {
        let known = SCOPES.join(", ");
        found.wrong("scopes", format!("has the unknown scope {unknown:?}; known are {known}"));
    }
    if let Some((field, problem)) =
        request.expiry.as_ref().and_then(|expiry| expiry_problem(expiry, now))
    {
        found.wrong(field, problem);
    }
    if let Some(problem) = limits_problem(&request.rate_limits) {
        found.wrong("rate_limits", problem);
    }
    let unfit = |model: &String| model.is_empty() || model.chars().count() > LONGEST_NAME;
    if request.allowed_models.len() > MOST_MODELS || request.allowed_models.iter().any(unfit) {
        found.wrong("allowed_models", "takes at most 64 names of 1 to 100 characters");
    }
    found.check()
}

fn expiry_problem(expiry: &Expiry, now: i64) -> Option<(&'static str, &'static str)> {
    /// The last second that RFC 3339 can write.
    const LATEST: i64 = 253_402_300_799;
    match expiry {
        Expiry::ExpireTime(time) if micros(time) <= now => {
            Some(("expire_time", "must be in the future"))
        }
        Expiry::ExpireTime(time)
            if time.seconds > LATEST || !(0..1_000_000_000).contains(&time.nanos) =>
        {
            Some(("expire_time", "must be a valid time before the year 10000"))
        }
        Expiry::TtlDays(days) if !(1..=LONGEST_LIFE).contains(days) => {
            Some(("ttl_days", "must be from 1 to 3650"))
        }
        Expiry::NeverExpires(false) => Some(("never_expires", "must be true where it is set")),
        _ => None,
    }
}

fn limits_problem(limits: &[RateLimit]) -> Option<&'static str> {
    let mut methods = HashSet::new();
    let method = |name: &str| {
        name == "*"
            || (1..=64).contains(&name.len())
                && name.bytes().all(|byte| byte.is_ascii_alphanumeric())
    };
    if limits.len() > MOST_LIMITS {
        return Some("takes at most 32 entries");
    }
    limits.iter().find_map(|limit| {
        if !method(&limit.method) {
            Some("needs a method's name, such as GenerateCode, or * in each entry")
        } else if !methods.insert(&limit.method) {
            Some("may name a method once only")
        } else if limit.limit > MOST_CALLS {
            Some("allows limits from 0 to 1000000")
        } else if limit.limit > 0 && !(1..=LONGEST_WINDOW).contains(&limit.window_seconds) {
            Some("needs window_seconds from 1 to 86400 beside a limit")
        } else {
            None
        }
    })
}

fn page_token(last: &Key) -> String {
    let created = last.create_time.as_ref().map_or(0, micros);
    BASE64_URL_SAFE_NO_PAD.encode(format!("{created}/{}", last.key_id))
}

fn after(token: &str) -> Result<After, Error> {
    if token.is_empty() {
        return Ok(After { create_time: i64::MAX, key_id: String::new() });
    }
    let parse = || {
        let text = String::from_utf8(BASE64_URL_SAFE_NO_PAD.decode(token).ok()?).ok()?;
        let (created, key_id) = text.split_once('/')?;
        Some(After { create_time: created.parse().ok()?, key_id: key_id.to_owned() })
    };
    parse().ok_or_else(|| wrong("page_token", "is not one that a reply gave"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn request() -> CreateKeyRequest {
        CreateKeyRequest {
            name: "ci".to_owned(),
            owner: "team".to_owned(),
            scopes: vec!["codegen:generate".to_owned()],
            ..CreateKeyRequest::default()
        }
    }

    fn fields(request: &CreateKeyRequest) -> Vec<&'static str> {
        check(request, now()).err().map(|found| found.fields()).unwrap_or_default()
    }

    #[test]
    fn every_wrong_field_is_named_at_once() {
        let empty = CreateKeyRequest::default();
        assert_eq!(fields(&empty), ["name", "owner", "scopes"]);
        let limit = RateLimit { method: "*".to_owned(), limit: 5, window_seconds: 0 };
        let bad = CreateKeyRequest {
            scopes: vec!["codegen:everything".to_owned()],
            expiry: Some(Expiry::ExpireTime(timestamp(0))),
            rate_limits: vec![limit],
            allowed_models: vec![String::new()],
            ..request()
        };
        assert_eq!(fields(&bad), ["scopes", "expire_time", "rate_limits", "allowed_models"]);
        assert_eq!(fields(&request()), Vec::<&str>::new());
    }

    #[test]
    fn a_page_token_leads_back_to_its_key() {
        let key =
            Key { key_id: "key_1".to_owned(), create_time: Some(timestamp(42)), ..Key::default() };
        let expected = After { create_time: 42, key_id: "key_1".to_owned() };
        assert_eq!(after(&page_token(&key)).unwrap(), expected);
    }

    proptest! {
        #[test]
        fn a_made_up_page_token_is_refused_and_never_panics(token in "\\PC{1,40}") {
            let _ = after(&token);
        }

        #[test]
        fn times_survive_the_way_through_the_store(micro in any::<i64>()) {
            let back = micros(&timestamp(micro));
            prop_assert!(back == micro || micro < -9_223_372_036_854_000_000);
        }
    }
}
