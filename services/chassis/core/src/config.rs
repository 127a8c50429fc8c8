//! Settings that every service shares, parsers of setting values, and the error for an invalid value.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, ValueEnum};
use secrecy::{ExposeSecret as _, SecretString};

use crate::secret;

/// The deployment environment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Environment {
    /// Embedded defaults and generated secrets.
    Development,
    /// Like production, with the relaxed rules for secrets of development.
    Staging,
    /// Secrets must be set and hard to guess; reflection is off by default.
    Production,
}

/// A setting with an invalid value.
#[derive(Debug, thiserror::Error)]
#[error("{name}: {problem}")]
pub struct ConfigError {
    /// Name of the environment variable.
    pub name: &'static str,
    /// The problem and its remedy.
    pub problem: String,
}

impl ConfigError {
    /// An error about the setting `name`.
    pub fn new(name: &'static str, problem: impl Into<String>) -> Self {
        ConfigError { name, problem: problem.into() }
    }

    /// One error for all problems, a line for each.
    pub fn all(problems: impl IntoIterator<Item = ConfigError>) -> Result<(), ConfigError> {
        let mut problems = problems.into_iter();
        let Some(mut first) = problems.next() else { return Ok(()) };
        for other in problems {
            // Writing to a string does not fail.
            let _ = write!(first.problem, "\n{other}");
        }
        Err(first)
    }
}

/// Settings that the server and every service read.
#[derive(Args, Clone, Debug)]
#[group(id = "common")]
pub struct CommonConfig {
    /// Directory of embedded stores and generated secrets. `hapa all` needs it exclusively; roles may share it.
    #[arg(long, env = "DATA_DIR", default_value = "data")]
    pub data_dir: PathBuf,
    /// Deployment environment. Production requires all secrets to be set and disables server reflection.
    #[arg(
        long,
        env = "ENVIRONMENT",
        value_enum,
        ignore_case = true,
        default_value = "development"
    )]
    pub environment: Environment,
    /// Database URL: postgres://user:password@host/database, required for more than one replica, or
    /// sqlite:///var/lib/hapa/hapa.db or sqlite:hapa.db, one process per file, which is created. Drivers of SQLAlchemy
    /// in the scheme, as in postgresql+asyncpg://, are ignored. Default: each service has its own SQLite file in
    /// DATA_DIR.
    #[arg(long, env = "DATABASE_URL", hide_env_values = true)]
    pub database_url: Option<SecretString>,
    /// Redis in which replicas share rate limits and cached answers, such as redis://redis:6379 or
    /// rediss://user:password@host. Default: each replica has its own.
    #[arg(long, env = "REDIS_URL", hide_env_values = true)]
    pub redis_url: Option<SecretString>,
}

impl CommonConfig {
    /// The required strength of configured secrets.
    pub fn secret_strength(&self) -> secret::Strength {
        match self.environment {
            Environment::Production => secret::Strength::HardToGuess,
            Environment::Development | Environment::Staging => secret::Strength::Long,
        }
    }

    /// The URL of the shared Redis, if one is configured.
    pub fn redis_url(&self) -> Option<&SecretString> {
        self.redis_url.as_ref().filter(|url| !url.expose_secret().is_empty())
    }

    /// The database URL of a service.
    pub fn store_url(&self, service: &str) -> String {
        store_url(self.database_url.as_ref(), &self.data_dir, service)
    }

    /// Whether each service has its own SQLite file in DATA_DIR.
    pub fn has_embedded_stores(&self) -> bool {
        self.database_url.as_ref().is_none_or(|url| url.expose_secret().is_empty())
    }
}

/// The database URL of a service: the configured one, else its own SQLite file.
pub fn store_url(set: Option<&SecretString>, data_dir: &Path, service: &str) -> String {
    let embedded = || format!("sqlite://{}/{service}.db?mode=rwc", data_dir.display());
    let set = set.map(SecretString::expose_secret).map(str::trim).filter(|url| !url.is_empty());
    set.map_or_else(embedded, database_url)
}

/// A database URL in the form that the drivers read. Accepts the forms of SQLAlchemy too, in which `sqlite:///./x.db`
/// is a relative path and the scheme may name a driver: <https://docs.sqlalchemy.org/en/20/core/engines.html>
fn database_url(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once(':') else { return url.to_owned() };
    let engine = scheme.split_once('+').map_or(scheme, |(engine, _)| engine);
    if !engine.eq_ignore_ascii_case("sqlite") {
        return format!("{}:{rest}", engine.to_ascii_lowercase());
    }
    let path = rest.strip_prefix("//").unwrap_or(rest);
    let path = if path.starts_with("/./") || path.starts_with("/../") { &path[1..] } else { path };
    let (file, options) = path.split_once('?').unwrap_or((path, ""));
    let is_file = !file.is_empty() && file != ":memory:" && !options.contains("mode=");
    match (is_file, options) {
        (false, "") => format!("sqlite://{file}"),
        (false, _) => format!("sqlite://{file}?{options}"),
        (true, "") => format!("sqlite://{file}?mode=rwc"),
        (true, _) => format!("sqlite://{file}?{options}&mode=rwc"),
    }
}

/// Parses a truth value: true, 1, yes or on, or false, 0, no or off, in any case.
pub fn boolean(text: &str) -> Result<bool, String> {
    match text.trim().to_ascii_lowercase().as_str() {
        "true" | "1" | "yes" | "on" => Ok(true),
        "false" | "0" | "no" | "off" => Ok(false),
        _ => Err("must be true or false".to_owned()),
    }
}

/// Parses an IP address to listen on, or `localhost`.
pub fn listen_address(text: &str) -> Result<IpAddr, String> {
    let text = text.trim();
    if text.eq_ignore_ascii_case("localhost") {
        return Ok(Ipv4Addr::LOCALHOST.into());
    }
    let problem = "must be an IP address such as 127.0.0.1 or 0.0.0.0, or localhost";
    text.trim_matches(['[', ']']).parse().map_err(|_| problem.to_owned())
}

/// Parses a number of bytes with an optional unit: KB, MB or GB, in powers of 1024. The minimum is 1KB.
pub fn bytes(text: &str) -> Result<u64, String> {
    let upper = text.trim().to_ascii_uppercase();
    let units = [("KB", 1 << 10), ("MB", 1 << 20), ("GB", 1 << 30), ("", 1)];
    let parsed = units.iter().find_map(|(unit, size)| {
        let number: u64 = upper.strip_suffix(unit)?.trim().parse().ok()?;
        number.checked_mul(*size)
    });
    let problem = "must be 1KB or more, such as 10MB, 500KB or 1GB";
    parsed.filter(|size| *size >= 1024).ok_or_else(|| problem.to_owned())
}

/// Parses a number of seconds greater than 0, fractions allowed.
pub fn seconds(text: &str) -> Result<Duration, String> {
    match seconds_or_none(text)? {
        Duration::ZERO => Err("must be more than 0 seconds".to_owned()),
        duration => Ok(duration),
    }
}

/// Parses a number of seconds from 0 to 86,400, fractions allowed.
pub fn seconds_or_none(text: &str) -> Result<Duration, String> {
    let number: f64 = text.parse().map_err(|_| "must be a number of seconds".to_owned())?;
    if !(0.0..=86_400.0).contains(&number) {
        return Err("must be from 0 to 86400 seconds".to_owned());
    }
    Ok(Duration::from_secs_f64(number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_database_url_is_read_in_the_forms_of_sqlalchemy_too() {
        for (url, expected) in [
            ("sqlite:///./data/hapa.db", "sqlite://./data/hapa.db?mode=rwc"),
            ("sqlite:///../hapa.db", "sqlite://../hapa.db?mode=rwc"),
            ("sqlite:////var/lib/hapa.db", "sqlite:////var/lib/hapa.db?mode=rwc"),
            ("sqlite:///var/lib/hapa.db", "sqlite:///var/lib/hapa.db?mode=rwc"),
            ("sqlite+aiosqlite:///./x.db", "sqlite://./x.db?mode=rwc"),
            ("sqlite:x.db", "sqlite://x.db?mode=rwc"),
            ("sqlite://x.db?mode=ro", "sqlite://x.db?mode=ro"),
            ("sqlite://x.db?cache=shared", "sqlite://x.db?cache=shared&mode=rwc"),
            ("sqlite::memory:", "sqlite://:memory:"),
            ("postgresql+asyncpg://u:p@h/d", "postgresql://u:p@h/d"),
            ("postgresql+psycopg://h/d", "postgresql://h/d"),
            ("postgres://h/d", "postgres://h/d"),
            ("nonsense", "nonsense"),
        ] {
            assert_eq!(store_url(Some(&url.into()), Path::new("data"), "auth"), expected, "{url}");
        }
    }

    #[test]
    fn truth_values_and_addresses_are_read_as_people_write_them() {
        for text in ["true", "True", "1", "yes", "ON", " true "] {
            assert_eq!(boolean(text), Ok(true), "{text}");
        }
        for text in ["false", "False", "0", "no", "off"] {
            assert_eq!(boolean(text), Ok(false), "{text}");
        }
        assert!(boolean("2").is_err() && boolean("").is_err());
        for (text, address) in [("localhost", "127.0.0.1"), ("0.0.0.0", "0.0.0.0"), ("[::]", "::")]
        {
            assert_eq!(listen_address(text), Ok(address.parse().unwrap()));
        }
        assert!(listen_address("example.com").is_err());
    }
}
