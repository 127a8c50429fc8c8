//! Opening of a service's store. A SQLite file is locked against other processes and checked for damage. A damaged
//! file is set aside if the service permits it.

mod damage;
mod quick_check;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::Context as _;

pub use self::damage::{damage, is_file_damage};
use hapa_core::config::CommonConfig;
use hapa_core::error_chain::describe;
use hapa_core::health_check::HealthCheck;

use self::damage::{set_aside, set_aside_of};
use self::quick_check::quick_check;
use crate::database::{Db, Durability, Engine, MigrationStep};
use crate::file_lock::{FileLock, lock_file};

/// The store of a service.
#[derive(Clone, Copy, Debug)]
pub struct StoreSpec {
    /// Name of the service and of its file.
    pub service: &'static str,
    /// The migrations.
    pub steps: &'static [MigrationStep],
    /// Durability of a SQLite file.
    pub durability: Durability,
    /// Whether a damaged file in DATA_DIR may be renamed, so that the process starts with a new one.
    pub may_be_set_aside: bool,
}

/// The stores of one process: their configuration, and the locks of their files, which are held until this is dropped.
#[derive(Debug)]
pub struct Stores {
    config: CommonConfig,
    /// Name of this process in lock files.
    process_name: String,
    locks: HashMap<PathBuf, FileLock>,
}

/// An open store and its health checks.
#[derive(Debug)]
pub struct OpenStore {
    /// The database.
    pub db: Db,
    /// Checks that the database answers, that it accepts writes, and that no damaged file was set aside.
    pub checks: Vec<HealthCheck>,
}

impl Stores {
    /// No open stores. `process_name` is the name of this process in lock files.
    pub fn new(config: CommonConfig, process_name: &str) -> Stores {
        Stores { config, process_name: process_name.to_owned(), locks: HashMap::new() }
    }

    /// Locks a file for this process; false if another service of this process holds the lock.
    async fn lock_file(&mut self, file: &Path) -> anyhow::Result<bool> {
        if self.locks.contains_key(file) {
            return Ok(false);
        }
        let lock = lock_file(file, &self.process_name).await?;
        self.locks.insert(file.to_owned(), lock);
        Ok(true)
    }

    /// Opens the store of a service. `services` cannot work without it.
    pub async fn open(
        &mut self,
        spec: &StoreSpec,
        services: &'static [&'static str],
    ) -> anyhow::Result<OpenStore> {
        let (db, set_aside) = self.open_db(spec).await?;
        let mut checks =
            vec![read_check(spec.service, &db, services), write_check(spec.service, &db)];
        checks.extend(set_aside.map(|file| set_aside_check(spec.service, file)));
        Ok(OpenStore { db, checks })
    }

    /// The database, and its file if a damaged one may be set aside.
    async fn open_db(&mut self, spec: &StoreSpec) -> anyhow::Result<(Db, Option<PathBuf>)> {
        let url = self.config.store_url(spec.service);
        let Some(file) = sqlite_file(&url).map(PathBuf::from) else {
            return Ok((open(spec, &url).await?, None));
        };
        // A file that another service of this process has open must not be opened without SQLite: closing it would
        // release SQLite's own locks. <https://www.sqlite.org/howtocorrupt.html#_posix_advisory_locks_canceled_by_a_separate_thread_doing_close_>
        if !self.lock_file(&file).await? {
            return Ok((open(spec, &url).await?, None));
        }
        // A file from DATABASE_URL may contain the stores of other services.
        if !spec.may_be_set_aside || !self.config.has_embedded_stores() {
            return Ok((open_or_explain(spec, &url, &file).await?, None));
        }
        let opened = match try_open(spec, &url, &file).await {
            Err(error) if is_damaged(&error) => {
                let aside = set_aside(&file)?;
                tracing::error!(
                    service = spec.service,
                    why = format!("{error:#}"),
                    file = %file.display(),
                    set_aside = %aside.display(),
                    "a damaged store was set aside and a new one is created"
                );
                try_open(spec, &url, &file).await
            }
            opened => opened,
        };
        Ok((opened?, Some(file)))
    }
}

/// Checks that the store of a service answers. `services` cannot work without it.
fn read_check(service: &str, db: &Db, services: &'static [&'static str]) -> HealthCheck {
    let db = db.clone();
    let run = move || {
        let db = db.clone();
        async move { db.ping().await.map_err(|error| describe(&error).join(": ")) }
    };
    let problem = format!("the store of {service} does not answer");
    HealthCheck::new("database", problem, run).needed_by(services)
}

/// Checks that the store of a service accepts writes. No service depends on it: with a full disk or a read-only server
/// reads continue, and only calls that write fail.
fn write_check(service: &str, db: &Db) -> HealthCheck {
    let db = db.clone();
    let run = move || {
        let db = db.clone();
        async move { db.check_write().await.map_err(|error| error.to_string()) }
    };
    let problem = format!("the store of {service} can't be written; reads go on");
    HealthCheck::new("database_write", problem, run)
}

/// Fails as long as a file that was set aside exists.
fn set_aside_check(service: &str, file: PathBuf) -> HealthCheck {
    let problem = format!("a damaged store of {service} was set aside; its data is missing");
    let run = move || {
        let found = set_aside_of(&file);
        async move {
            let Some(first) = found.first() else { return Ok(()) };
            Err(format!("{}: recover its data and move it away", first.display()))
        }
    };
    HealthCheck::new("store-set-aside", problem, run)
}

async fn open(spec: &StoreSpec, url: &str) -> anyhow::Result<Db> {
    Db::open_with(spec.service, url, spec.steps, spec.durability).await
}

/// The error of a damaged file.
#[derive(Debug, thiserror::Error)]
#[error("{} is damaged: {problem}", file.display())]
struct DamagedFile {
    file: PathBuf,
    problem: String,
}

fn is_damaged(error: &anyhow::Error) -> bool {
    error.is::<DamagedFile>() || is_file_damage(error)
}

async fn try_open(spec: &StoreSpec, url: &str, file: &Path) -> anyhow::Result<Db> {
    let damaged = |problem| DamagedFile { file: file.to_owned(), problem };
    if let Some(problem) = damage(file).with_context(|| format!("reading {}", file.display()))? {
        return Err(damaged(problem).into());
    }
    if let Some(problem) = quick_check(file).await? {
        return Err(damaged(problem).into());
    }
    open(spec, url).await
}

async fn open_or_explain(spec: &StoreSpec, url: &str, file: &Path) -> anyhow::Result<Db> {
    match try_open(spec, url, file).await {
        Err(error) if is_damaged(&error) => Err(error).with_context(|| {
            format!(
                "the store of {} is damaged and was not changed: keep a copy of {file} and {file}-wal, then restore a \
                 backup or the output of `sqlite3 {file} .recover`; see docs/runbook.md",
                spec.service,
                file = file.display(),
            )
        }),
        opened => opened,
    }
}

/// The damage of an embedded store's file, for `hapa doctor`. Changes nothing.
pub fn problem_of(url: &str) -> Option<String> {
    damage(Path::new(sqlite_file(url)?)).unwrap_or_else(|error| Some(error.to_string()))
}

/// The files that were set aside of an embedded store.
pub fn set_aside_at(url: &str) -> Vec<PathBuf> {
    sqlite_file(url).map(|file| set_aside_of(Path::new(file))).unwrap_or_default()
}

/// The file of an embedded store; `None` for a server and for an in-memory database.
fn sqlite_file(url: &str) -> Option<&str> {
    if Engine::from_url(url) != Ok(Engine::Sqlite) {
        return None;
    }
    let file = url.trim_start_matches("sqlite://");
    let (file, options) = file.split_once('?').unwrap_or((file, ""));
    (!file.is_empty() && file != ":memory:" && !options.contains("mode=memory")).then_some(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_of_a_store_is_parsed_from_its_url() {
        for (url, file) in [
            ("sqlite:///var/lib/hapa/hapa.db", Some("/var/lib/hapa/hapa.db")),
            ("sqlite://data/auth.db?mode=rwc", Some("data/auth.db")),
            ("sqlite://:memory:", None),
            ("sqlite://x?mode=memory&cache=shared", None),
            ("sqlite://", None),
            ("postgres://user@host/hapa", None),
        ] {
            assert_eq!(sqlite_file(url), file, "{url}");
        }
    }
}
