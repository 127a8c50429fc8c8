//! A service's store: a SQLite file for one process, PostgreSQL for several. Both speak through
//! sqlx's `Any` driver, so that one SQL text serves both.
//!
//! SQLite has one connection that writes, so that writers wait in line instead of failing.
//! PostgreSQL has one pool for all, and limits of its own on what a lost caller leaves behind.
//!
//! A connection whose transaction state is unknown is closed and replaced, on either engine. So a
//! failed COMMIT or ROLLBACK never outlives the call that met it.

use std::borrow::Cow;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use futures_util::future::BoxFuture;
use hapa_core::config::Wrong;
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

/// Waiting longer than this for a connection is being overloaded.
const ACQUIRE: Duration = Duration::from_secs(2);
/// SQLite's readers.
const READERS: u32 = 4;
/// PostgreSQL's connections, of each process.
const CONNECTIONS: u32 = 10;
/// Whatever state a connection is in, it ends.
const LIFETIME: Duration = Duration::from_mins(5);
/// How long a PostgreSQL that is not up yet is waited for.
const COMING_UP: Duration = Duration::from_secs(30);
/// How long one attempt to connect may take.
const CONNECT: Duration = Duration::from_secs(5);
/// How long migrating may take, with the wait for others that migrate.
const MIGRATING: Duration = Duration::from_mins(1);

/// Credentials must survive a power cut: FULL, unless a store says otherwise.
const PRAGMAS: &str =
    "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON;
                       PRAGMA busy_timeout = 5000";

/// With WAL the file stays whole; what was written in the last moments before a power cut may be gone.
const RELAXED: &str = "PRAGMA synchronous = NORMAL";

/// A dropped query goes on in PostgreSQL until one of these ends it.
const LIMITS: &str = "SET statement_timeout = '5s'; SET lock_timeout = '2s';
                      SET idle_in_transaction_session_timeout = '10s'";
/// Error code of PostgreSQL for a write in a read-only transaction: a standby, or a demoted primary.
const READ_ONLY: &str = "25006";
/// The connection that migrates waits for the other replicas, whatever limits its role has.
const NO_LIMITS: &str = "SET statement_timeout = 0; SET lock_timeout = 0";

/// A migration: its number, its name, its SQL.
pub type Step = (i64, &'static str, &'static str);

/// What keeps a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// A file, of one process.
    Sqlite,
    /// A server, of as many processes as there are.
    Postgres,
}

/// What a SQLite store must survive. A PostgreSQL decides by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// A power cut.
    PowerCut,
    /// The end of the process, however it comes: several times faster.
    Process,
}

impl Engine {
    /// The engine that a URL names, or what is wrong with the URL. Neither shows any of it: it has
    /// the password.
    pub fn of(url: &str) -> Result<Engine, &'static str> {
        match url.split_once("://") {
            Some(("sqlite", _)) => Ok(Engine::Sqlite),
            Some(("postgres" | "postgresql", _)) => {
                let parsed = url.parse::<AnyConnectOptions>();
                // With a # in the password the rest is no host, but none would tell.
                let whole = parsed.is_ok_and(|options| options.database_url.fragment().is_none());
                let wrong = "can't be read; in a password write / ? # @ as %2F %3F %23 %40";
                if whole { Ok(Engine::Postgres) } else { Err(wrong) }
            }
            _ => Err("must begin with sqlite://, postgres:// or postgresql://"),
        }
    }
}

/// What a look at a store found.
#[derive(Clone, Copy, Debug)]
pub struct Survey {
    /// How long it takes to answer.
    pub latency: Duration,
    /// Steps of migration that are still to be taken.
    pub pending: usize,
    /// Its time in milliseconds since 1970, where it has a clock of its own.
    pub clock: Option<i64>,
}

/// An open store.
///
/// A caller may vanish at any await. A single statement on `writer` is its own transaction and can
/// be left alone; what takes several goes through [`Db::transaction`].
#[derive(Clone, Debug)]
pub struct Db {
    /// For statements that change something.
    pub writer: AnyPool,
    /// For the others.
    pub reader: AnyPool,
    engine: Engine,
    tasks: TaskTracker,
    renewal: Renewal,
    /// The statement of [`Db::check_write`].
    write_check: SqlText,
}

/// When the connections of a pool were last declared outdated; clones share it.
#[derive(Clone, Debug, Default)]
struct Renewal(Arc<Mutex<Renewed>>);

#[derive(Debug, Default)]
struct Renewed {
    at: Option<Instant>,
    was_read_only: bool,
}

impl Renewal {
    /// Takes a check's finding. As long as the server is read-only, and once when it is not any more,
    /// every connection that exists is outdated.
    fn note(&self, is_read_only: bool) {
        let mut renewed = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if is_read_only || renewed.was_read_only {
            renewed.at = Some(Instant::now());
        }
        renewed.was_read_only = is_read_only;
    }

    /// Whether a connection of this age was opened after the last renewal.
    fn is_current(&self, age: Duration) -> bool {
        let renewed = self.0.lock().unwrap_or_else(PoisonError::into_inner).at;
        renewed.is_none_or(|renewed| age < renewed.elapsed())
    }
}

impl Db {
    /// Opens the store at `url` and migrates it. A SQLite file is made; a PostgreSQL that is not up
    /// yet is waited for. Steps are counted by service, so that services may share a database.
    pub async fn open(service: &'static str, url: &str, steps: &[Step]) -> anyhow::Result<Db> {
        Db::open_with(service, url, steps, Durability::PowerCut).await
    }

    /// The same, for a store that may have to survive less.
    pub async fn open_with(
        service: &'static str,
        url: &str,
        steps: &[Step],
        durability: Durability,
    ) -> anyhow::Result<Db> {
        install_default_drivers();
        let engine = Engine::of(url).map_err(|problem| Wrong::new("DATABASE_URL", problem))?;
        let options: AnyConnectOptions = read_url(url)?;
        if engine == Engine::Sqlite {
            make_folder(url)?;
        }
        let connection = connect(&options).await?;
        let migrated =
            timeout(MIGRATING, migrate(connection, engine, service, migrator(service, steps)));
        migrated
            .await
            .context("migrating the store took too long")?
            .context("migrating the store")?;
        let open = async |pool: AnyPoolOptions| {
            pool.connect_with(options.clone()).await.context("opening the store")
        };
        let renewal = Renewal::default();
        let (writer, reader) = match engine {
            Engine::Sqlite => {
                (open(file_pool(1, durability)).await?, open(file_pool(READERS, durability)).await?)
            }
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

    /// What keeps it.
    pub fn engine(&self) -> Engine {
        self.engine
    }

    /// Runs a transaction to its end (commit or rollback) whatever becomes of the caller.
    ///
    /// SQLite's has the file's write lock from its start. PostgreSQL's is READ COMMITTED: what must
    /// not change between two statements is locked by the first, with an UPDATE for one.
    pub async fn transaction<T, E>(
        &self,
        work: impl for<'t> FnOnce(&'t mut AnyConnection) -> BoxFuture<'t, Result<T, E>> + Send + 'static,
    ) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<Error> + Send + 'static,
    {
        // sqlx up to 0.9.0 counts a BEGIN when it is answered. One that is dropped before leaves a
        // connection in a transaction that nobody ends, and the pool hands it on. So none is
        // dropped: it runs in a task of its own.
        let writer = self.writer.clone();
        // Deferred, SQLite refuses a write after a read where another writer came between, at once
        // and whatever its busy_timeout.
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
                        tracing::warn!(%error, "a transaction was not rolled back by us");
                    }
                    Err(error)
                }
            }
        };
        match self.detach(run).await {
            Ok(done) => done,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(_) => Err(Error::PoolClosed.into()), // the process ends
            },
        }
    }

    /// Looks at the store at `url` and changes nothing; none where it is a file that is not there yet.
    pub async fn survey(
        service: &'static str,
        url: &str,
        steps: &[Step],
    ) -> anyhow::Result<Option<Survey>> {
        install_default_drivers();
        let engine = Engine::of(url).map_err(|problem| Wrong::new("DATABASE_URL", problem))?;
        let file = url.trim_start_matches("sqlite://").split('?').next().unwrap_or_default();
        if engine == Engine::Sqlite && !Path::new(file).exists() {
            return Ok(None);
        }
        let options: AnyConnectOptions = read_url(url)?;
        let look = async {
            let mut connection = options.connect().await?;
            let begun = Instant::now();
            connection.execute("SELECT 1").await?;
            let latency = begun.elapsed();
            // Without the table no step was taken yet.
            let done = SqlText::new("SELECT version FROM migrations_").with(service);
            let done = connection.fetch_all(done).await.unwrap_or_default();
            let done: Vec<i64> = done.iter().filter_map(|row| row.try_get(0).ok()).collect();
            let pending = steps.iter().filter(|(version, ..)| !done.contains(version)).count();
            let clock = match engine {
                Engine::Sqlite => None,
                Engine::Postgres => {
                    const NOW: &str =
                        "SELECT CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT)";
                    Some(connection.fetch_one(NOW).await?.try_get(0)?)
                }
            };
            Ok::<_, Error>(Survey { latency, pending, clock })
        };
        let found = timeout(CONNECT, look).await.context("no answer in time")?;
        found.map(Some).context("the store can't be read")
    }

    /// Runs work to its end whatever becomes of the caller.
    pub fn detach<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> JoinHandle<T> {
        self.tasks.spawn(work.in_current_span())
    }

    /// Whether the store answers, for health; bounded.
    pub async fn ping(&self) -> Result<(), Error> {
        let answer = timeout(ACQUIRE, self.reader.execute("SELECT 1"));
        answer.await.unwrap_or(Err(Error::PoolTimedOut)).map(drop)
    }

    /// Whether the store takes writes, for health; bounded. It commits a change of one row.
    ///
    /// Connections to a read-only PostgreSQL are replaced: after a failover the primary is another
    /// server, and a session keeps the mode in which it began.
    pub async fn check_write(&self) -> Result<(), Error> {
        let written = timeout(ACQUIRE, self.writer.execute(self.write_check.clone())).await;
        let written = written.unwrap_or(Err(Error::PoolTimedOut));
        let code = written.as_ref().err().and_then(Error::as_database_error);
        let code = code.and_then(DatabaseError::code);
        self.renewal.note(code.as_deref() == Some(READ_ONLY));
        match written?.rows_affected() {
            1 => Ok(()),
            _ => Err(Error::RowNotFound),
        }
    }
}

fn read_url(url: &str) -> Result<AnyConnectOptions, Wrong> {
    url.parse().map_err(|_| Wrong::new("DATABASE_URL", "can't be read as a URL"))
}

fn make_folder(url: &str) -> anyhow::Result<()> {
    let path = url.trim_start_matches("sqlite://");
    let path = path.split('?').next().unwrap_or(path);
    let Some(folder) = Path::new(path).parent() else { return Ok(()) };
    std::fs::create_dir_all(folder)
        .with_context(|| format!("making the folder {}", folder.display()))
}

fn file_pool(most: u32, durability: Durability) -> AnyPoolOptions {
    AnyPoolOptions::new()
        .max_connections(most)
        .acquire_timeout(ACQUIRE)
        // A file does not move. One connection is always open: the first to a WAL database needs room
        // on the disk for the shared-memory file, and reads must go on when the disk is full.
        .idle_timeout(None)
        .max_lifetime(None)
        .after_connect(move |connection, _| {
            Box::pin(async move {
                connection.execute(PRAGMAS).await?;
                if durability == Durability::Process {
                    connection.execute(RELAXED).await?;
                }
                Ok(())
            })
        })
        .after_release(|connection, _| Box::pin(has_no_transaction(connection)))
}

/// Whether a SQLite connection is outside of any transaction.
///
/// SQLite rolls back by itself when the disk is full. sqlx then fails to roll back, keeps counting the
/// transaction, and refuses every later BEGIN on this connection. So such a connection is closed.
async fn has_no_transaction(connection: &mut AnyConnection) -> Result<bool, Error> {
    // A dropped transaction has only queued its rollback: the ping waits for it.
    connection.ping().await?;
    Ok(!connection.is_in_transaction())
}

fn server_pool(service: &'static str, renewal: Renewal) -> AnyPoolOptions {
    let greeting = SqlText::new(LIMITS).with("; SET application_name = 'hapa-").with(service);
    let greeting = greeting.with("'");
    AnyPoolOptions::new()
        .max_connections(CONNECTIONS)
        .acquire_timeout(ACQUIRE)
        .max_lifetime(LIFETIME)
        .after_connect(move |connection, _| {
            let greeting = greeting.clone();
            Box::pin(async move { connection.execute(greeting).await.map(drop) })
        })
        .before_acquire(move |_, about| {
            let current = renewal.is_current(about.age);
            Box::pin(async move { Ok(current) })
        })
        .after_release(|connection, _| Box::pin(is_idle(connection)))
}

/// Whether a PostgreSQL connection is outside of any transaction.
///
/// sqlx does not show what the server says of it, but a statement outside starts its own
/// transaction, and so at its own time. A failed transaction answers with an error, which closes the
/// connection too. It costs a round trip that nobody waits for.
async fn is_idle(connection: &mut AnyConnection) -> Result<bool, Error> {
    let row = connection.fetch_one("SELECT now() = statement_timestamp()").await?;
    row.try_get(0)
}

/// Connects to a store that may be coming up. Errors never tell the URL: it has the password.
async fn connect(options: &AnyConnectOptions) -> anyhow::Result<AnyConnection> {
    let host = options.database_url.host_str().unwrap_or("this machine").to_owned();
    let (begin, mut pause, mut told) = (Instant::now(), Duration::from_millis(100), false);
    loop {
        let connected = timeout(CONNECT, options.connect()).await;
        let error = match connected.unwrap_or(Err(Error::PoolTimedOut)) {
            Ok(connection) => return Ok(connection),
            Err(error) => error,
        };
        if !is_coming_up(&error) {
            return Err(error).with_context(|| format!("opening the store on {host}"));
        }
        if begin.elapsed() + pause > COMING_UP {
            let waited = COMING_UP.as_secs();
            return Err(error)
                .with_context(|| format!("waited {waited} s for the store on {host}"));
        }
        if !told {
            tracing::warn!(%error, host, "waiting for the store");
            told = true;
        }
        sleep(pause).await;
        pause = (pause * 2).min(Duration::from_secs(2));
    }
}

/// Whether it may work in a moment: nobody listens, or a server that starts, stops or is full.
fn is_coming_up(error: &Error) -> bool {
    match error {
        Error::Io(_) | Error::PoolTimedOut => true,
        Error::Database(error) => {
            let code = error.code().unwrap_or_default();
            matches!(&*code, "57P01" | "57P02" | "57P03" | "53300")
        }
        _ => false,
    }
}

/// Migrates on a connection of its own, whose end gives back sqlx's advisory lock whatever happens:
/// replicas that start together on PostgreSQL migrate one after the other.
async fn migrate(
    mut connection: AnyConnection,
    engine: Engine,
    service: &'static str,
    migrator: Migrator,
) -> Result<(), MigrateError> {
    match engine {
        Engine::Sqlite => {
            connection.execute(PRAGMAS).await?;
            adopt(&mut connection, service, &migrator).await?;
        }
        Engine::Postgres => {
            connection.execute(NO_LIMITS).await?;
        }
    }
    // Not `run`: a future that holds its `Acquire` is not seen to be Send.
    migrator.run_direct(None, &mut connection, false).await?;
    make_write_check(&mut connection, engine, service).await?;
    drop(connection.close().await); // the steps are done either way
    Ok(())
}

/// Makes the one-row table of [`Db::check_write`]. It is not a step: services share no steps.
async fn make_write_check(
    connection: &mut AnyConnection,
    engine: Engine,
    service: &'static str,
) -> Result<(), Error> {
    // Two sessions that create one table at the same time fail in PostgreSQL.
    let begin = match engine {
        Engine::Sqlite => "BEGIN IMMEDIATE",
        Engine::Postgres => "BEGIN; SELECT pg_advisory_xact_lock(hashtext('hapa_write_check'))",
    };
    let make = SqlText::new(begin)
        .with("; CREATE TABLE IF NOT EXISTS write_check_")
        .with(service)
        .with(" (id BIGINT PRIMARY KEY, checks BIGINT NOT NULL); INSERT INTO write_check_")
        .with(service)
        .with(" (id, checks) VALUES (1, 0) ON CONFLICT DO NOTHING; COMMIT");
    connection.execute(make).await.map(drop)
}

/// Takes over the table in which sqlx counted the steps of a SQLite store before services counted
/// their own: where its first step is ours.
async fn adopt(
    connection: &mut AnyConnection,
    service: &'static str,
    migrator: &Migrator,
) -> Result<(), Error> {
    const OLD: &str = "SELECT name FROM sqlite_master WHERE name = '_sqlx_migrations'";
    let Some(first) = migrator.migrations.first() else { return Ok(()) };
    if connection.fetch_optional(OLD).await?.is_none() {
        return Ok(());
    }
    let ours = sqlx::query("SELECT version FROM _sqlx_migrations WHERE checksum = $1");
    let ours = ours.bind(first.checksum.to_vec());
    if ours.fetch_optional(&mut *connection).await?.is_some() {
        let rename = SqlText::new("ALTER TABLE _sqlx_migrations RENAME TO migrations_");
        connection.execute(rename.with(service)).await?;
    }
    Ok(())
}

fn migrator(service: &str, steps: &[Step]) -> Migrator {
    let migration = |&(version, name, sql): &Step| {
        let (name, sql) = (Cow::Borrowed(name), sql.into_sql_str());
        Migration::new(version, name, MigrationType::Simple, sql, false)
    };
    let mut migrator = Migrator::with_migrations(steps.iter().map(migration).collect());
    // Steps only add, so a replica of the version before can go on, and can be gone back to.
    migrator.set_ignore_missing(true);
    migrator.dangerous_set_table_name(format!("migrations_{service}"));
    migrator
}
