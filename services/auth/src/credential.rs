//! Authenticate: a digest of a presented key to the principal behind it.

use hapa_chassis::Violations;
use hapa_proto::auth::v1::auth_service_server::AuthService;
use hapa_proto::auth::v1::{AuthenticateRequest, AuthenticateResponse, Key, Principal};
use hmac::{Hmac, KeyInit as _, Mac as _};
use secrecy::{ExposeSecret as _, SecretString};
use sha2::Sha256;
use tonic::{Request, Response, Status};

use crate::error::Error;
use crate::key::{micros, now};
use crate::store::Store;

pub(crate) struct Credentials {
    pub(crate) store: Store,
    pub(crate) pepper: SecretString,
}

#[tonic::async_trait]
impl AuthService for Credentials {
    async fn authenticate(
        &self,
        request: Request<AuthenticateRequest>,
    ) -> Result<Response<AuthenticateResponse>, Status> {
        let digest = request.into_inner().credential_digest;
        if digest.len() != 32 {
            let problem = "must be a SHA-256 digest, 32 bytes";
            return Err(Error::from(Violations::one("credential_digest", problem)).into());
        }
        let found = self.store.by_hash(&hash(&self.pepper, &digest)?).await?;
        let key = found.ok_or(Error::UnknownCredential)?;
        if has_ended(&key) {
            return Err(Error::Ended.into());
        }
        Ok(Response::new(AuthenticateResponse { principal: Some(principal(key)) }))
    }
}

/// What the store keeps of a key's text.
pub(crate) fn hash(pepper: &SecretString, digest: &[u8]) -> Result<String, Error> {
    let mac = Hmac::<Sha256>::new_from_slice(pepper.expose_secret().as_bytes());
    let mac = mac.map_err(anyhow::Error::from)?.chain_update(digest);
    Ok(hex::encode(mac.finalize().into_bytes()))
}

fn has_ended(key: &Key) -> bool {
    let expired = key.expire_time.as_ref().is_some_and(|end| micros(end) <= now());
    expired || key.revoke_time.is_some()
}

fn principal(key: Key) -> Principal {
    Principal {
        key_id: key.key_id,
        owner: key.owner,
        scopes: key.scopes,
        rate_limits: key.rate_limits,
        allowed_models: key.allowed_models,
        expire_time: key.expire_time,
    }
}
