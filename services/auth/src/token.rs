//! Access tokens of sessions: JWTs that this service signs and this service alone checks.
//!
//! Kept true: the settings choose the keys and the one algorithm of each; a token that says otherwise
//! is refused before its signature is looked at.

use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};

use anyhow::Context as _;
use hapa_core::config::Wrong;
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey};
use ring::hmac;
use ring::signature::{Ed25519KeyPair, KeyPair as _};
use rustls::pki_types::PrivatePkcs8KeyDer;
use rustls::pki_types::pem::PemObject as _;
use secrecy::{ExposeSecret as _, SecretString};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::error::Error;
use crate::jws::{self, LEEWAY};

/// Who issues our tokens, and whom they are for.
const HAPA: &str = "hapa";
const LONGEST: usize = 8_192;
/// What an access token says. Times are seconds since 1970.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Claims {
    pub(crate) user_id: String,
    pub(crate) session_id: String,
    /// No two tokens share one.
    pub(crate) token_id: String,
    /// The token holds from then on, and as long before as clocks of replicas may differ.
    pub(crate) issue_time: i64,
    /// The first second in which it does not hold any more.
    pub(crate) expire_time: i64,
}

#[derive(Deserialize, Serialize)]
struct Wire {
    iss: String,
    aud: String,
    sub: String,
    sid: String,
    iat: i64,
    nbf: i64,
    exp: i64,
    jti: String,
}

/// Issues access tokens and checks them.
pub(crate) struct Tokens(RwLock<Arc<Pairs>>);

/// What is in force.
struct Pairs {
    own: Pair,
    /// Others, whose tokens hold too while one takes another's place.
    also: Vec<Pair>,
}

/// What signs, what tells a signature, and the name of both.
pub(crate) struct Pair {
    algorithm: Algorithm,
    kid: String,
    signing: EncodingKey,
    verifying: DecodingKey,
}

impl Pair {
    /// Derived from a secret.
    pub(crate) fn of_secret(secret: &SecretString) -> Pair {
        let secret = hmac::Key::new(hmac::HMAC_SHA256, secret.expose_secret().as_bytes());
        let key = hmac::sign(&secret, b"hapa session token v1");
        let id = hmac::sign(&secret, b"hapa session token id v1");
        Pair {
            algorithm: Algorithm::HS256,
            kid: kid(id.as_ref()),
            signing: EncodingKey::from_secret(key.as_ref()),
            verifying: DecodingKey::from_secret(key.as_ref()),
        }
    }

    /// What is in the file of the setting `name`: an Ed25519 key in PKCS#8 PEM.
    pub(crate) fn of_file(name: &'static str, file: &Path) -> Result<Pair, Wrong> {
        let wrong = |problem: String| Wrong::new(name, format!("{}: {problem}", file.display()));
        let der = PrivatePkcs8KeyDer::from_pem_file(file)
            .map_err(|error| wrong(format!("holds no PKCS#8 PEM key: {error}")))?;
        // OpenSSL writes Ed25519 keys without their public half, which ring then derives.
        let pair = Ed25519KeyPair::from_pkcs8_maybe_unchecked(der.secret_pkcs8_der())
            .map_err(|error| wrong(format!("holds no Ed25519 key: {error}")))?;
        let public = pair.public_key().as_ref();
        Ok(Pair {
            algorithm: Algorithm::EdDSA,
            kid: kid(&Sha256::digest(public)),
            signing: EncodingKey::from_ed_der(der.secret_pkcs8_der()),
            verifying: DecodingKey::from_ed_der(public),
        })
    }
}

impl Tokens {
    pub(crate) fn new(own: Pair, also: Vec<Pair>) -> Tokens {
        jws::install();
        Tokens(RwLock::new(Arc::new(Pairs { own, also })))
    }

    /// Goes on with the keys of another one.
    pub(crate) fn replace(&self, other: &Tokens) {
        let pairs = other.pairs();
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = pairs;
    }

    fn pairs(&self) -> Arc<Pairs> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// A token with these claims.
    pub(crate) fn issue(&self, claims: &Claims) -> Result<SecretString, Error> {
        let wire = Wire {
            iss: HAPA.to_owned(),
            aud: HAPA.to_owned(),
            sub: claims.user_id.clone(),
            sid: claims.session_id.clone(),
            iat: claims.issue_time,
            nbf: claims.issue_time,
            exp: claims.expire_time,
            jti: claims.token_id.clone(),
        };
        let own = &self.pairs().own;
        let text = jws::seal(own.algorithm, &own.kid, &wire, &own.signing);
        Ok(SecretString::from(text.context("signing an access token")?))
    }

    /// The claims of a token of ours that holds now.
    pub(crate) fn verify(&self, text: &str, now_unix_seconds: i64) -> Option<Claims> {
        if text.len() > LONGEST {
            return None;
        }
        let header = jws::header(text).ok()?;
        let pairs = self.pairs();
        let mut pairs = std::iter::once(&pairs.own).chain(&pairs.also);
        let pair = pairs.find(|pair| header.kid.as_ref() == Some(&pair.kid))?;
        let wire: Wire = jws::open(text, pair.algorithm, &pair.verifying).ok()?;
        let is_ours = wire.iss == HAPA && wire.aud == HAPA;
        // Another replica may have issued it, whose clock is ahead. The end is not extended: a token
        // that expires early is refreshed, one that expires late is a risk.
        let begin = wire.nbf.max(wire.iat).saturating_sub(LEEWAY);
        let holds = begin <= now_unix_seconds && now_unix_seconds < wire.exp;
        (is_ours && holds).then_some(Claims {
            user_id: wire.sub,
            session_id: wire.sid,
            token_id: wire.jti,
            issue_time: wire.iat,
            expire_time: wire.exp,
        })
    }
}

fn kid(digest: &[u8]) -> String {
    let mut text = hex::encode(digest);
    text.truncate(8);
    text
}

#[cfg(test)]
mod tests;
