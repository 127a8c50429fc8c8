//! Generates random ids of users and sessions, and refresh tokens.

use rand::RngExt as _;
use rand::distr::Alphanumeric;
use secrecy::SecretString;

/// `usr_` and 16 letters and digits.
pub(crate) fn new_user_id() -> String {
    random_id("usr_", 16)
}

/// `ses_` and 16 letters and digits.
pub(crate) fn new_session_id() -> String {
    random_id("ses_", 16)
}

/// `hapr_` and 43 letters and digits, which are 256 random bits.
pub(crate) fn new_refresh_token() -> SecretString {
    SecretString::from(random_id("hapr_", 43))
}

fn random_id(prefix: &str, length: usize) -> String {
    let letters = rand::rng().sample_iter(Alphanumeric).take(length).map(char::from);
    prefix.chars().chain(letters).collect()
}
