//! A service's store: SQLite by default, through sqlx's `Any` driver so that one SQL text serves
//! PostgreSQL too. One connection writes, so that writers wait in line instead of failing.

use std::borrow::Cow;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use sqlx::any::{AnyConnectOptions, AnyPoolOptions, install_default_drivers};
use sqlx::migrate::{Migration, MigrationType, Migrator};
use sqlx::{AnyPool, Executor as _, SqlSafeStr as _};

/// Waiting longer than this for a connection is being overloaded.
const ACQUIRE: Duration = Duration::from_secs(2);
const READERS: u32 = 4;

/// A migration: its number, its name, its SQL.
pub type Step = (i64, &'static str, &'static str);

/// An open store.
#[derive(Clone, Debug)]
pub struct Db {
    /// For statements that change something.
    pub writer: AnyPool,
    /// For the others.
    pub reader: AnyPool,
}

impl Db {
    /// Opens the store at `url`, makes it where it is a SQLite file, and migrates it.
    pub async fn open(url: &str, steps: &[Step]) -> anyhow::Result<Db> {
        install_default_drivers();
        if let Some(path) = url.strip_prefix("sqlite://") {
            let path = path.split('?').next().unwrap_or(path);
            if let Some(folder) = Path::new(path).parent() {
                std::fs::create_dir_all(folder)
                    .with_context(|| format!("making the folder {}", folder.display()))?;
            }
        }
        let options: AnyConnectOptions = url.parse().context("the store's URL can't be read")?;
        let writer = pool(1).connect_with(options.clone()).await.context("opening the store")?;
        migrator(steps).run(&writer).await.context("migrating the store")?;
        let reader = pool(READERS).connect_with(options).await.context("opening the store")?;
        Ok(Db { writer, reader })
    }
}

fn pool(most: u32) -> AnyPoolOptions {
    AnyPoolOptions::new().max_connections(most).acquire_timeout(ACQUIRE).after_connect(|connection, _| {
        Box::pin(async move {
            // Credentials must survive a power cut: FULL.
            let pragmas = "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON;
                           PRAGMA busy_timeout = 5000";
            connection.execute(pragmas).await?;
            Ok(())
        })
    })
}

fn migrator(steps: &[Step]) -> Migrator {
    let migration = |&(version, name, sql): &Step| {
        let (name, sql) = (Cow::Borrowed(name), sql.into_sql_str());
        Migration::new(version, name, MigrationType::Simple, sql, false)
    };
    Migrator { migrations: steps.iter().map(migration).collect(), ..Migrator::DEFAULT }
}
