//! The spool's file: one table, written by one connection and read by another. The SQL of it is here.
//!
//! What is committed survives the process, not the power: that would cost a disk's wait a call.
//! Rows are numbered by this process and no number comes twice, so a range of them names what was
//! delivered whatever else is added or dropped meanwhile.

use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use hapa_store::file_lock::{self, Lock};
use hapa_store::open::{damage, is_of_the_file};
use hapa_store::sql::{Placeholder, SqlText};
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous};
use sqlx::{
    ConnectOptions as _, Connection as _, Error, Executor as _, Row as _, SqliteConnection,
};

use super::{Item, Kind, Rank, now_ms};

/// The most rows of one INSERT.
pub(super) const TOGETHER: usize = 128;
/// The most rows and bytes of one delivery. Receivers take 4 MiB.
pub(super) const BATCH: usize = 500;
const BATCH_BYTES: usize = 1024 * 1024;
/// Rows whose age is looked at in one go.
const EXPIRING: i64 = 500;

const TABLE: &str = "CREATE TABLE IF NOT EXISTS spool
    (id INTEGER PRIMARY KEY, rank INTEGER NOT NULL, at INTEGER NOT NULL, body BLOB NOT NULL);
    CREATE INDEX IF NOT EXISTS spool_rank ON spool (rank, id)";

/// The connection that writes.
pub(super) struct Store {
    connection: SqliteConnection,
    options: SqliteConnectOptions,
    next: i64,
    /// Rows by rank.
    pub(super) depth: [u64; 3],
    /// Held as long as the file is ours.
    lock: Option<Lock>,
}

/// The connection that reads.
#[derive(Debug)]
pub(super) struct Reader(SqliteConnection);

/// One event that waits.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) rank: Rank,
    pub(super) id: i64,
    pub(super) body: Vec<u8>,
}

/// Rows of one rank, by their first and last number.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    pub(super) rank: Rank,
    pub(super) first: i64,
    pub(super) last: i64,
}

/// How many events wait in a file, which stays as it is.
pub(super) async fn waiting(path: &Path) -> anyhow::Result<u64> {
    let options = SqliteConnectOptions::new().filename(path).read_only(true);
    let mut connection = options.disable_statement_logging().connect().await?;
    let row = connection.fetch_one("SELECT COUNT(*) FROM spool").await?;
    Ok(u64::try_from(row.try_get::<i64, _>(0)?).unwrap_or_default())
}

/// The oldest events of each kind in a file, which stays as it is; as many as one delivery has.
pub(super) async fn oldest(path: &Path) -> anyhow::Result<Vec<(Kind, Vec<u8>)>> {
    let options = SqliteConnectOptions::new().filename(path).read_only(true);
    let mut reader = Reader(options.disable_statement_logging().connect().await?);
    let mut oldest = Vec::new();
    for kind in Kind::ALL {
        let rows = reader.next(kind, BATCH).await?;
        oldest.extend(rows.into_iter().map(|row| (kind, row.body)));
    }
    Ok(oldest)
}

impl Store {
    /// Opens the file. One that is no database any more is put aside: a service that can't start is
    /// worse than events that are lost.
    pub(super) async fn open(path: &Path) -> anyhow::Result<(Store, Reader)> {
        let lock = lock_spool(path).await?;
        let (mut store, reader) = match Store::open_locked(path).await {
            Err(error) if is_broken(path, &error) => {
                let (broken, log) = (path.with_extension("broken"), path.with_extension("db-wal"));
                tracing::error!(%error, "E5010: the event spool is put aside: {}", broken.display());
                std::fs::rename(path, &broken).context("putting the event spool aside")?;
                // There may be none.
                let _ = std::fs::remove_file(log);
                Store::open_locked(path).await?
            }
            opened => opened?,
        };
        store.lock = Some(lock);
        Ok((store, reader))
    }

    async fn open_locked(path: &Path) -> anyhow::Result<(Store, Reader)> {
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Normal)
            .busy_timeout(Duration::from_secs(1))
            .statement_cache_capacity(TOGETHER + 8)
            // Folding the log in waits for the disk: the reader does it, where no call waits.
            .pragma("wal_autocheckpoint", "0")
            .pragma("journal_size_limit", "16777216");
        let opening = || format!("opening the event spool {}", path.display());
        let mut connection = options.connect().await.with_context(opening)?;
        connection.execute(TABLE).await.with_context(opening)?;
        let last = connection.fetch_one("SELECT coalesce(max(id), 0) FROM spool").await?;
        let next = last.try_get::<i64, _>(0)? + 1;
        let mut depth = [0; 3];
        for row in connection.fetch_all("SELECT rank, count(*) FROM spool GROUP BY rank").await? {
            let (rank, count) = (row.try_get::<i64, _>(0)?, row.try_get::<i64, _>(1)?);
            let place = usize::try_from(rank).ok().and_then(|rank| depth.get_mut(rank));
            *place.with_context(opening)? = u64::try_from(count)?;
        }
        let reader = Reader(options.connect().await.with_context(opening)?);
        Ok((Store { connection, options, next, depth, lock: None }, reader))
    }

    /// After a failure: replaces the connection, and writes something that is no event.
    pub(super) async fn recover(&mut self) -> Result<(), Error> {
        self.connection = self.options.connect().await?;
        self.connection.execute("PRAGMA user_version = 1").await.map(drop)
    }

    /// Writes at most [`TOGETHER`] events: all or none, in one statement and so in one transaction.
    pub(super) async fn insert(&mut self, items: &[Item]) -> Result<(), Error> {
        let sql = SqlText::new("INSERT INTO spool (id, rank, at, body) VALUES ");
        let sql = sql.rows(Placeholder::Anonymous, items.len().max(1), 4, "");
        let (mut query, at) = (sqlx::query(sql), millis(now_ms()));
        let first = self.next;
        for (id, item) in (first..).zip(items) {
            query = query.bind(id).bind(item.rank as i64).bind(at).bind(item.body.as_slice());
            self.next = id + 1;
        }
        query.execute(&mut self.connection).await?;
        for item in items {
            self.depth[item.rank as usize] += 1;
        }
        Ok(())
    }

    /// Removes what was delivered or refused.
    pub(super) async fn delete(&mut self, span: Span) -> Result<(), Error> {
        let query = sqlx::query("DELETE FROM spool WHERE rank = ? AND id BETWEEN ? AND ?");
        let query = query.bind(span.rank as i64).bind(span.first).bind(span.last);
        let done = query.execute(&mut self.connection).await?;
        self.less(span.rank, done.rows_affected());
        Ok(())
    }

    /// Removes the oldest of a rank.
    pub(super) async fn evict(&mut self, rank: Rank, count: u64) -> Result<u64, Error> {
        let query = sqlx::query(
            "DELETE FROM spool WHERE id IN
                (SELECT id FROM spool WHERE rank = ? ORDER BY id LIMIT ?)",
        );
        let query = query.bind(rank as i64).bind(millis(count));
        let done = query.execute(&mut self.connection).await?.rows_affected();
        self.less(rank, done);
        Ok(done)
    }

    /// Removes the oldest of a rank that are older than `before`, a bounded number of them.
    pub(super) async fn expire(&mut self, rank: Rank, before: u64) -> Result<u64, Error> {
        let query = sqlx::query(
            "DELETE FROM spool WHERE at < ? AND id IN
                (SELECT id FROM spool WHERE rank = ? ORDER BY id LIMIT ?)",
        );
        let query = query.bind(millis(before)).bind(rank as i64).bind(EXPIRING);
        let done = query.execute(&mut self.connection).await?.rows_affected();
        self.less(rank, done);
        Ok(done)
    }

    /// When the oldest row was written.
    pub(super) async fn oldest(&mut self) -> Result<Option<u64>, Error> {
        let row =
            self.connection.fetch_optional("SELECT at FROM spool ORDER BY id LIMIT 1").await?;
        row.map(|row| row.try_get::<i64, _>(0)).transpose().map(|at| at.map(i64::cast_unsigned))
    }

    /// Folds the whole log into the file, and cuts it off.
    pub(super) async fn fold(&mut self) -> Result<(), Error> {
        self.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").await.map(drop)
    }

    pub(super) async fn close(self) {
        // What is committed stays, also where this fails.
        let _ = self.connection.close().await;
    }

    fn less(&mut self, rank: Rank, count: u64) {
        let depth = &mut self.depth[rank as usize];
        *depth = depth.saturating_sub(count);
    }
}

impl Reader {
    /// The next events to deliver, at most `most`: what is most worth keeping first, oldest first.
    pub(super) async fn next(&mut self, kind: Kind, most: usize) -> Result<Vec<Row>, Error> {
        let (mut rows, mut bytes) = (Vec::new(), 0);
        for &rank in kind.ranks() {
            let query =
                sqlx::query("SELECT id, body FROM spool WHERE rank = ? ORDER BY id LIMIT ?");
            let left = i64::try_from(most - rows.len()).unwrap_or(i64::MAX);
            for row in query.bind(rank as i64).bind(left).fetch_all(&mut self.0).await? {
                let body: Vec<u8> = row.try_get(1)?;
                bytes += body.len();
                if bytes > BATCH_BYTES && !rows.is_empty() {
                    return Ok(rows);
                }
                rows.push(Row { rank, id: row.try_get(0)?, body });
            }
            if rows.len() == most {
                break;
            }
        }
        Ok(rows)
    }

    /// Folds the log into the file as far as nobody is disturbed; the log's length in pages.
    pub(super) async fn fold(&mut self) -> Result<i64, Error> {
        self.0.fetch_one("PRAGMA wal_checkpoint(PASSIVE)").await?.try_get(1)
    }
}

/// SQLite lets two processes share a file; the numbering of rows does not.
async fn lock_spool(path: &Path) -> anyhow::Result<Lock> {
    let (beside, what) = (path.with_extension("lock"), path.display().to_string());
    file_lock::lock(&beside, "hapa", file_lock::Kind::Exclusive, &what).await
}

/// Whether it is the file that is wrong.
fn is_broken(path: &Path, error: &anyhow::Error) -> bool {
    is_of_the_file(error) || (path.exists() && matches!(damage(path), Ok(Some(_))))
}

fn millis(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
