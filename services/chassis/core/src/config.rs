//! Settings that every service shares, parsers of setting values, and the error for an invalid value.

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
    /// sqlite:///var/lib/hapa/hapa.db, one process per file. Default: each service has its own SQLite file in
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
    let set = set.map(SecretString::expose_secret).filter(|url| !url.is_empty());
    set.map_or_else(embedded, str::to_owned)
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
