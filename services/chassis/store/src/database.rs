//! The database of a service: a SQLite file for one process, PostgreSQL for several. Both use sqlx's `Any` driver, so
//! that one SQL text serves both.
//!
//! SQLite has one write connection, so that writers queue instead of failing. PostgreSQL has one pool for reads and
//! writes, and session timeouts that end the statements of cancelled calls.
//!
//! Invariant: on both engines a connection with an unknown transaction state is closed and replaced. So a failed
//! COMMIT or ROLLBACK affects only its own call.

use std::borrow::Cow;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use futures_util::future::BoxFuture;
use hapa_core::config::ConfigError;
use sqlx::any::{AnyConnectOptions, AnyPoolOptions, install_default_drivers};
use sqlx::error::DatabaseError;
use sqlx::migrate::{MigrateError, Migration, MigrationType, Migrator};
use sqlx::{
    AnyConnection, AnyPool, ConnectOptions as _, Connection as _, Error, Executor as _, Row as _,
    SqlSafeStr as _,
};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::task::TaskTracker;
use tracing::Instrument as _;

use crate::sql::SqlText;

/// Maximum wait for a connection from a pool.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(2);
/// Number of read connections to a SQLite file.
const SQLITE_READER_COUNT: u32 = 4;
/// Maximum number of PostgreSQL connections of a process.
const MAX_POSTGRES_CONNECTIONS: u32 = 10;
/// Maximum age of a PostgreSQL connection.
const MAX_CONNECTION_AGE: Duration = Duration::from_mins(5);
/// Maximum wait for a PostgreSQL that is starting.
const STARTUP_TIMEOUT: Duration = Duration::from_secs(30);
/// Maximum duration of one attempt to connect.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum duration of a migration, including the wait for other replicas that migrate.
const MIGRATION_TIMEOUT: Duration = Duration::from_mins(1);

/// Credentials must survive a power cut: `synchronous = FULL`, unless the store relaxes it.
const PRAGMAS: &str =
    "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON;
                       PRAGMA busy_timeout = 5000";

/// With WAL the file stays intact, but a power cut may lose the latest writes.
const RELAXED_PRAGMAS: &str = "PRAGMA synchronous = NORMAL";

/// PostgreSQL continues a dropped query until one of these timeouts ends it.
const SESSION_TIMEOUTS: &str = "SET statement_timeout = '5s'; SET lock_timeout = '2s';
                      SET idle_in_transaction_session_timeout = '10s'";
/// PostgreSQL's error code for a write in a read-only transaction: on a standby or a demoted primary.
const READ_ONLY_SQLSTATE: &str = "25006";
/// The migrating connection waits for other replicas, regardless of the timeouts of its database role.
const NO_TIMEOUTS: &str = "SET statement_timeout = 0; SET lock_timeout = 0";

/// A migration: number, name and SQL.
pub type MigrationStep = (i64, &'static str, &'static str);

/// A database engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// A file, for one process.
    Sqlite,
    /// A server, for any number of processes.
    Postgres,
}

/// Which events the latest writes to a SQLite file must survive. PostgreSQL has its own configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// A power cut.
    PowerCut,
    /// A crash of the process, but not a power cut. Several times faster.
    Process,
}

impl Engine {
    /// The engine of a database URL, or the problem of the URL. The problem contains no part of the URL, which may
    /// contain a password.
    pub fn from_url(url: &str) -> Result<Engine, &'static str> {
        match url.split_once("://") {
            Some(("sqlite", _)) => Ok(Engine::Sqlite),
            Some(("postgres" | "postgresql", _)) => {
                let parsed = url.parse::<AnyConnectOptions>();
                // A # in the password ends the URL's authority without an error.
                let is_valid =
                    parsed.is_ok_and(|options| options.database_url.fragment().is_none());
                let problem = "is not a valid URL; in a password write / ? # @ as %2F %3F %23 %40";
                if is_valid { Ok(Engine::Postgres) } else { Err(problem) }
            }
            _ => Err("must begin with sqlite://, postgres:// or postgresql://"),
        }
    }
}

/// The state of a database.
#[derive(Clone, Copy, Debug)]
pub struct DatabaseStatus {
    /// Duration of a trivial query.
    pub latency: Duration,
    /// Number of pending migrations.
    pub pending: usize,
    /// The server's time in milliseconds since 1970; `None` for SQLite.
    pub clock: Option<i64>,
}

/// An open database.
///
/// A caller may be cancelled at any await. A single statement on `writer` is its own transaction and may be cancelled.
/// Several statements that belong together need [`Db::transaction`].
#[derive(Clone, Debug)]
pub struct Db {
    /// Pool for statements that write.
    pub writer: AnyPool,
    /// Pool for statements that only read.
    pub reader: AnyPool,
    engine: Engine,
    tasks: TaskTracker,
    renewal: PoolRenewal,
    /// SQL of [`Db::check_write`].
    write_check: SqlText,
}

/// Invalidates the connections of a pool after a failover. Clones share the state.
#[derive(Clone, Debug, Default)]
struct PoolRenewal(Arc<Mutex<RenewalState>>);

#[derive(Debug, Default)]
struct RenewalState {
    renewed_at: Option<Instant>,
    was_read_only: bool,
}

impl PoolRenewal {
    /// Records the result of a write check. All existing connections become outdated while the server is read-only, and
    /// once more when it becomes writable.
    fn record(&self, is_read_only: bool) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if is_read_only || state.was_read_only {
            state.renewed_at = Some(Instant::now());
        }
        state.was_read_only = is_read_only;
    }

    /// Whether a connection of this age was opened after the last renewal.
    fn is_current(&self, age: Duration) -> bool {
        let renewed_at = self.0.lock().unwrap_or_else(PoisonError::into_inner).renewed_at;
        renewed_at.is_none_or(|renewed_at| age < renewed_at.elapsed())
    }
}

impl Db {
    /// Opens the database at `url` and migrates it. Creates a SQLite file if there is none; waits for a PostgreSQL that
    /// is starting. Migrations are numbered per service, so that services may share a database.
    pub async fn open(
        service: &'static str,
        url: &str,
        steps: &[MigrationStep],
    ) -> anyhow::Result<Db> {
        Db::open_with(service, url, steps, Durability::PowerCut).await
    }

    /// Opens and migrates a database with the given durability.
    pub async fn open_with(
        service: &'static str,
        url: &str,
        steps: &[MigrationStep],
        durability: Durability,
    ) -> anyhow::Result<Db> {
        install_default_drivers();
        let engine =
            Engine::from_url(url).map_err(|problem| ConfigError::new("DATABASE_URL", problem))?;
        let options: AnyConnectOptions = read_url(url)?;
        if engine == Engine::Sqlite {
            create_directory(url)?;
        }
        let connection = connect(&options).await?;
        let migrated = timeout(
            MIGRATION_TIMEOUT,
            migrate(connection, engine, service, migrator(service, steps)),
        );
        migrated
            .await
            .context("the migration of the database took too long")?
            .context("migrating the database")?;
        let open = async |pool: AnyPoolOptions| {
            pool.connect_with(options.clone()).await.context("opening the store")
        };
        let renewal = PoolRenewal::default();
        let (writer, reader) = match engine {
            Engine::Sqlite => (
                open(file_pool(1, durability)).await?,
                open(file_pool(SQLITE_READER_COUNT, durability)).await?,
            ),
            Engine::Postgres => {
                let pool = open(server_pool(service, renewal.clone())).await?;
                (pool.clone(), pool)
            }
        };
        let write_check = SqlText::new("UPDATE write_check_")
            .with(service)
            .with(" SET checks = checks + 1 WHERE id = 1");
        Ok(Db { writer, reader, engine, tasks: TaskTracker::new(), renewal, write_check })
    }

    /// The engine of the database.
    pub fn engine(&self) -> Engine {
        self.engine
    }

    /// Runs a transaction to its end (commit or rollback), even if the caller is cancelled.
    ///
    /// On SQLite it has the file's write lock from its start. On PostgreSQL it is READ COMMITTED: rows that must not
    /// change between two statements need a lock in the first one, such as an UPDATE.
    pub async fn transaction<T, E>(
        &self,
        work: impl for<'t> FnOnce(&'t mut AnyConnection) -> BoxFuture<'t, Result<T, E>> + Send + 'static,
    ) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<Error> + Send + 'static,
    {
        // sqlx up to 0.9.0 counts a BEGIN when its reply arrives. A BEGIN that is dropped before leaves an open
        // transaction on a connection that the pool reuses. So the transaction runs in its own task.
        let writer = self.writer.clone();
        // In a deferred transaction SQLite rejects a write after a read, at once and regardless of busy_timeout, if
        // another connection has written in between.
        let begin = match self.engine {
            Engine::Sqlite => "BEGIN IMMEDIATE",
            Engine::Postgres => "BEGIN",
        };
        let run = async move {
            let mut transaction = writer.begin_with(begin).await?;
            match work(&mut transaction).await {
                Ok(value) => {
                    transaction.commit().await?;
                    Ok(value)
                }
                Err(error) => {
                    if let Err(error) = transaction.rollback().await {
                        tracing::warn!(%error, "the rollback of a transaction failed");
                    }
                    Err(error)
                }
            }
        };
        match self.detach(run).await {
            Ok(done) => done,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(_) => Err(Error::PoolClosed.into()), // The runtime shuts down.
            },
        }
    }

    /// Inspects the database at `url` without changes; `None` if it is a file that does not exist.
    pub async fn inspect(
        service: &'static str,
        url: &str,
        steps: &[MigrationStep],
    ) -> anyhow::Result<Option<DatabaseStatus>> {
        install_default_drivers();
        let engine =
            Engine::from_url(url).map_err(|problem| ConfigError::new("DATABASE_URL", problem))?;
        let file = url.trim_start_matches("sqlite://").split('?').next().unwrap_or_default();
        if engine == Engine::Sqlite && !Path::new(file).exists() {
            return Ok(None);
        }
        let options: AnyConnectOptions = read_url(url)?;
        let inspect = async {
            let mut connection = options.connect().await?;
            let begun = Instant::now();
            connection.execute("SELECT 1").await?;
            let latency = begun.elapsed();
            // Without the table no migration has run.
            let applied = SqlText::new("SELECT version FROM migrations_").with(service);
            let applied = connection.fetch_all(applied).await.unwrap_or_default();
            let applied: Vec<i64> = applied.iter().filter_map(|row| row.try_get(0).ok()).collect();
            let pending = steps.iter().filter(|(version, ..)| !applied.contains(version)).count();
            let clock = match engine {
                Engine::Sqlite => None,
                Engine::Postgres => {
                    const NOW: &str =
                        "SELECT CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT)";
                    Some(connection.fetch_one(NOW).await?.try_get(0)?)
                }
            };
            Ok::<_, Error>(DatabaseStatus { latency, pending, clock })
        };
        let survey = timeout(CONNECT_TIMEOUT, inspect).await.context("no reply in time")?;
        survey.map(Some).context("the database can't be read")
    }

    /// Runs work to its end, even if the caller is cancelled.
    pub fn detach<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> JoinHandle<T> {
        self.tasks.spawn(work.in_current_span())
    }

    /// Checks within 2 s that the database answers, for health.
    pub async fn ping(&self) -> Result<(), Error> {
        let reply = timeout(ACQUIRE_TIMEOUT, self.reader.execute("SELECT 1"));
        reply.await.unwrap_or(Err(Error::PoolTimedOut)).map(drop)
    }

    /// Checks within 2 s that the database accepts writes, for health. It commits a change of one row.
    ///
    /// Connections to a read-only PostgreSQL are replaced: after a failover the primary is another server, and a
    /// session keeps the mode in which it began.
    pub async fn check_write(&self) -> Result<(), Error> {
        let written = timeout(ACQUIRE_TIMEOUT, self.writer.execute(self.write_check.clone())).await;
        let written = written.unwrap_or(Err(Error::PoolTimedOut));
        let code = written.as_ref().err().and_then(Error::as_database_error);
        let code = code.and_then(DatabaseError::code);
        self.renewal.record(code.as_deref() == Some(READ_ONLY_SQLSTATE));
        match written?.rows_affected() {
            1 => Ok(()),
            _ => Err(Error::RowNotFound),
        }
    }
}

fn read_url(url: &str) -> Result<AnyConnectOptions, ConfigError> {
    url.parse().map_err(|_| ConfigError::new("DATABASE_URL", "is not a valid URL"))
}

fn create_directory(url: &str) -> anyhow::Result<()> {
    let path = url.trim_start_matches("sqlite://");
    let path = path.split('?').next().unwrap_or(path);
    let Some(directory) = Path::new(path).parent() else { return Ok(()) };
    std::fs::create_dir_all(directory)
        .with_context(|| format!("creating the directory {}", directory.display()))
}

fn file_pool(max_connections: u32, durability: Durability) -> AnyPoolOptions {
    AnyPoolOptions::new()
        .max_connections(max_connections)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        // Connections stay open: the first one to a WAL database needs disk space for the shared-memory file, and
        // reads must work on a full disk.
        .idle_timeout(None)
        .max_lifetime(None)
        .after_connect(move |connection, _| {
            Box::pin(async move {
                connection.execute(PRAGMAS).await?;
                if durability == Durability::Process {
                    connection.execute(RELAXED_PRAGMAS).await?;
                }
                Ok(())
            })
        })
        .after_release(|connection, _| Box::pin(has_no_transaction(connection)))
}

/// Whether a SQLite connection has no open transaction.
///
/// SQLite rolls back on its own when the disk is full. sqlx then fails to roll back, still counts the transaction, and
/// rejects every later BEGIN on this connection. So such a connection is closed.
async fn has_no_transaction(connection: &mut AnyConnection) -> Result<bool, Error> {
    // A dropped transaction has only queued its rollback; the ping waits for it.
    connection.ping().await?;
    Ok(!connection.is_in_transaction())
}

fn server_pool(service: &'static str, renewal: PoolRenewal) -> AnyPoolOptions {
    let setup =
        SqlText::new(SESSION_TIMEOUTS).with("; SET application_name = 'hapa-").with(service);
    let setup = setup.with("'");
    AnyPoolOptions::new()
        .max_connections(MAX_POSTGRES_CONNECTIONS)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        .max_lifetime(MAX_CONNECTION_AGE)
        .after_connect(move |connection, _| {
            let setup = setup.clone();
            Box::pin(async move { connection.execute(setup).await.map(drop) })
        })
        .before_acquire(move |_, metadata| {
            let is_current = renewal.is_current(metadata.age);
            Box::pin(async move { Ok(is_current) })
        })
        .after_release(|connection, _| Box::pin(is_idle(connection)))
}

/// Whether a PostgreSQL connection has no open transaction.
///
/// sqlx does not expose the server's transaction status. But without an open transaction a statement starts its own,
/// so `now()` is the time of the statement. In a failed transaction the query fails, which closes the connection too.
/// No caller waits for this round trip.
async fn is_idle(connection: &mut AnyConnection) -> Result<bool, Error> {
    let row = connection.fetch_one("SELECT now() = statement_timestamp()").await?;
    row.try_get(0)
}

/// Connects to a database that may be starting. Errors do not contain the URL, because it contains the password.
async fn connect(options: &AnyConnectOptions) -> anyhow::Result<AnyConnection> {
    let host = options.database_url.host_str().unwrap_or("this machine").to_owned();
    let (begin, mut delay, mut is_logged) = (Instant::now(), Duration::from_millis(100), false);
    loop {
        let connected = timeout(CONNECT_TIMEOUT, options.connect()).await;
        let error = match connected.unwrap_or(Err(Error::PoolTimedOut)) {
            Ok(connection) => return Ok(connection),
            Err(error) => error,
        };
        if !is_starting(&error) {
            return Err(error).with_context(|| format!("opening the store on {host}"));
        }
        if begin.elapsed() + delay > STARTUP_TIMEOUT {
            let waited = STARTUP_TIMEOUT.as_secs();
            return Err(error)
                .with_context(|| format!("waited {waited} s for the store on {host}"));
        }
        if !is_logged {
            tracing::warn!(%error, host, "waiting for the store");
            is_logged = true;
        }
        sleep(delay).await;
        delay = (delay * 2).min(Duration::from_secs(2));
    }
}

/// Whether a retry may succeed: no server listens, or it starts, stops or has no free connection.
fn is_starting(error: &Error) -> bool {
    match error {
        Error::Io(_) | Error::PoolTimedOut => true,
        Error::Database(error) => {
            let code = error.code().unwrap_or_default();
            matches!(&*code, "57P01" | "57P02" | "57P03" | "53300")
        }
        _ => false,
    }
}

/// Migrates on a separate connection, whose end always releases sqlx's advisory lock. Replicas that start at the same
/// time on PostgreSQL migrate one after the other.
async fn migrate(
    mut connection: AnyConnection,
    engine: Engine,
    service: &'static str,
    migrator: Migrator,
) -> Result<(), MigrateError> {
    match engine {
        Engine::Sqlite => {
            connection.execute(PRAGMAS).await?;
            adopt_old_migrations_table(&mut connection, service, &migrator).await?;
        }
        Engine::Postgres => {
            connection.execute(NO_TIMEOUTS).await?;
        }
    }
    // Not `run`: the compiler does not prove that a future with its `Acquire` is Send.
    migrator.run_direct(None, &mut connection, false).await?;
    create_write_check_table(&mut connection, engine, service).await?;
    drop(connection.close().await); // The migrations are complete either way.
    Ok(())
}

/// Creates the one-row table of [`Db::check_write`]. It is not a migration, because services share no migrations.
async fn create_write_check_table(
    connection: &mut AnyConnection,
    engine: Engine,
    service: &'static str,
) -> Result<(), Error> {
    // PostgreSQL fails if two sessions create one table at the same time.
    let begin = match engine {
        Engine::Sqlite => "BEGIN IMMEDIATE",
        Engine::Postgres => "BEGIN; SELECT pg_advisory_xact_lock(hashtext('hapa_write_check'))",
    };
    let create = SqlText::new(begin)
        .with("; CREATE TABLE IF NOT EXISTS write_check_")
        .with(service)
        .with(" (id BIGINT PRIMARY KEY, checks BIGINT NOT NULL); INSERT INTO write_check_")
        .with(service)
        .with(" (id, checks) VALUES (1, 0) ON CONFLICT DO NOTHING; COMMIT");
    connection.execute(create).await.map(drop)
}

/// Renames sqlx's default migrations table of an older SQLite file to the service's own table, if its first migration
/// is the service's.
async fn adopt_old_migrations_table(
    connection: &mut AnyConnection,
    service: &'static str,
    migrator: &Migrator,
) -> Result<(), Error> {
    const OLD: &str = "SELECT name FROM sqlite_master WHERE name = '_sqlx_migrations'";
    let Some(first) = migrator.migrations.first() else { return Ok(()) };
    if connection.fetch_optional(OLD).await?.is_none() {
        return Ok(());
    }
    let own = sqlx::query("SELECT version FROM _sqlx_migrations WHERE checksum = $1");
    let own = own.bind(first.checksum.to_vec());
    if own.fetch_optional(&mut *connection).await?.is_some() {
        let rename = SqlText::new("ALTER TABLE _sqlx_migrations RENAME TO migrations_");
        connection.execute(rename.with(service)).await?;
    }
    Ok(())
}

fn migrator(service: &str, steps: &[MigrationStep]) -> Migrator {
    let migration = |&(version, name, sql): &MigrationStep| {
        let (name, sql) = (Cow::Borrowed(name), sql.into_sql_str());
        Migration::new(version, name, MigrationType::Simple, sql, false)
    };
    let mut migrator = Migrator::with_migrations(steps.iter().map(migration).collect());
    // Migrations only add, so replicas of the previous version continue to work, and a rollback is possible.
    migrator.set_ignore_missing(true);
    migrator.dangerous_set_table_name(format!("migrations_{service}"));
    migrator
}
