//! Settings that every service shares, the values that settings take, and the error for a value that cannot work.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, ValueEnum};
use secrecy::{ExposeSecret as _, SecretString};

use crate::secret;

/// How careful to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Environment {
    /// Embedded defaults, secrets made on the spot.
    Development,
    /// Like production, for trying things.
    Staging,
    /// Secrets must be set and hard to guess; reflection is off unless asked for.
    Production,
}

/// A setting with a value that can't work.
#[derive(Debug, thiserror::Error)]
#[error("{name}: {problem}")]
pub struct Wrong {
    /// The environment variable's name.
    pub name: &'static str,
    /// What is wrong and what to do.
    pub problem: String,
}

impl Wrong {
    /// Names a setting and what is wrong with it.
    pub fn new(name: &'static str, problem: impl Into<String>) -> Self {
        Wrong { name, problem: problem.into() }
    }
}

/// Settings that the server and every service read.
#[derive(Args, Clone, Debug)]
#[group(id = "common")]
pub struct CommonConfig {
    /// Where embedded stores and made secrets live. One `hapa all` has it alone; roles may share it.
    #[arg(long, env = "DATA_DIR", default_value = "data")]
    pub data_dir: PathBuf,
    /// How careful to be.
    #[arg(
        long,
        env = "ENVIRONMENT",
        value_enum,
        ignore_case = true,
        default_value = "development"
    )]
    pub environment: Environment,
    /// The store: postgres://user:password@host/database, needed for more than one replica, or
    /// sqlite:///var/lib/hapa/hapa.db, one process per file; without one each service keeps a SQLite
    /// file of its own in DATA_DIR.
    #[arg(long, env = "DATABASE_URL", hide_env_values = true)]
    pub database_url: Option<SecretString>,
    /// The Redis in which replicas count calls and keep answers together, such as redis://redis:6379
    /// or rediss://user:password@host; without one each does so on its own.
    #[arg(long, env = "REDIS_URL", hide_env_values = true)]
    pub redis_url: Option<SecretString>,
}

impl CommonConfig {
    /// What is asked of secrets that are set.
    pub fn secret_strength(&self) -> secret::Strength {
        match self.environment {
            Environment::Production => secret::Strength::HardToGuess,
            Environment::Development | Environment::Staging => secret::Strength::Long,
        }
    }

    /// The Redis that replicas share, if there is one.
    pub fn redis_url(&self) -> Option<&SecretString> {
        self.redis_url.as_ref().filter(|url| !url.expose_secret().is_empty())
    }

    /// Where a service keeps its data.
    pub fn store_url(&self, service: &str) -> String {
        store_url(self.database_url.as_ref(), &self.data_dir, service)
    }

    /// Whether each service keeps a file of its own in DATA_DIR.
    pub fn has_embedded_stores(&self) -> bool {
        self.database_url.as_ref().is_none_or(|url| url.expose_secret().is_empty())
    }
}

/// Where a service keeps its data: at the URL that was set, else in a file of its own.
pub fn store_url(set: Option<&SecretString>, data_dir: &Path, service: &str) -> String {
    let embedded = || format!("sqlite://{}/{service}.db?mode=rwc", data_dir.display());
    let set = set.map(SecretString::expose_secret).filter(|url| !url.is_empty());
    set.map_or_else(embedded, str::to_owned)
}

/// A number of bytes, with KB, MB or GB (of 1024 each) behind it where it has one.
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

/// A positive number of seconds, fractions allowed.
pub fn seconds(text: &str) -> Result<Duration, String> {
    match seconds_or_none(text)? {
        Duration::ZERO => Err("must be more than 0 seconds".to_owned()),
        duration => Ok(duration),
    }
}

/// A number of seconds, fractions allowed, 0 too.
pub fn seconds_or_none(text: &str) -> Result<Duration, String> {
    let number: f64 = text.parse().map_err(|_| "must be a number of seconds".to_owned())?;
    if !(0.0..=86_400.0).contains(&number) {
        return Err("must be from 0 to 86400 seconds".to_owned());
    }
    Ok(Duration::from_secs_f64(number))
}
