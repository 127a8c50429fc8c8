//! The effective settings of a process: name, value and source. Secrets are redacted.

use clap::parser::ValueSource;
use clap::{Arg, ArgMatches, Command};

/// Shown in place of a secret.
const REDACTED: &str = "(redacted)";

/// Shown in place of MESH_TOKEN while certificates authenticate services.
const NOT_IN_FORCE: &str = "(not in force: TLS_CERT_FILE is)";

/// One setting.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// Its environment variable.
    pub name: String,
    /// Its value; "(redacted)" for a secret that is set, "" for a setting without a value.
    pub value: String,
    /// flag, environment, default or "not set".
    pub source: &'static str,
    /// The former name under which the environment has it.
    pub former_name: Option<&'static str>,
    /// What to set instead of a variable that has no effect.
    pub advice: Option<&'static str>,
}

impl Setting {
    /// The source, with the environment variable if that has the former name.
    pub fn source_description(&self) -> String {
        match self.former_name {
            Some(former) => format!("{} ({former})", self.source),
            None => self.source.to_owned(),
        }
    }
}

/// The settings of a command in the order of its arguments, with the values of `matches`.
pub fn settings(command: &Command, matches: &ArgMatches) -> Vec<Setting> {
    let rows = command.get_arguments().filter_map(|argument| setting(argument, matches));
    let mut rows: Vec<_> = rows.collect();
    let has_certificate =
        rows.iter().any(|row| row.name == "TLS_CERT_FILE" && !row.value.is_empty());
    for row in rows.iter_mut().filter(|row| has_certificate && row.name == "MESH_TOKEN") {
        NOT_IN_FORCE.clone_into(&mut row.value);
    }
    rows
}

fn setting(argument: &Arg, matches: &ArgMatches) -> Option<Setting> {
    let id = argument.get_id().as_str();
    let name = argument.get_env()?.to_string_lossy().into_owned();
    let values = matches.get_raw(id).into_iter().flatten();
    let value = values.map(|value| value.to_string_lossy()).collect::<Vec<_>>().join(",");
    let source = match matches.value_source(id) {
        Some(ValueSource::CommandLine) => "flag",
        Some(ValueSource::EnvVariable) => "environment",
        Some(_) => "default",
        None => "not set",
    };
    let is_secret = argument.is_hide_env_values_set() && !value.is_empty();
    let value = if is_secret { REDACTED.to_owned() } else { redact_url_password(&value) };
    Some(Setting { name, value, source, former_name: None, advice: None })
}

/// Redacts the user and password of a URL, also in settings that are not secrets.
pub(crate) fn redact_url_password(value: &str) -> String {
    let redacted = value.split_once("://").and_then(|(scheme, rest)| {
        let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        let (_, host) = authority.rsplit_once('@')?;
        Some(format!("{scheme}://{REDACTED}@{host}{path}"))
    });
    redacted.unwrap_or_else(|| value.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_shown_with_their_source_and_secrets_are_redacted() {
        let command = Command::new("x")
            .arg(Arg::new("port").long("port").env("HAPA_TEST_PORT").default_value("1"))
            .arg(Arg::new("host").long("host").env("HAPA_TEST_HOST"))
            .arg(Arg::new("token").long("token").env("HAPA_TEST_TOKEN").hide_env_values(true))
            .arg(Arg::new("json").long("json"));
        let matches = command.clone().get_matches_from(["x", "--token=secret"]);
        let row = |name: &str, value: &str, source| Setting {
            name: name.to_owned(),
            value: value.to_owned(),
            source,
            former_name: None,
            advice: None,
        };
        let expected = [
            row("HAPA_TEST_PORT", "1", "default"),
            row("HAPA_TEST_HOST", "", "not set"),
            row("HAPA_TEST_TOKEN", "(redacted)", "flag"),
        ];
        assert_eq!(settings(&command, &matches), expected);
    }

    #[test]
    fn the_password_in_a_url_is_redacted() {
        let shown = redact_url_password("http://me:secret@engine:8002/v1");
        assert_eq!(shown, "http://(redacted)@engine:8002/v1");
        for plain in ["http://engine:8002/v1?a=b@c", "https://a,https://b", "me@x", ""] {
            assert_eq!(redact_url_password(plain), plain);
        }
    }
}
