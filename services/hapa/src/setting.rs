//! Settings as they are in force: what each is, where it comes from, and no secret.

use clap::parser::ValueSource;
use clap::{Arg, ArgMatches, Command};

/// In place of a secret.
const REDACTED: &str = "(redacted)";

/// In place of the mesh token where certificates prove who is a service.
const NOT_IN_FORCE: &str = "(not in force: TLS_CERT_FILE is)";

/// One setting.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// Its environment variable.
    pub name: String,
    /// Its value, "(redacted)" for a secret that is set, "" where it is not set.
    pub value: String,
    /// flag, environment, default or "not set".
    pub source: &'static str,
}

/// The settings of a command, by name, as they were read from its arguments and the environment.
pub fn settings(command: &Command, matches: &ArgMatches) -> Vec<Setting> {
    let rows = command.get_arguments().filter_map(|argument| setting(argument, matches));
    let mut rows: Vec<_> = rows.collect();
    let certified = rows.iter().any(|row| row.name == "TLS_CERT_FILE" && !row.value.is_empty());
    // Of two proofs of who is a service, one is in force.
    for row in rows.iter_mut().filter(|row| certified && row.name == "MESH_TOKEN") {
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
    let hidden = argument.is_hide_env_values_set() && !value.is_empty();
    let value = if hidden { REDACTED.to_owned() } else { without_password(&value) };
    Some(Setting { name, value, source })
}

/// A URL may hold a password also where nobody expects one.
pub(crate) fn without_password(value: &str) -> String {
    let parts = value.split_once("://").and_then(|(scheme, rest)| {
        let (before, after) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        let (_, host) = before.rsplit_once('@')?;
        Some(format!("{scheme}://{REDACTED}@{host}{after}"))
    });
    parts.unwrap_or_else(|| value.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_shown_with_their_source_and_secrets_are_not() {
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
        };
        let expected = [
            row("HAPA_TEST_PORT", "1", "default"),
            row("HAPA_TEST_HOST", "", "not set"),
            row("HAPA_TEST_TOKEN", "(redacted)", "flag"),
        ];
        assert_eq!(settings(&command, &matches), expected);
    }

    #[test]
    fn a_password_in_a_url_is_not_shown() {
        let shown = without_password("http://me:secret@engine:8002/v1");
        assert_eq!(shown, "http://(redacted)@engine:8002/v1");
        for plain in ["http://engine:8002/v1?a=b@c", "https://a,https://b", "me@x", ""] {
            assert_eq!(without_password(plain), plain);
        }
    }
}
