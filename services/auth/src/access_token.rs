//! Access tokens of sessions: JWTs that only this service signs and verifies.
//!
//! Invariant: the settings choose the keys and the one algorithm of each. A token whose header names
//! another one is rejected before its signature is verified.

use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};

use anyhow::Context as _;
use hapa_core::config::ConfigError;
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey};
use ring::hmac;
use ring::signature::{Ed25519KeyPair, KeyPair as _};
use rustls::pki_types::PrivatePkcs8KeyDer;
use rustls::pki_types::pem::PemObject as _;
use secrecy::{ExposeSecret as _, SecretString};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::error::Error;
use crate::jws::{self, MAX_CLOCK_SKEW_SECONDS};

/// Issuer and audience of access tokens.
const ISSUER: &str = "hapa";
const MAX_TOKEN_BYTES: usize = 8_192;

/// The claims of an access token. Times are seconds since 1970.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct AccessTokenClaims {
    pub(crate) user_id: String,
    pub(crate) session_id: String,
    /// Unique to this token.
    pub(crate) token_id: String,
    /// The token is valid from then on, and before it by the clock skew that replicas may have.
    pub(crate) issue_time: i64,
    /// The first second in which the token is invalid.
    pub(crate) expire_time: i64,
}

/// The claims as the JWT holds them (RFC 7519).
#[derive(Deserialize, Serialize)]
struct JwtClaims {
    iss: String,
    aud: String,
    sub: String,
    sid: String,
    iat: i64,
    nbf: i64,
    exp: i64,
    jti: String,
}

/// Issues and verifies access tokens. The keys can be replaced at run time.
pub(crate) struct AccessTokens(RwLock<Arc<SigningKeys>>);

/// The keys in use.
struct SigningKeys {
    /// Signs new tokens.
    current: SigningKey,
    /// Keys being replaced, whose tokens are still accepted.
    previous: Vec<SigningKey>,
}

/// A key that signs and verifies tokens, with its key id.
pub(crate) struct SigningKey {
    algorithm: Algorithm,
    kid: String,
    encoding_key: EncodingKey,
    decoding_key: DecodingKey,
}

impl SigningKey {
    /// An HS256 key derived from a secret.
    pub(crate) fn from_secret(secret: &SecretString) -> SigningKey {
        let secret = hmac::Key::new(hmac::HMAC_SHA256, secret.expose_secret().as_bytes());
        let key = hmac::sign(&secret, b"hapa session token v1");
        let id = hmac::sign(&secret, b"hapa session token id v1");
        SigningKey {
            algorithm: Algorithm::HS256,
            kid: key_id(id.as_ref()),
            encoding_key: EncodingKey::from_secret(key.as_ref()),
            decoding_key: DecodingKey::from_secret(key.as_ref()),
        }
    }

    /// The Ed25519 key (PKCS#8 PEM) in the file that the setting `name` names.
    pub(crate) fn from_file(name: &'static str, file: &Path) -> Result<SigningKey, ConfigError> {
        let config_error =
            |problem: String| ConfigError::new(name, format!("{}: {problem}", file.display()));
        let der = PrivatePkcs8KeyDer::from_pem_file(file).map_err(|error| {
            config_error(format!("cannot be read as a PKCS#8 PEM key: {error}"))
        })?;
        // OpenSSL writes Ed25519 keys without the public key, which ring then derives.
        let key_pair = Ed25519KeyPair::from_pkcs8_maybe_unchecked(der.secret_pkcs8_der())
            .map_err(|error| config_error(format!("does not hold an Ed25519 key: {error}")))?;
        let public = key_pair.public_key().as_ref();
        Ok(SigningKey {
            algorithm: Algorithm::EdDSA,
            kid: key_id(&Sha256::digest(public)),
            encoding_key: EncodingKey::from_ed_der(der.secret_pkcs8_der()),
            decoding_key: DecodingKey::from_ed_der(public),
        })
    }
}

impl AccessTokens {
    pub(crate) fn new(current: SigningKey, previous: Vec<SigningKey>) -> AccessTokens {
        jws::install_crypto_provider();
        AccessTokens(RwLock::new(Arc::new(SigningKeys { current, previous })))
    }

    /// Replaces the keys by those of `other`.
    pub(crate) fn replace(&self, other: &AccessTokens) {
        let keys = other.keys();
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = keys;
    }

    fn keys(&self) -> Arc<SigningKeys> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Issues a token with these claims.
    pub(crate) fn issue(&self, claims: &AccessTokenClaims) -> Result<SecretString, Error> {
        let jwt_claims = JwtClaims {
            iss: ISSUER.to_owned(),
            aud: ISSUER.to_owned(),
            sub: claims.user_id.clone(),
            sid: claims.session_id.clone(),
            iat: claims.issue_time,
            nbf: claims.issue_time,
            exp: claims.expire_time,
            jti: claims.token_id.clone(),
        };
        let current = &self.keys().current;
        let token = jws::sign(current.algorithm, &current.kid, &jwt_claims, &current.encoding_key);
        Ok(SecretString::from(token.context("signing an access token")?))
    }

    /// The claims of a token that this service issued and that is valid now.
    pub(crate) fn verify(&self, token: &str, now_unix_seconds: i64) -> Option<AccessTokenClaims> {
        if token.len() > MAX_TOKEN_BYTES {
            return None;
        }
        let header = jws::parse_header(token).ok()?;
        let keys = self.keys();
        let mut keys = std::iter::once(&keys.current).chain(&keys.previous);
        let key = keys.find(|key| header.kid.as_ref() == Some(&key.kid))?;
        let jwt_claims: JwtClaims = jws::verify(token, key.algorithm, &key.decoding_key).ok()?;
        let is_ours = jwt_claims.iss == ISSUER && jwt_claims.aud == ISSUER;
        // The clock of the replica that issued the token may be ahead. The expiry is not extended: a
        // token that expires early is refreshed, one that expires late is a risk.
        let valid_from = jwt_claims.nbf.max(jwt_claims.iat).saturating_sub(MAX_CLOCK_SKEW_SECONDS);
        let is_valid = valid_from <= now_unix_seconds && now_unix_seconds < jwt_claims.exp;
        (is_ours && is_valid).then_some(AccessTokenClaims {
            user_id: jwt_claims.sub,
            session_id: jwt_claims.sid,
            token_id: jwt_claims.jti,
            issue_time: jwt_claims.iat,
            expire_time: jwt_claims.exp,
        })
    }
}

fn key_id(digest: &[u8]) -> String {
    let mut key_id = hex::encode(digest);
    key_id.truncate(8);
    key_id
}

#[cfg(test)]
mod tests;
