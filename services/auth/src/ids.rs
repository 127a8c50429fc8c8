//! Names that are made here: ids of users and sessions, and refresh tokens.

use rand::RngExt as _;
use rand::distr::Alphanumeric;
use secrecy::SecretString;

/// `usr_` and 16 letters and digits.
pub(crate) fn user() -> String {
    random("usr_", 16)
}

/// `ses_` and 16 letters and digits.
pub(crate) fn session() -> String {
    random("ses_", 16)
}

/// 43 of 62 characters are 256 bits.
pub(crate) fn refresh_token() -> SecretString {
    SecretString::from(random("hapr_", 43))
}

fn random(prefix: &str, length: usize) -> String {
    let letters = rand::rng().sample_iter(Alphanumeric).take(length).map(char::from);
    prefix.chars().chain(letters).collect()
}
