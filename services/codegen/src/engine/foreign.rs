//! An engine's own text about its failures. It may repeat a prompt or a key, so it is dropped; an operator
//! who asks for it (LOG_ENGINE_ERRORS) finds it in the log at debug, without secrets and cut short.

use std::fmt;
use std::sync::Arc;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use hapa_core::redaction::scrub;
use hapa_core::rpc_error::chain;
use reqwest::Url;
use secrecy::{ExposeSecret as _, SecretString};

use crate::engine::Error;

/// Characters of one text that are logged.
const MAX_LOGGED: usize = 2_000;
const REMOVED: &str = "[removed]";

/// How engines are asked.
#[derive(Clone, Debug, Default)]
pub(crate) struct EngineAccess {
    /// AI_MODEL_API_KEY, without white space around it: a file ends with a line end.
    pub(super) key: Option<SecretString>,
    /// LOG_ENGINE_ERRORS.
    log_errors: bool,
}

impl EngineAccess {
    pub(crate) fn new(key: Option<&SecretString>, log_errors: bool) -> EngineAccess {
        let key = key.map(|key| key.expose_secret().trim()).filter(|key| !key.is_empty());
        EngineAccess { key: key.map(SecretString::from), log_errors }
    }
}

/// Where an engine's text goes.
#[derive(Clone)]
pub(super) struct ForeignText(Option<Arc<[SecretString]>>);

impl fmt::Debug for ForeignText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ForeignText").field(&self.0.is_some()).finish()
    }
}

impl ForeignText {
    /// Of an engine at this endpoint.
    pub(super) fn new(access: &EngineAccess, endpoint: &str) -> ForeignText {
        let secrets = || {
            let mut secrets: Vec<_> = access.key.clone().into_iter().collect();
            let url: Option<Url> = endpoint.parse().ok();
            if let Some(url) =
                url.filter(|url| !url.username().is_empty() || url.password().is_some())
            {
                let (user, password) = (url.username(), url.password().unwrap_or_default());
                let shown =
                    [password.to_owned(), BASE64_STANDARD.encode(format!("{user}:{password}"))];
                secrets.extend(shown.map(SecretString::from));
            }
            secrets.retain(|secret| !secret.expose_secret().is_empty());
            secrets.into()
        };
        ForeignText(access.log_errors.then(secrets))
    }

    /// Logs it where that is asked for.
    pub(super) fn log(&self, what: &'static str, text: &[u8]) {
        let Some(secrets) = &self.0 else { return };
        let text = cleaned(&String::from_utf8_lossy(text), secrets);
        // Quoted, so that no text can look like another line.
        tracing::debug!(text = ?text, "{what}");
    }

    /// A connection that broke.
    pub(super) fn broken(&self, error: &reqwest::Error) -> Error {
        if self.0.is_some() {
            self.log("a connection to an engine failed", chain(error).as_bytes());
        }
        error.into()
    }
}

fn cleaned(text: &str, secrets: &[SecretString]) -> String {
    let mut text = text.to_owned();
    for secret in secrets {
        text = text.replace(secret.expose_secret(), REMOVED);
    }
    scrub(&text, MAX_LOGGED)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_logged_has_no_secret_and_an_end() {
        let key = SecretString::from("operator-engine-key-42\n");
        let access = EngineAccess::new(Some(&key), true);
        let foreign = ForeignText::new(&access, "http://me:pass-word@engine/v1");
        let secrets = foreign.0.unwrap();
        let basic = BASE64_STANDARD.encode("me:pass-word");
        let said = format!("got operator-engine-key-42, pass-word and Basic {basic}.");
        let clean = cleaned(&said, &secrets);
        assert_eq!(clean, "got [removed], [removed] and Basic [removed].");
        assert!(cleaned(&"word ".repeat(10_000), &secrets).chars().count() <= MAX_LOGGED);
    }

    #[test]
    fn nothing_is_kept_where_nobody_asks_for_it() {
        let key = SecretString::from(" \n");
        let access = EngineAccess::new(Some(&key), false);
        assert!(access.key.is_none());
        assert!(ForeignText::new(&access, "http://engine/v1").0.is_none());
    }
}
