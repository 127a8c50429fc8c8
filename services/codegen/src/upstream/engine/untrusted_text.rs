//! The error texts of engines. They may repeat a prompt or a key, so they are dropped by default. With
//! LOG_ENGINE_ERRORS they are logged at debug, with secrets removed and truncated.

use std::fmt;
use std::sync::Arc;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use hapa_core::redaction::redact_secrets;
use hapa_core::rpc_error::error_chain_text;
use reqwest::Url;
use secrecy::{ExposeSecret as _, SecretString};

use crate::upstream::engine::{EngineError, TransportError};

/// Maximum length of one logged text, in characters.
const MAX_LOGGED_LEN: usize = 2_000;
const REMOVED: &str = "[removed]";

/// Options for the clients of all engines.
#[derive(Clone, Debug, Default)]
pub(crate) struct EngineOptions {
    /// AI_MODEL_API_KEY, trimmed, because a key file may end with a line end.
    pub(super) key: Option<SecretString>,
    /// LOG_ENGINE_ERRORS.
    log_errors: bool,
}

impl EngineOptions {
    pub(crate) fn new(key: Option<&SecretString>, log_errors: bool) -> EngineOptions {
        let key = key.map(|key| key.expose_secret().trim()).filter(|key| !key.is_empty());
        EngineOptions { key: key.map(SecretString::from), log_errors }
    }
}

/// Logs an engine's error texts, if enabled. Holds the secrets to remove.
#[derive(Clone)]
pub(super) struct UntrustedTextLog(Option<Arc<[SecretString]>>);

impl fmt::Debug for UntrustedTextLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("UntrustedTextLog").field(&self.0.is_some()).finish()
    }
}

impl UntrustedTextLog {
    /// For the engine at this base URL. Its user name and password count as secrets.
    pub(super) fn new(options: &EngineOptions, base: &Url) -> UntrustedTextLog {
        let secrets = || {
            let mut secrets: Vec<_> = options.key.clone().into_iter().collect();
            if !base.username().is_empty() || base.password().is_some() {
                let (user, password) = (base.username(), base.password().unwrap_or_default());
                let encoded =
                    [password.to_owned(), BASE64_STANDARD.encode(format!("{user}:{password}"))];
                secrets.extend(encoded.map(SecretString::from));
            }
            secrets.retain(|secret| !secret.expose_secret().is_empty());
            secrets.into()
        };
        UntrustedTextLog(options.log_errors.then(secrets))
    }

    /// Logs the text, if enabled.
    pub(super) fn log(&self, what: &'static str, text: &[u8]) {
        let Some(secrets) = &self.0 else { return };
        let text = redact(&String::from_utf8_lossy(text), secrets);
        // Quoted, so that no text can imitate a log line.
        tracing::debug!(text = ?text, "{what}");
    }

    /// Converts an error of an open connection. It contains no text.
    pub(super) fn transport_error(&self, error: TransportError) -> EngineError {
        self.log("a connection to an engine failed", error.to_string().as_bytes());
        EngineError::Unreachable(error)
    }

    /// Logs the causes of a connection error, and converts it.
    pub(super) fn connection_error(&self, error: &reqwest::Error) -> EngineError {
        if self.0.is_some() {
            self.log("a connection to an engine failed", error_chain_text(error).as_bytes());
        }
        error.into()
    }
}

fn redact(text: &str, secrets: &[SecretString]) -> String {
    let mut text = text.to_owned();
    for secret in secrets {
        text = text.replace(secret.expose_secret(), REMOVED);
    }
    redact_secrets(&text, MAX_LOGGED_LEN)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn url(text: &str) -> Url {
        text.parse().unwrap()
    }

    #[test]
    fn logged_text_has_no_secrets_and_is_truncated() {
        let key = SecretString::from("operator-engine-key-42\n");
        let options = EngineOptions::new(Some(&key), true);
        let text_log = UntrustedTextLog::new(&options, &url("http://me:pass-word@engine/v1"));
        let secrets = text_log.0.unwrap();
        let basic = BASE64_STANDARD.encode("me:pass-word");
        let text = format!("got operator-engine-key-42, pass-word and Basic {basic}.");
        let clean = redact(&text, &secrets);
        assert_eq!(clean, "got [removed], [removed] and Basic [removed].");
        assert!(redact(&"word ".repeat(10_000), &secrets).chars().count() <= MAX_LOGGED_LEN);
    }

    #[test]
    fn without_the_setting_no_text_and_no_secret_is_kept() {
        let key = SecretString::from(" \n");
        let options = EngineOptions::new(Some(&key), false);
        assert!(options.key.is_none());
        assert!(UntrustedTextLog::new(&options, &url("http://engine/v1")).0.is_none());
    }
}
