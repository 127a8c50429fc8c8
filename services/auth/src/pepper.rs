//! Hashes stored credentials with a pepper: a secret that is not in the store.
//!
//! Invariant: new credentials are hashed under the current pepper. A presented credential is looked
//! up under the current pepper and, while the pepper is being replaced, under the previous one.

use hapa_core::key_format;
use hmac::{Hmac, KeyInit as _, Mac as _};
use secrecy::{ExposeSecret as _, SecretString};
use sha2::{Digest as _, Sha256};

use crate::error::Error;

/// The secrets that stored credentials are hashed with.
#[derive(Clone)]
pub(crate) struct Pepper {
    pub(crate) current: SecretString,
    /// The pepper being replaced, under which credentials may still be stored.
    pub(crate) previous: Option<SecretString>,
}

/// The hashes under which one credential may be stored. Ordered, so that rows are locked in one order.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(crate) struct CredentialHashes {
    /// The hash under the current pepper.
    pub(crate) current: String,
    /// The hash under the previous pepper; equal to `current` if there is no previous one.
    pub(crate) previous: String,
}

impl Pepper {
    /// The hashes of a credential, from its SHA-256 digest.
    pub(crate) fn hashes(&self, digest: &[u8]) -> Result<CredentialHashes, Error> {
        let current = hash(&self.current, digest)?;
        let previous = self.previous.as_ref().map(|pepper| hash(pepper, digest)).transpose()?;
        Ok(CredentialHashes { previous: previous.unwrap_or_else(|| current.clone()), current })
    }

    /// The hashes of a presented refresh token.
    pub(crate) fn hashes_of_token(&self, token: &str) -> Result<CredentialHashes, Error> {
        self.hashes(&Sha256::digest(token))
    }

    /// One-way fingerprints of the current and the previous pepper, current first. The store keeps
    /// them, so that a start with a pepper that does not match the stored credentials is detected.
    pub(crate) fn fingerprints(&self) -> Result<Vec<String>, Error> {
        let mut fingerprints = vec![fingerprint(&self.current)?];
        fingerprints.extend(self.previous.as_ref().map(fingerprint).transpose()?);
        fingerprints.dedup();
        Ok(fingerprints)
    }

    /// The hash of a new key secret.
    pub(crate) fn hash_key(&self, key_secret: &SecretString) -> Result<String, Error> {
        let digest = key_format::digest(key_secret.expose_secret());
        let digest = digest.ok_or_else(|| anyhow::anyhow!("a minted key is not well-formed"))?;
        hash(&self.current, &digest)
    }

    /// The hash of a new refresh token.
    pub(crate) fn hash_token(&self, token: &str) -> Result<String, Error> {
        hash(&self.current, &Sha256::digest(token))
    }
}

/// The input that is hashed under a pepper to get its fingerprint. It cannot collide with the digest
/// of a credential, which has 32 bytes.
const FINGERPRINT_LABEL: &[u8] = b"hapa fingerprint of an API key pepper, version 1";

fn fingerprint(pepper: &SecretString) -> Result<String, Error> {
    let key = hash(pepper, FINGERPRINT_LABEL)?;
    Ok(hex::encode(Sha256::digest(key)))
}

fn hash(pepper: &SecretString, digest: &[u8]) -> Result<String, Error> {
    let mac = Hmac::<Sha256>::new_from_slice(pepper.expose_secret().as_bytes());
    let mac = mac.map_err(anyhow::Error::from)?.chain_update(digest);
    Ok(hex::encode(mac.finalize().into_bytes()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pepper(current: &str, previous: Option<&str>) -> Pepper {
        Pepper { current: current.into(), previous: previous.map(SecretString::from) }
    }

    proptest! {
        #[test]
        fn a_fingerprint_identifies_one_pepper_and_does_not_reveal_it(current in "\\PC{1,60}", previous in "\\PC{1,60}") {
            let fingerprints = pepper(&current, Some(&previous)).fingerprints().unwrap();
            prop_assert_eq!(&fingerprints[..1], &pepper(&current, None).fingerprints().unwrap()[..]);
            prop_assert_eq!(fingerprints.len() == 2, current != previous);
            for fingerprint in &fingerprints {
                prop_assert_eq!(fingerprint.len(), 64);
                prop_assert!(current.len() < 8 || !fingerprint.contains(&current));
            }
            // A fingerprint never equals the stored hash of a credential.
            let hashes = pepper(&current, None).hashes(&[0; 32]).unwrap();
            prop_assert!(!fingerprints.contains(&hashes.current));
        }
    }
}
