//! The format of an API key: `hapa_`, a public id (12 characters), a random part (32) and a checksum (6), in letters
//! and digits. The checksum detects typos without a database lookup. 32 characters of 62 are 190 bits.

use rand::RngExt as _;
use rand::distr::Alphanumeric;
use secrecy::SecretString;
use sha2::{Digest as _, Sha256};

const PREFIX: &str = "hapa_";
const ID_LEN: usize = 12;
const RANDOM_LEN: usize = 32;
const CHECKSUM_LEN: usize = 6;
const KEY_LEN: usize = PREFIX.len() + ID_LEN + RANDOM_LEN + CHECKSUM_LEN;

/// SHA-256 of a key's secret. Requests between services and caches contain the digest, never the secret.
pub type KeyDigest = [u8; 32];

/// Generates a key: its public id and its secret.
pub fn mint() -> (String, SecretString) {
    let body: String =
        rand::rng().sample_iter(Alphanumeric).take(ID_LEN + RANDOM_LEN).map(char::from).collect();
    let text = format!("{PREFIX}{body}");
    let checksum = checksum(&text);
    (format!("key_{}", &body[..ID_LEN]), SecretString::from(text + &checksum))
}

/// Generates a new secret for an existing key; `None` if `key_id` is not a key's public id.
pub fn renew(key_id: &str) -> Option<SecretString> {
    let id = key_id.strip_prefix("key_").filter(|id| id.len() == ID_LEN)?;
    let secret = rand::rng().sample_iter(Alphanumeric).take(RANDOM_LEN).map(char::from);
    let text: String = PREFIX.chars().chain(id.chars()).chain(secret).collect();
    let checksum = checksum(&text);
    Some(SecretString::from(text + &checksum))
}

/// The digest of a presented secret; `None` if its format or its checksum is wrong.
pub fn digest(text: &str) -> Option<KeyDigest> {
    let well_formed = text.len() == KEY_LEN
        && text.strip_prefix(PREFIX)?.bytes().all(|byte| byte.is_ascii_alphanumeric());
    let (body, tail) = text.split_at_checked(KEY_LEN - CHECKSUM_LEN)?;
    (well_formed && checksum(body) == tail).then(|| Sha256::digest(text).into())
}

/// CRC-32 in base 62 with 6 digits: 62^6 > 2^32.
fn checksum(body: &str) -> String {
    const DIGITS: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
    let mut rest = crc32fast::hash(body.as_bytes()) as usize;
    let mut digits = [0; CHECKSUM_LEN];
    for digit in digits.iter_mut().rev() {
        *digit = DIGITS[rest % 62];
        rest /= 62;
    }
    digits.map(char::from).iter().collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use secrecy::ExposeSecret as _;

    use super::*;

    #[test]
    fn a_minted_key_is_well_formed_and_unique() {
        let (id, text) = mint();
        assert!(digest(text.expose_secret()).is_some());
        assert!(text.expose_secret().contains(id.strip_prefix("key_").unwrap()));
        assert_ne!(text.expose_secret(), mint().1.expose_secret());
    }

    #[test]
    fn a_renewed_key_keeps_only_its_id() {
        let (id, text) = mint();
        let renewed = renew(&id).unwrap();
        assert!(digest(renewed.expose_secret()).is_some());
        let begin = PREFIX.len() + ID_LEN;
        assert_eq!(text.expose_secret()[..begin], renewed.expose_secret()[..begin]);
        assert_ne!(text.expose_secret()[begin..], renewed.expose_secret()[begin..]);
        assert!(renew("key_short").is_none());
    }

    proptest! {
        #[test]
        fn one_mistyped_character_is_always_detected(at in 0..KEY_LEN, typed in "[ -~]") {
            let (_, text) = mint();
            let mut mistyped = text.expose_secret().to_owned();
            mistyped.replace_range(at..=at, &typed);
            prop_assume!(mistyped != text.expose_secret());
            prop_assert_eq!(digest(&mistyped), None);
        }

        #[test]
        fn no_input_causes_a_panic(text in "\\PC{0,80}") {
            prop_assert_eq!(digest(&text), None);
        }
    }
}
