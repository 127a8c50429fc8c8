//! Loads the pepper and the signing keys: from the settings, or generated into DATA_DIR where none is set.
//!
//! Each may have a previous one beside it, which stays valid while a secret is being replaced.

use std::path::Path;
use std::sync::Arc;

use hapa_core::config::{CommonConfig, ConfigError, Environment};
use hapa_core::secret;
use hapa_core::sighup::on_sighup;
use secrecy::SecretString;

use crate::Config;
use crate::access_token::{AccessTokens, SigningKey};
use crate::pepper::Pepper;

/// Rejects missing and weak secrets by the name of their setting. Generates none.
pub(crate) fn check(config: &Config, common: &CommonConfig) -> Result<(), ConfigError> {
    let pepper = validated("API_KEY_PEPPER", config.api_key_pepper.as_ref(), common)?;
    require_in_production("API_KEY_PEPPER", pepper.is_some(), common)?;
    validated("API_KEY_PEPPER_PREVIOUS", config.api_key_pepper_previous.as_ref(), common)?;
    let secret = validated("SECRET_KEY", config.secret_key.as_ref(), common)?;
    validated("SECRET_KEY_PREVIOUS", config.secret_key_previous.as_ref(), common)?;
    let file = non_empty(config.session_key_file.as_deref());
    require_in_production("SECRET_KEY", secret.is_some() || file.is_some(), common)
}

/// The pepper of stored credentials; generated if none is set.
pub(crate) fn pepper(config: &Config, common: &CommonConfig) -> anyhow::Result<Pepper> {
    let current = validated("API_KEY_PEPPER", config.api_key_pepper.as_ref(), common)?;
    let current = secret::load_or_generate(current, &common.data_dir.join("key-pepper"))?;
    let previous =
        validated("API_KEY_PEPPER_PREVIOUS", config.api_key_pepper_previous.as_ref(), common)?;
    Ok(Pepper { current, previous: previous.cloned() })
}

/// The pepper that is set or was generated before. Generates none.
pub(crate) fn existing_pepper(
    config: &Config,
    common: &CommonConfig,
) -> anyhow::Result<Option<Pepper>> {
    let is_set = validated("API_KEY_PEPPER", config.api_key_pepper.as_ref(), common)?.is_some();
    let exists = is_set || common.data_dir.join("key-pepper").exists();
    exists.then(|| pepper(config, common)).transpose()
}

/// The keys that sign and verify access tokens; a secret is generated if none is set.
pub(crate) fn tokens(config: &Config, common: &CommonConfig) -> anyhow::Result<AccessTokens> {
    let current = validated("SECRET_KEY", config.secret_key.as_ref(), common)?;
    let previous = validated("SECRET_KEY_PREVIOUS", config.secret_key_previous.as_ref(), common)?;
    let current = match non_empty(config.session_key_file.as_deref()) {
        Some(file) => SigningKey::from_file("SESSION_KEY_FILE", file)?,
        None => SigningKey::from_secret(&secret::load_or_generate(
            current,
            &common.data_dir.join("secret-key"),
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
    (config, common): (Config, CommonConfig),
    tokens: Arc<AccessTokens>,
) {
    let files = [&config.session_key_file, &config.session_key_file_previous];
    if !files.into_iter().any(|file| non_empty(file.as_deref()).is_some()) {
        return;
    }
    on_sighup(|| match self::tokens(&config, &common) {
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
    common: &CommonConfig,
) -> Result<Option<&'a SecretString>, ConfigError> {
    secret::validate_configured(name, secret, common.secret_strength())
}

fn non_empty(file: Option<&Path>) -> Option<&Path> {
    file.filter(|file| !file.as_os_str().is_empty())
}

fn require_in_production(
    name: &'static str,
    is_set: bool,
    common: &CommonConfig,
) -> Result<(), ConfigError> {
    if !is_set && common.environment == Environment::Production {
        return Err(ConfigError::new(name, "must be set when ENVIRONMENT is production"));
    }
    Ok(())
}
