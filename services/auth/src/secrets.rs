//! The secrets of the settings: taken, made where none is set, or refused by name.
//!
//! Each may have another beside it, which counts too while one takes the other's place.

use std::collections::HashSet;
use std::path::Path;

use hapa_chassis::{config, secret};
use secrecy::{ExposeSecret as _, SecretString};

use crate::Config;
use crate::pepper::Pepper;
use crate::token::{Pair, Tokens};

/// Fewest different characters of a secret that an operator sets in production.
const FEWEST_DISTINCT: usize = 10;
/// Parts of secrets that stand in examples.
const WELL_KNOWN: &[&str] = &[
    "changeme",
    "change-me",
    "your-secret",
    "secret-key",
    "default",
    "password",
    "example",
    "insecure",
    "development",
];

/// What stored credentials are hashed with.
pub(crate) fn pepper(config: &Config, server: &config::Config) -> anyhow::Result<Pepper> {
    let own = secret::set("API_KEY_PEPPER", config.api_key_pepper.as_ref())?;
    needed("API_KEY_PEPPER", own.is_some(), server)?;
    let also = secret::set("API_KEY_PEPPER_ALSO", config.api_key_pepper_also.as_ref())?;
    let own = secret::set_or_kept(own, &server.data_dir.join("key-pepper"))?;
    Ok(Pepper { own, also: also.cloned() })
}

/// What access tokens are signed with.
pub(crate) fn tokens(config: &Config, server: &config::Config) -> anyhow::Result<Tokens> {
    let own = secret::set("SECRET_KEY", config.secret_key.as_ref())?;
    let also = secret::set("SECRET_KEY_ALSO", config.secret_key_also.as_ref())?;
    let file = named(config.session_key_file.as_deref());
    needed("SECRET_KEY", own.is_some() || file.is_some(), server)?;
    if server.environment == config::Environment::Production {
        for (name, secret) in [("SECRET_KEY", own), ("SECRET_KEY_ALSO", also)] {
            secret.map_or(Ok(()), |secret| hard_to_guess(name, secret))?;
        }
    }
    let own = match file {
        Some(file) => Pair::of_file("SESSION_KEY_FILE", file)?,
        None => Pair::of_secret(&secret::set_or_kept(own, &server.data_dir.join("secret-key"))?),
    };
    let file = named(config.session_key_file_also.as_deref());
    let file = file.map(|file| Pair::of_file("SESSION_KEY_FILE_ALSO", file)).transpose()?;
    Ok(Tokens::new(own, also.map(Pair::of_secret).into_iter().chain(file).collect()))
}

fn named(file: Option<&Path>) -> Option<&Path> {
    file.filter(|file| !file.as_os_str().is_empty())
}

fn needed(name: &'static str, is_set: bool, server: &config::Config) -> Result<(), config::Wrong> {
    if !is_set && server.environment == config::Environment::Production {
        return Err(config::Wrong::new(name, "must be set when ENVIRONMENT is production"));
    }
    Ok(())
}

/// Refuses a secret that could be guessed.
fn hard_to_guess(name: &'static str, secret: &SecretString) -> Result<(), config::Wrong> {
    let wrong = |problem: &str| Err(config::Wrong::new(name, problem));
    let text = secret.expose_secret();
    let lower = text.to_lowercase();
    if let Some(known) = WELL_KNOWN.iter().find(|known| lower.contains(**known)) {
        return wrong(&format!("has {known:?} in it: make one with `openssl rand -hex 32`"));
    }
    if text.chars().collect::<HashSet<_>>().len() < FEWEST_DISTINCT {
        return wrong("repeats itself: make one with `openssl rand -hex 32`");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECRET: &str = "q8Zt0rW3mXv7Kc1Ly5Nb9Hd2Jf6Gp4Sa";

    #[test]
    fn a_secret_that_could_be_guessed_is_refused() {
        let check = |text: &str, production| {
            let secret = SecretString::from(text);
            secret::set("SECRET_KEY", Some(&secret)).map_err(|wrong| wrong.problem)?;
            let guessed = if production { hard_to_guess("SECRET_KEY", &secret) } else { Ok(()) };
            guessed.map_err(|wrong| wrong.problem)
        };
        for production in [true, false] {
            assert!(check(&SECRET[1..], production).unwrap_err().contains("32 characters"));
            assert!(check(SECRET, production).is_ok());
        }
        for known in WELL_KNOWN {
            let text = format!("{SECRET}{}", known.to_uppercase());
            assert!(check(&text, true).unwrap_err().contains(known));
            assert!(check(&text, false).is_ok());
        }
        assert!(check(&"123456789".repeat(4), true).unwrap_err().contains("repeats"));
        assert!(check(&"1234567890".repeat(4), true).is_ok());
    }
}
