//! What the store keeps of credentials: hashes under a secret that is not in it.
//!
//! Kept true: new hashes are made under one pepper; what is presented is looked for under that and,
//! while one takes the other's place, under another.

use hapa_core::key_format;
use hmac::{Hmac, KeyInit as _, Mac as _};
use secrecy::{ExposeSecret as _, SecretString};
use sha2::{Digest as _, Sha256};

use crate::error::Error;

/// The secrets that stored credentials are hashed with.
#[derive(Clone)]
pub(crate) struct Pepper {
    pub(crate) own: SecretString,
    /// Another, under which credentials may be kept too.
    pub(crate) also: Option<SecretString>,
}

/// What the store may keep of one credential. Ordered, so that rows are locked in one order.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(crate) struct Hashes {
    /// What it keeps from now on.
    pub(crate) own: String,
    /// Under the other pepper; without one the same.
    pub(crate) also: String,
}

impl Pepper {
    /// What the store may keep of a credential whose SHA-256 this is.
    pub(crate) fn hashes(&self, digest: &[u8]) -> Result<Hashes, Error> {
        let own = hash(&self.own, digest)?;
        let also = self.also.as_ref().map(|pepper| hash(pepper, digest)).transpose()?;
        Ok(Hashes { also: also.unwrap_or_else(|| own.clone()), own })
    }

    /// What the store may keep of a text that is no key.
    pub(crate) fn hashes_of_text(&self, text: &str) -> Result<Hashes, Error> {
        self.hashes(&Sha256::digest(text))
    }

    /// Names of the peppers in force, own first, from which neither can be told. They are kept in the store,
    /// which so knows whether a pepper is the one that its credentials were hashed with.
    pub(crate) fn fingerprints(&self) -> Result<Vec<String>, Error> {
        let mut names = vec![fingerprint(&self.own)?];
        names.extend(self.also.as_ref().map(fingerprint).transpose()?);
        names.dedup();
        Ok(names)
    }

    /// What the store keeps of a new key.
    pub(crate) fn hash_key(&self, text: &SecretString) -> Result<String, Error> {
        let digest = key_format::digest(text.expose_secret());
        let digest = digest.ok_or_else(|| anyhow::anyhow!("a minted key is not well-formed"))?;
        hash(&self.own, &digest)
    }

    /// What the store keeps of any other new text.
    pub(crate) fn hash_text(&self, text: &str) -> Result<String, Error> {
        hash(&self.own, &Sha256::digest(text))
    }
}

/// What a pepper is named by, in place of a digest. No credential digests to it: those are 32 bytes.
const FINGERPRINT: &[u8] = b"hapa fingerprint of an API key pepper, version 1";

fn fingerprint(pepper: &SecretString) -> Result<String, Error> {
    let key = hash(pepper, FINGERPRINT)?;
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

    fn pepper(own: &str, also: Option<&str>) -> Pepper {
        Pepper { own: own.into(), also: also.map(SecretString::from) }
    }

    proptest! {
        #[test]
        fn a_fingerprint_is_one_pepper_s_and_tells_nothing_of_it(own in "\\PC{1,60}", also in "\\PC{1,60}") {
            let names = pepper(&own, Some(&also)).fingerprints().unwrap();
            prop_assert_eq!(&names[..1], &pepper(&own, None).fingerprints().unwrap()[..]);
            prop_assert_eq!(names.len() == 2, own != also);
            for name in &names {
                prop_assert_eq!(name.len(), 64);
                prop_assert!(own.len() < 8 || !name.contains(&own));
            }
            // Nor is it what any credential is kept as.
            let hashes = pepper(&own, None).hashes(&[0; 32]).unwrap();
            prop_assert!(!names.contains(&hashes.own));
        }
    }
}
