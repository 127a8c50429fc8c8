//! The secrets of the settings: taken, made where none is set, or refused by name.
//!
//! Each may have another beside it, which counts too while one takes the other's place.

use std::path::Path;
use std::sync::Arc;

use hapa_core::config::{CommonConfig, Environment, Wrong};
use hapa_core::secret;
use hapa_core::sighup::at_each_hangup;
use secrecy::SecretString;

use crate::Config;
use crate::pepper::Pepper;
use crate::token::{Pair, Tokens};

/// Refuses secrets that are missing or weak, by name, and makes none.
pub(crate) fn check(config: &Config, common: &CommonConfig) -> Result<(), Wrong> {
    let pepper = set("API_KEY_PEPPER", config.api_key_pepper.as_ref(), common)?;
    needed("API_KEY_PEPPER", pepper.is_some(), common)?;
    set("API_KEY_PEPPER_ALSO", config.api_key_pepper_also.as_ref(), common)?;
    let secret = set("SECRET_KEY", config.secret_key.as_ref(), common)?;
    set("SECRET_KEY_ALSO", config.secret_key_also.as_ref(), common)?;
    let file = named(config.session_key_file.as_deref());
    needed("SECRET_KEY", secret.is_some() || file.is_some(), common)
}

/// What stored credentials are hashed with.
pub(crate) fn pepper(config: &Config, common: &CommonConfig) -> anyhow::Result<Pepper> {
    let own = set("API_KEY_PEPPER", config.api_key_pepper.as_ref(), common)?;
    let own = secret::set_or_kept(own, &common.data_dir.join("key-pepper"))?;
    let also = set("API_KEY_PEPPER_ALSO", config.api_key_pepper_also.as_ref(), common)?;
    Ok(Pepper { own, also: also.cloned() })
}

/// The same where it is set or was made before; none is made.
pub(crate) fn known_pepper(
    config: &Config,
    common: &CommonConfig,
) -> anyhow::Result<Option<Pepper>> {
    let is_set = set("API_KEY_PEPPER", config.api_key_pepper.as_ref(), common)?.is_some();
    let is_known = is_set || common.data_dir.join("key-pepper").exists();
    is_known.then(|| pepper(config, common)).transpose()
}

/// What access tokens are signed with.
pub(crate) fn tokens(config: &Config, common: &CommonConfig) -> anyhow::Result<Tokens> {
    let own = set("SECRET_KEY", config.secret_key.as_ref(), common)?;
    let also = set("SECRET_KEY_ALSO", config.secret_key_also.as_ref(), common)?;
    let own = match named(config.session_key_file.as_deref()) {
        Some(file) => Pair::of_file("SESSION_KEY_FILE", file)?,
        None => Pair::of_secret(&secret::set_or_kept(own, &common.data_dir.join("secret-key"))?),
    };
    let file = named(config.session_key_file_also.as_deref());
    let file = file.map(|file| Pair::of_file("SESSION_KEY_FILE_ALSO", file)).transpose()?;
    Ok(Tokens::new(own, also.map(Pair::of_secret).into_iter().chain(file).collect()))
}

/// Reads key files anew at each SIGHUP, where any are set. Files that can't be used change nothing.
pub(crate) async fn follow((config, common): (Config, CommonConfig), tokens: Arc<Tokens>) {
    let files = [&config.session_key_file, &config.session_key_file_also];
    if !files.into_iter().any(|file| named(file.as_deref()).is_some()) {
        return;
    }
    at_each_hangup(|| match self::tokens(&config, &common) {
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
    common: &CommonConfig,
) -> Result<Option<&'a SecretString>, Wrong> {
    secret::set(name, secret, common.secret_strength())
}

fn named(file: Option<&Path>) -> Option<&Path> {
    file.filter(|file| !file.as_os_str().is_empty())
}

fn needed(name: &'static str, is_set: bool, common: &CommonConfig) -> Result<(), Wrong> {
    if !is_set && common.environment == Environment::Production {
        return Err(Wrong::new(name, "must be set when ENVIRONMENT is production"));
    }
    Ok(())
}
