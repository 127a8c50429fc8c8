//! The secrets of the settings: taken, made where none is set, or refused by name.
//!
//! Each may have another beside it, which counts too while one takes the other's place.

use std::path::Path;
use std::sync::Arc;

use hapa_chassis::hangup::at_each_hangup;
use hapa_chassis::{config, secret};
use secrecy::SecretString;

use crate::Config;
use crate::pepper::Pepper;
use crate::token::{Pair, Tokens};

/// Refuses secrets that are missing or weak, by name, and makes none.
pub(crate) fn check(config: &Config, server: &config::Config) -> Result<(), config::Wrong> {
    let pepper = set("API_KEY_PEPPER", config.api_key_pepper.as_ref(), server)?;
    needed("API_KEY_PEPPER", pepper.is_some(), server)?;
    set("API_KEY_PEPPER_ALSO", config.api_key_pepper_also.as_ref(), server)?;
    let secret = set("SECRET_KEY", config.secret_key.as_ref(), server)?;
    set("SECRET_KEY_ALSO", config.secret_key_also.as_ref(), server)?;
    let file = named(config.session_key_file.as_deref());
    needed("SECRET_KEY", secret.is_some() || file.is_some(), server)
}

/// What stored credentials are hashed with.
pub(crate) fn pepper(config: &Config, server: &config::Config) -> anyhow::Result<Pepper> {
    let own = set("API_KEY_PEPPER", config.api_key_pepper.as_ref(), server)?;
    let own = secret::set_or_kept(own, &server.data_dir.join("key-pepper"))?;
    let also = set("API_KEY_PEPPER_ALSO", config.api_key_pepper_also.as_ref(), server)?;
    Ok(Pepper { own, also: also.cloned() })
}

/// The same where it is set or was made before; none is made.
pub(crate) fn known_pepper(
    config: &Config,
    server: &config::Config,
) -> anyhow::Result<Option<Pepper>> {
    let is_set = set("API_KEY_PEPPER", config.api_key_pepper.as_ref(), server)?.is_some();
    let is_known = is_set || server.data_dir.join("key-pepper").exists();
    is_known.then(|| pepper(config, server)).transpose()
}

/// What access tokens are signed with.
pub(crate) fn tokens(config: &Config, server: &config::Config) -> anyhow::Result<Tokens> {
    let own = set("SECRET_KEY", config.secret_key.as_ref(), server)?;
    let also = set("SECRET_KEY_ALSO", config.secret_key_also.as_ref(), server)?;
    let own = match named(config.session_key_file.as_deref()) {
        Some(file) => Pair::of_file("SESSION_KEY_FILE", file)?,
        None => Pair::of_secret(&secret::set_or_kept(own, &server.data_dir.join("secret-key"))?),
    };
    let file = named(config.session_key_file_also.as_deref());
    let file = file.map(|file| Pair::of_file("SESSION_KEY_FILE_ALSO", file)).transpose()?;
    Ok(Tokens::new(own, also.map(Pair::of_secret).into_iter().chain(file).collect()))
}

/// Reads key files anew at each SIGHUP, where any are set. Files that can't be used change nothing.
pub(crate) async fn follow((config, server): (Config, config::Config), tokens: Arc<Tokens>) {
    let files = [&config.session_key_file, &config.session_key_file_also];
    if !files.into_iter().any(|file| named(file.as_deref()).is_some()) {
        return;
    }
    at_each_hangup(|| match self::tokens(&config, &server) {
        Ok(read) => {
            tokens.replace(&read);
            tracing::info!("the keys that sign access tokens were read again");
        }
        Err(error) => {
            let why = format!("{error:#}");
            tracing::error!(why, "the keys that sign access tokens stay as they were");
        }
    })
    .await;
}

fn set<'a>(
    name: &'static str,
    secret: Option<&'a SecretString>,
    server: &config::Config,
) -> Result<Option<&'a SecretString>, config::Wrong> {
    secret::set(name, secret, server.secret_strength())
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
