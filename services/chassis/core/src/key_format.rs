//! The text of an API key: `hapa_`, a public id (12), a secret (32) and a checksum (6), in letters
//! and digits. The checksum refuses a typo without asking anyone; 32 of 62 characters are 190 bits.

use rand::RngExt as _;
use rand::distr::Alphanumeric;
use secrecy::SecretString;
use sha2::{Digest as _, Sha256};

const PREFIX: &str = "hapa_";
const ID: usize = 12;
const SECRET: usize = 32;
const CHECKSUM: usize = 6;
const LENGTH: usize = PREFIX.len() + ID + SECRET + CHECKSUM;

/// SHA-256 of a key's text: what travels and what caches hold.
pub type KeyDigest = [u8; 32];

/// A new key: its public id and its text.
pub fn mint() -> (String, SecretString) {
    let body: String =
        rand::rng().sample_iter(Alphanumeric).take(ID + SECRET).map(char::from).collect();
    let text = format!("{PREFIX}{body}");
    let checksum = checksum(&text);
    (format!("key_{}", &body[..ID]), SecretString::from(text + &checksum))
}

/// Another text for a key that has one; none where its id is no public id.
pub fn renew(key_id: &str) -> Option<SecretString> {
    let id = key_id.strip_prefix("key_").filter(|id| id.len() == ID)?;
    let secret = rand::rng().sample_iter(Alphanumeric).take(SECRET).map(char::from);
    let text: String = PREFIX.chars().chain(id.chars()).chain(secret).collect();
    let checksum = checksum(&text);
    Some(SecretString::from(text + &checksum))
}

/// Digests a presented text, none where it can't be a key: wrong form or mistyped.
pub fn digest(text: &str) -> Option<KeyDigest> {
    let well_formed = text.len() == LENGTH
        && text.strip_prefix(PREFIX)?.bytes().all(|byte| byte.is_ascii_alphanumeric());
    let (body, tail) = text.split_at_checked(LENGTH - CHECKSUM)?;
    (well_formed && checksum(body) == tail).then(|| Sha256::digest(text).into())
}

/// CRC-32 in base 62, fixed width: 62^6 > 2^32.
fn checksum(body: &str) -> String {
    const DIGITS: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
    let mut rest = crc32fast::hash(body.as_bytes()) as usize;
    let mut digits = [0; CHECKSUM];
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
    fn a_minted_key_is_well_formed_and_no_two_are_alike() {
        let (id, text) = mint();
        assert!(digest(text.expose_secret()).is_some());
        assert!(text.expose_secret().contains(id.strip_prefix("key_").unwrap()));
        assert_ne!(text.expose_secret(), mint().1.expose_secret());
    }

    #[test]
    fn a_renewed_key_keeps_its_id_and_nothing_else() {
        let (id, text) = mint();
        let renewed = renew(&id).unwrap();
        assert!(digest(renewed.expose_secret()).is_some());
        let begin = PREFIX.len() + ID;
        assert_eq!(text.expose_secret()[..begin], renewed.expose_secret()[..begin]);
        assert_ne!(text.expose_secret()[begin..], renewed.expose_secret()[begin..]);
        assert!(renew("key_short").is_none());
    }

    proptest! {
        #[test]
        fn one_mistyped_character_is_always_noticed(at in 0..LENGTH, typed in "[ -~]") {
            let (_, text) = mint();
            let mut mistyped = text.expose_secret().to_owned();
            mistyped.replace_range(at..=at, &typed);
            prop_assume!(mistyped != text.expose_secret());
            prop_assert_eq!(digest(&mistyped), None);
        }

        #[test]
        fn no_text_makes_it_panic(text in "\\PC{0,80}") {
            prop_assert_eq!(digest(&text), None);
        }
    }
}
