//! Idempotency keys: a request that is repeated with its key receives the first reply again.
//!
//! A service stores one record per key. The record holds the hash of the request and the reply, both
//! encrypted. Its id and its encryption key are derived from the idempotency key, the caller, the
//! method and a secret of the service. So a record alone reveals nothing and belongs to one caller.

use std::time::Duration;

use prost::Message;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::hkdf::{HKDF_SHA256, KeyType, Prk, Salt};
use sha2::{Digest as _, Sha256};
use tonic::metadata::{MetadataMap, MetadataValue};
use tonic::{Request, Response, Status};

use crate::call::Call;
use crate::rpc_error::{ErrorCode, RpcError};
use crate::violations::Violations;

/// Name of the request header and metadata entry.
pub const HEADER: &str = "idempotency-key";
/// Name of the response header that marks a repeated reply; its value is `true`.
pub const REPLAYED_HEADER: &str = "idempotent-replayed";
/// How long a reply is stored, from the end of the first call.
pub const RECORD_TTL: Duration = Duration::from_hours(24);

const MAX_KEY_LEN: usize = 128;
const HASH_LEN: usize = 32;
/// Separates these derived keys from all other keys derived from the same secret.
const SALT_LABEL: &[u8] = b"hapa idempotency 1";

/// Why a record cannot be replayed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The key was used with a different request.
    #[error(
        "this idempotency-key was used with a different request body; use a new key for each request"
    )]
    OtherBody,
    /// The record is damaged, or was encrypted with another secret.
    #[error("an idempotency record can't be decrypted")]
    Unreadable,
}

impl From<Error> for RpcError {
    fn from(error: Error) -> RpcError {
        match error {
            Error::OtherBody => RpcError::new(ErrorCode::Conflict, error.to_string()),
            Error::Unreadable => RpcError::internal(error),
        }
    }
}

/// A request with an idempotency key.
pub struct IdempotentRequest {
    record_id: String,
    caller: String,
    method: &'static str,
    encryption_key: LessSafeKey,
    body_hash: [u8; HASH_LEN],
}

impl IdempotentRequest {
    /// Reads the idempotency key of a request. `None` if the request has none; E4001 if the key is
    /// not 1 to 128 visible ASCII characters.
    pub fn from_request<M: Message>(
        request: &Request<M>,
        secret: &[u8],
    ) -> Result<Option<Self>, Status> {
        let Some(key) = read_key(request.metadata())? else { return Ok(None) };
        let call = Call::from_extensions(request.extensions())?;
        let method = call.rpc.map_or("", |rpc| rpc.path);
        let body_hash = Sha256::digest(request.get_ref().encode_to_vec()).into();
        Ok(Some(Self::new(secret, caller_name(&call), method, key, body_hash)?))
    }

    fn new(
        secret: &[u8],
        caller: String,
        method: &'static str,
        key: &str,
        body_hash: [u8; HASH_LEN],
    ) -> Result<Self, RpcError> {
        let derived = derive(secret, [caller.as_str(), method, key]);
        let (record_id, encryption_key) = derived.map_err(|_| RpcError::internal("HKDF failed"))?;
        Ok(IdempotentRequest { record_id, caller, method, encryption_key, body_hash })
    }

    /// Name of the record: 64 hexadecimal digits.
    pub fn record_id(&self) -> &str {
        &self.record_id
    }

    /// The principal that the record belongs to, such as `key:…` or `user:…`.
    pub fn caller(&self) -> &str {
        &self.caller
    }

    /// The encrypted record of a reply.
    pub fn seal(&self, reply: &impl Message) -> Result<Vec<u8>, RpcError> {
        let nonce: [u8; NONCE_LEN] = rand::random();
        let mut body = self.body_hash.to_vec();
        body.extend_from_slice(&reply.encode_to_vec());
        let aad = Aad::from(self.record_id.as_bytes());
        self.encryption_key
            .seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), aad, &mut body)
            .map_err(|_| RpcError::internal("an idempotency record can't be encrypted"))?;
        Ok([&nonce[..], &body].concat())
    }

    /// Decrypts the first reply from its record.
    pub fn replay<R: Message + Default>(&self, record: &[u8]) -> Result<Response<R>, Error> {
        let reply = self.open(record);
        let outcome = match &reply {
            Ok(_) => "replayed",
            Err(Error::OtherBody) => "conflict",
            Err(Error::Unreadable) => "unreadable",
        };
        metrics::counter!("hapa_idempotent_requests_total", "rpc" => self.method, "outcome" => outcome)
            .increment(1);
        let mut response = Response::new(reply?);
        response.metadata_mut().insert(REPLAYED_HEADER, MetadataValue::from_static("true"));
        Ok(response)
    }

    fn open<R: Message + Default>(&self, record: &[u8]) -> Result<R, Error> {
        let (nonce, body) = record.split_at_checked(NONCE_LEN).ok_or(Error::Unreadable)?;
        let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(|_| Error::Unreadable)?;
        let (aad, mut body) = (Aad::from(self.record_id.as_bytes()), body.to_vec());
        let opened = self.encryption_key.open_in_place(nonce, aad, &mut body);
        let opened = opened.map_err(|_| Error::Unreadable)?;
        let (body_hash, reply) = opened.split_at_checked(HASH_LEN).ok_or(Error::Unreadable)?;
        if body_hash != self.body_hash {
            return Err(Error::OtherBody);
        }
        R::decode(reply).map_err(|_| Error::Unreadable)
    }
}

impl std::fmt::Debug for IdempotentRequest {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut shown = formatter.debug_struct("IdempotentRequest");
        shown.field("method", &self.method).finish_non_exhaustive()
    }
}

/// Reads and validates the idempotency key, if there is one.
fn read_key(metadata: &MetadataMap) -> Result<Option<&str>, Violations> {
    let mut values = metadata.get_all(HEADER).iter();
    let Some(value) = values.next() else { return Ok(None) };
    let is_visible = |key: &&str| key.bytes().all(|byte| byte.is_ascii_graphic());
    let key = value.to_str().ok().filter(is_visible);
    let key = key.filter(|key| (1..=MAX_KEY_LEN).contains(&key.len()));
    match key {
        Some(_) if values.next().is_some() => Err(Violations::single(HEADER, "must be sent once")),
        Some(key) => Ok(Some(key)),
        None => Err(Violations::single(HEADER, "must be 1 to 128 visible ASCII characters")),
    }
}

/// The caller's name: the user for all of its sessions, so that a request may be repeated after a new login.
fn caller_name(call: &Call) -> String {
    match &call.principal {
        Some(principal) if principal.key_id.is_empty() => format!("user:{}", principal.user_id),
        _ => call.actor(),
    }
}

/// Length of derived key material, in bytes.
struct OutputLen(usize);

impl KeyType for OutputLen {
    fn len(&self) -> usize {
        self.0
    }
}

/// Derives the record id and the encryption key.
fn derive(
    secret: &[u8],
    parts: [&str; 3],
) -> Result<(String, LessSafeKey), ring::error::Unspecified> {
    // Each part is preceded by its length, so that different parts never give the same input.
    let mut input = Vec::new();
    for part in [secret].into_iter().chain(parts.map(str::as_bytes)) {
        input.extend_from_slice(&(part.len() as u64).to_be_bytes());
        input.extend_from_slice(part);
    }
    let prk: Prk = Salt::new(HKDF_SHA256, SALT_LABEL).extract(&input);
    let mut id = [0; HASH_LEN];
    prk.expand(&[b"record id"], OutputLen(HASH_LEN))?.fill(&mut id)?;
    let key = UnboundKey::from(prk.expand(&[b"encryption"], &AES_256_GCM)?);
    Ok((hex::encode(id), LessSafeKey::new(key)))
}

#[cfg(test)]
mod tests {
    use hapa_proto::auth::v1::{GetKeyRequest, Principal};
    use proptest::prelude::*;

    use super::*;

    fn request(caller: &str, method: &'static str, key: &str, body: &str) -> IdempotentRequest {
        let hash = Sha256::digest(body).into();
        IdempotentRequest::new(b"secret", caller.to_owned(), method, key, hash).unwrap()
    }

    fn message(text: &str) -> GetKeyRequest {
        GetKeyRequest { key_id: text.to_owned() }
    }

    fn read(values: &[&[u8]]) -> Result<Option<String>, Violations> {
        let mut headers = http::HeaderMap::new();
        for value in values {
            let value = http::HeaderValue::from_bytes(value).expect("a header value");
            headers.append(HEADER, value);
        }
        read_key(&MetadataMap::from_headers(headers)).map(|key| key.map(str::to_owned))
    }

    #[test]
    fn a_key_is_1_to_128_visible_ascii_characters() {
        assert_eq!(read(&[]).unwrap(), None);
        let longest = "~".repeat(128);
        for good in ["!", "\"a-1\"", longest.as_str()] {
            assert_eq!(read(&[good.as_bytes()]).unwrap().as_deref(), Some(good));
        }
        let too_long = "a".repeat(129);
        for bad in ["".as_bytes(), b" ", b"a b", b"a\tb", "é".as_bytes(), too_long.as_bytes()] {
            assert_eq!(read(&[bad]).unwrap_err().fields(), [HEADER], "{bad:?}");
        }
        assert_eq!(read(&[b"a", b"a"]).unwrap_err().fields(), [HEADER], "twice");
    }

    #[test]
    fn a_reply_is_replayed_for_the_same_body_only() {
        let first = request("key:a", "/m", "k", "body");
        let record = first.seal(&message("secret reply")).unwrap();
        let again = request("key:a", "/m", "k", "body").replay::<GetKeyRequest>(&record).unwrap();
        assert_eq!(again.metadata().get(REPLAYED_HEADER).unwrap(), "true");
        assert_eq!(again.into_inner(), message("secret reply"));
        let other = request("key:a", "/m", "k", "other").replay::<GetKeyRequest>(&record);
        assert!(matches!(other, Err(Error::OtherBody)), "{other:?}");
    }

    #[test]
    fn records_of_other_callers_methods_keys_and_secrets_are_separate() {
        let first = request("key:a", "/m", "k", "body");
        let record = first.seal(&message("reply")).unwrap();
        let others = [
            request("key:b", "/m", "k", "body"),
            request("key:a", "/n", "k", "body"),
            request("key:a", "/m", "l", "body"),
            // The same characters, split elsewhere.
            request("key:a/", "m", "k", "body"),
            IdempotentRequest::new(b"other", "key:a".to_owned(), "/m", "k", first.body_hash)
                .unwrap(),
        ];
        for other in others {
            assert_ne!(other.record_id(), first.record_id());
            assert!(matches!(other.open::<GetKeyRequest>(&record), Err(Error::Unreadable)));
        }
    }

    #[test]
    fn a_record_reveals_neither_reply_nor_hash_and_differs_each_time() {
        let first = request("key:a", "/m", "idempotency-key-1", "body");
        let records =
            [first.seal(&message("reply")).unwrap(), first.seal(&message("reply")).unwrap()];
        assert_ne!(records[0], records[1]);
        for record in records {
            for hidden in ["reply".as_bytes(), &first.body_hash] {
                assert!(!record.windows(hidden.len()).any(|window| window == hidden));
            }
        }
        assert!(!first.record_id().contains("idempotency") && first.record_id().len() == 64);
    }

    #[test]
    fn a_user_is_one_caller_in_all_of_its_sessions() {
        let call = |principal| {
            let mut call = Call::new(None, None, std::net::Ipv4Addr::LOCALHOST.into());
            call.principal = Some(std::sync::Arc::new(principal));
            call
        };
        let session = |id: &str| {
            let (session_id, user_id) = (id.to_owned(), "usr_1".to_owned());
            caller_name(&call(Principal { session_id, user_id, ..Principal::default() }))
        };
        assert_eq!(session("ses_1"), session("ses_2"));
        let key = Principal {
            key_id: "key_1".to_owned(),
            user_id: "usr_1".to_owned(),
            ..Principal::default()
        };
        assert_eq!(caller_name(&call(key)), "key:key_1");
    }

    proptest! {
        #[test]
        fn a_damaged_record_is_unreadable_and_never_a_panic(
            bytes in prop::collection::vec(any::<u8>(), 0..200),
            cut in 0_usize..200,
            flip in 0_usize..200,
        ) {
            let first = request("key:a", "/m", "k", "body");
            let unreadable =
                |record: &[u8]| matches!(first.open::<GetKeyRequest>(record), Err(Error::Unreadable));
            prop_assert!(unreadable(&bytes));
            let mut record = first.seal(&message("reply")).unwrap();
            prop_assert!(unreadable(&record[..cut.min(record.len() - 1)]));
            let at = flip % record.len();
            record[at] ^= 1;
            prop_assert!(unreadable(&record));
        }
    }
}
