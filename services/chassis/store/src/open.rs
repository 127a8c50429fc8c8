//! How a service opens its store: locked against other processes where it is a file, looked at for damage, and
//! set aside where it is damaged and may be.

mod damage;
mod quick_check;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::Context as _;

pub use self::damage::{damage, is_of_the_file};
use hapa_core::config::CommonConfig;
use hapa_core::error_chain::describe;
use hapa_core::health_check::HealthCheck;

use self::damage::{set_aside, set_aside_of};
use self::quick_check::quick_check;
use crate::database::{Db, Durability, Engine, Step};
use crate::file_lock::{Lock, lock_file};

/// What a service keeps.
#[derive(Clone, Copy, Debug)]
pub struct StoreSpec {
    /// Whose it is; its file is named so.
    pub service: &'static str,
    /// How it is migrated.
    pub steps: &'static [Step],
    /// What a SQLite file of it must survive.
    pub durability: Durability,
    /// Whether a file in DATA_DIR that is damaged may be set aside, so that the process serves with a new one.
    pub may_be_set_aside: bool,
}

/// The stores of one process: where they are, and the locks of their files, which are held until this is dropped.
#[derive(Debug)]
pub struct Stores {
    config: CommonConfig,
    /// What locks call this process.
    process_name: String,
    locks: HashMap<PathBuf, Lock>,
}

/// An open store, and the health checks of it.
#[derive(Debug)]
pub struct OpenStore {
    /// The database.
    pub db: Db,
    /// Checks that it answers, that it takes writes, and that no damaged file of it was set aside.
    pub checks: Vec<HealthCheck>,
}

impl Stores {
    /// None open yet. `process_name` is what locks call this process.
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

    /// Opens the store of a service. None of `services` can work without it.
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

    /// The database, and its file where a damaged one may be set aside.
    async fn open_db(&mut self, spec: &StoreSpec) -> anyhow::Result<(Db, Option<PathBuf>)> {
        let url = self.config.store_url(spec.service);
        let Some(file) = sqlite_file(&url).map(PathBuf::from) else {
            return Ok((open(spec, &url).await?, None));
        };
        // A file that another service of this process has open must not be opened past SQLite: closing it would
        // end SQLite's own locks. <https://www.sqlite.org/howtocorrupt.html#_posix_advisory_locks_canceled_by_a_separate_thread_doing_close_>
        if !self.lock_file(&file).await? {
            return Ok((open(spec, &url).await?, None));
        }
        // A file that DATABASE_URL names may hold other services' stores.
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
                    "a damaged store was set aside, and a new one is made"
                );
                try_open(spec, &url, &file).await
            }
            opened => opened,
        };
        Ok((opened?, Some(file)))
    }
}

/// Whether the store of a service answers; none of `services` can work without it.
fn read_check(service: &str, db: &Db, services: &'static [&'static str]) -> HealthCheck {
    let db = db.clone();
    let run = move || {
        let db = db.clone();
        async move { db.ping().await.map_err(|error| describe(&error).join(": ")) }
    };
    let problem = format!("the store of {service} does not answer");
    HealthCheck::new("database", problem, run).needed_by(services)
}

/// Whether the store of a service takes writes. No service depends on it: with a full disk or a
/// read-only server reads go on, and only calls that change something fail.
fn write_check(service: &str, db: &Db) -> HealthCheck {
    let db = db.clone();
    let run = move || {
        let db = db.clone();
        async move { db.check_write().await.map_err(|error| error.to_string()) }
    };
    let problem = format!("the store of {service} can't be written; reads go on");
    HealthCheck::new("database_write", problem, run)
}

/// Tells of what was set aside for as long as it is there.
fn set_aside_check(service: &str, file: PathBuf) -> HealthCheck {
    let problem = format!("a damaged store of {service} was set aside; what it held is not shown");
    let run = move || {
        let found = set_aside_of(&file);
        async move {
            let Some(first) = found.first() else { return Ok(()) };
            Err(format!("{}: recover what it holds, and move it away", first.display()))
        }
    };
    HealthCheck::new("store-set-aside", problem, run)
}

async fn open(spec: &StoreSpec, url: &str) -> anyhow::Result<Db> {
    Db::open_with(spec.service, url, spec.steps, spec.durability).await
}

/// A file that is damaged.
#[derive(Debug, thiserror::Error)]
#[error("{} is damaged: {problem}", file.display())]
struct Damaged {
    file: PathBuf,
    problem: String,
}

fn is_damaged(error: &anyhow::Error) -> bool {
    error.is::<Damaged>() || is_of_the_file(error)
}

async fn try_open(spec: &StoreSpec, url: &str, file: &Path) -> anyhow::Result<Db> {
    let damaged = |problem| Damaged { file: file.to_owned(), problem };
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
                "the store of {} can't be used and is left as it is: stop here, keep a copy of {file} and {file}-wal, and \
                 restore a backup or what `sqlite3 {file} .recover` can read; see docs/runbook.md",
                spec.service,
                file = file.display(),
            )
        }),
        opened => opened,
    }
}

/// What is wrong with the file of an embedded store, for `hapa doctor`; nothing is changed.
pub fn problem_of(url: &str) -> Option<String> {
    damage(Path::new(sqlite_file(url)?)).unwrap_or_else(|error| Some(error.to_string()))
}

/// What was set aside of the file of an embedded store.
pub fn set_aside_at(url: &str) -> Vec<PathBuf> {
    sqlite_file(url).map(|file| set_aside_of(Path::new(file))).unwrap_or_default()
}

/// The file of an embedded store; none for a server, and for what is in memory alone.
pub fn sqlite_file(url: &str) -> Option<&str> {
    if Engine::of(url) != Ok(Engine::Sqlite) {
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
    fn the_file_of_a_store_is_read_from_its_url() {
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
