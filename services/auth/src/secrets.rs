//! Loads the pepper and the signing keys: from the settings, or generated into DATA_DIR where none is set.
//!
//! Each may have a previous one beside it, which stays valid while a secret is being replaced.

use std::path::Path;
use std::sync::Arc;

use hapa_chassis::hangup::at_each_hangup;
use hapa_chassis::{config, secret};
use secrecy::SecretString;

use crate::Config;
use crate::access_token::{AccessTokens, SigningKey};
use crate::pepper::Pepper;

/// Rejects missing and weak secrets by the name of their setting. Generates none.
pub(crate) fn check(config: &Config, server: &config::Config) -> Result<(), config::Wrong> {
    let pepper = validated("API_KEY_PEPPER", config.api_key_pepper.as_ref(), server)?;
    require_in_production("API_KEY_PEPPER", pepper.is_some(), server)?;
    validated("API_KEY_PEPPER_PREVIOUS", config.api_key_pepper_previous.as_ref(), server)?;
    let secret = validated("SECRET_KEY", config.secret_key.as_ref(), server)?;
    validated("SECRET_KEY_PREVIOUS", config.secret_key_previous.as_ref(), server)?;
    let file = non_empty(config.session_key_file.as_deref());
    require_in_production("SECRET_KEY", secret.is_some() || file.is_some(), server)
}

/// The pepper of stored credentials; generated if none is set.
pub(crate) fn pepper(config: &Config, server: &config::Config) -> anyhow::Result<Pepper> {
    let current = validated("API_KEY_PEPPER", config.api_key_pepper.as_ref(), server)?;
    let current = secret::set_or_kept(current, &server.data_dir.join("key-pepper"))?;
    let previous =
        validated("API_KEY_PEPPER_PREVIOUS", config.api_key_pepper_previous.as_ref(), server)?;
    Ok(Pepper { current, previous: previous.cloned() })
}

/// The pepper that is set or was generated before. Generates none.
pub(crate) fn existing_pepper(
    config: &Config,
    server: &config::Config,
) -> anyhow::Result<Option<Pepper>> {
    let is_set = validated("API_KEY_PEPPER", config.api_key_pepper.as_ref(), server)?.is_some();
    let exists = is_set || server.data_dir.join("key-pepper").exists();
    exists.then(|| pepper(config, server)).transpose()
}

/// The keys that sign and verify access tokens; a secret is generated if none is set.
pub(crate) fn tokens(config: &Config, server: &config::Config) -> anyhow::Result<AccessTokens> {
    let current = validated("SECRET_KEY", config.secret_key.as_ref(), server)?;
    let previous = validated("SECRET_KEY_PREVIOUS", config.secret_key_previous.as_ref(), server)?;
    let current = match non_empty(config.session_key_file.as_deref()) {
        Some(file) => SigningKey::from_file("SESSION_KEY_FILE", file)?,
        None => SigningKey::from_secret(&secret::set_or_kept(
            current,
            &server.data_dir.join("secret-key"),
        )?),
    };
    let previous_file = non_empty(config.session_key_file_previous.as_deref());
    let previous_file = previous_file
        .map(|file| SigningKey::from_file("SESSION_KEY_FILE_PREVIOUS", file))
        .transpose()?;
    Ok(AccessTokens::new(
        current,
        previous.map(SigningKey::from_secret).into_iter().chain(previous_file).collect(),
    ))
}

/// Reloads the key files at each SIGHUP, if any are set. Unusable files leave the current keys in use.
pub(crate) async fn reload_on_sighup(
    (config, server): (Config, config::Config),
    tokens: Arc<AccessTokens>,
) {
    let files = [&config.session_key_file, &config.session_key_file_previous];
    if !files.into_iter().any(|file| non_empty(file.as_deref()).is_some()) {
        return;
    }
    at_each_hangup(|| match self::tokens(&config, &server) {
        Ok(read) => {
            tokens.replace(&read);
            tracing::info!("reloaded the signing keys of access tokens");
        }
        Err(error) => {
            let cause = format!("{error:#}");
            tracing::error!(
                cause,
                "cannot reload the signing keys of access tokens; the current keys stay in use"
            );
        }
    })
    .await;
}

fn validated<'a>(
    name: &'static str,
    secret: Option<&'a SecretString>,
    server: &config::Config,
) -> Result<Option<&'a SecretString>, config::Wrong> {
    secret::set(name, secret, server.secret_strength())
}

fn non_empty(file: Option<&Path>) -> Option<&Path> {
    file.filter(|file| !file.as_os_str().is_empty())
}

fn require_in_production(
    name: &'static str,
    is_set: bool,
    server: &config::Config,
) -> Result<(), config::Wrong> {
    if !is_set && server.environment == config::Environment::Production {
        return Err(config::Wrong::new(name, "must be set when ENVIRONMENT is production"));
    }
    Ok(())
}
