//! Credentials as callers present them, without the text of API keys.

use std::fmt;
use std::sync::Arc;

use hapa_core::key_format::{self, KeyDigest};
use hapa_proto::auth::v1::AuthenticateRequest;
use sha2::{Digest as _, Sha256};

/// Maximum length of an access token, in bytes.
const MAX_TOKEN_LEN: usize = 8_192;

/// A presented credential.
#[derive(Clone)]
pub enum Credential {
    /// The digest of an API key; its text is not kept.
    Key(KeyDigest),
    /// An access token, which only auth can read.
    Session(Arc<str>),
}

impl fmt::Debug for Credential {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Credential::Key(_) => "Key",
            Credential::Session(_) => "Session",
        })
    }
}

impl Credential {
    /// Parses a text; `None` if it can be neither a key nor a token.
    pub fn parse(text: &str, may_be_token: bool) -> Option<Credential> {
        if let Some(digest) = key_format::digest(text) {
            return Some(Credential::Key(digest));
        }
        let is_token = may_be_token
            && text.len() <= MAX_TOKEN_LEN
            && text.bytes().filter(|byte| *byte == b'.').count() == 2;
        is_token.then(|| Credential::Session(text.into()))
    }

    /// The key of the cache entry.
    pub(super) fn digest(&self) -> KeyDigest {
        match self {
            Credential::Key(digest) => *digest,
            Credential::Session(token) => Sha256::digest(&**token).into(),
        }
    }

    /// The request that asks auth for the principal.
    pub(super) fn request(&self) -> AuthenticateRequest {
        let mut request = AuthenticateRequest::default();
        match self {
            Credential::Key(digest) => request.credential_digest = digest.into(),
            Credential::Session(token) => request.session_token = token.to_string(),
        }
        request
    }
}
