//! The outbox file: one table, written by one connection and read by another. All SQL of the outbox is here.
//!
//! Committed events survive the end of the process, but not a power failure: that would cost every call a wait for
//! the disk. This process numbers the rows and uses no number twice. So a range of ids identifies delivered events,
//! whatever is added or dropped in the meantime.

use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use hapa_store::file_lock::{self, FileLock};
use hapa_store::open::{damage, is_file_damage};
use hapa_store::sql::{Placeholder, SqlText};
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous};
use sqlx::{
    ConnectOptions as _, Connection as _, Error, Executor as _, Row as _, SqliteConnection,
};

use super::encoded_event::{EncodedEvent, EventKind, Priority};
use super::state::now_ms;

/// Maximum number of rows of one INSERT.
pub(super) const MAX_INSERT_ROWS: usize = 128;
/// Maximum number of events of one delivery.
pub(super) const BATCH_SIZE: usize = 500;
/// Maximum size of one delivery. Receivers accept messages of 4 MiB.
const MAX_BATCH_BYTES: usize = 1024 * 1024;
/// Maximum number of rows that one check of their age deletes.
const EXPIRY_BATCH_SIZE: i64 = 500;

const TABLE: &str = "CREATE TABLE IF NOT EXISTS spool
    (id INTEGER PRIMARY KEY, rank INTEGER NOT NULL, at INTEGER NOT NULL, body BLOB NOT NULL);
    CREATE INDEX IF NOT EXISTS spool_rank ON spool (rank, id)";

/// The connection that writes.
pub(super) struct OutboxStore {
    connection: SqliteConnection,
    options: SqliteConnectOptions,
    next_id: i64,
    /// Stored events by priority.
    pub(super) depth: [u64; 3],
    /// Excludes other processes.
    lock: Option<FileLock>,
}

/// The connection that reads.
#[derive(Debug)]
pub(super) struct OutboxReader(SqliteConnection);

/// An event in the file.
#[derive(Debug)]
pub(super) struct StoredEvent {
    pub(super) priority: Priority,
    pub(super) id: i64,
    pub(super) body: Vec<u8>,
}

/// Events of one priority, from the first to the last id, both included.
#[derive(Clone, Copy, Debug)]
pub(super) struct IdRange {
    pub(super) priority: Priority,
    pub(super) first: i64,
    pub(super) last: i64,
}

/// The number of events in a file, which is opened read-only.
pub(super) async fn count_events(path: &Path) -> anyhow::Result<u64> {
    let options = SqliteConnectOptions::new().filename(path).read_only(true);
    let mut connection = options.disable_statement_logging().connect().await?;
    let row = connection.fetch_one("SELECT COUNT(*) FROM spool").await?;
    Ok(u64::try_from(row.try_get::<i64, _>(0)?).unwrap_or_default())
}

/// The oldest events of each kind in a file, which is opened read-only; at most one batch of each.
pub(super) async fn oldest_events(path: &Path) -> anyhow::Result<Vec<(EventKind, Vec<u8>)>> {
    let options = SqliteConnectOptions::new().filename(path).read_only(true);
    let mut reader = OutboxReader(options.disable_statement_logging().connect().await?);
    let mut oldest = Vec::new();
    for kind in EventKind::ALL {
        let events = reader.next(kind, BATCH_SIZE).await?;
        oldest.extend(events.into_iter().map(|event| (kind, event.body)));
    }
    Ok(oldest)
}

impl OutboxStore {
    /// Opens the file. A damaged file is renamed, because lost events are better than a service that can't start.
    pub(super) async fn open(path: &Path) -> anyhow::Result<(OutboxStore, OutboxReader)> {
        let lock = lock_file(path).await?;
        let (mut store, reader) = match OutboxStore::open_locked(path).await {
            Err(error) if is_damaged(path, &error) => {
                let (renamed, log) = (path.with_extension("broken"), path.with_extension("db-wal"));
                tracing::error!(%error, "E5010: the outbox file is damaged and is renamed to {}", renamed.display());
                std::fs::rename(path, &renamed).context("renaming the damaged outbox file")?;
                // It may not exist.
                let _ = std::fs::remove_file(log);
                OutboxStore::open_locked(path).await?
            }
            opened => opened?,
        };
        store.lock = Some(lock);
        Ok((store, reader))
    }

    async fn open_locked(path: &Path) -> anyhow::Result<(OutboxStore, OutboxReader)> {
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Normal)
            .busy_timeout(Duration::from_secs(1))
            .statement_cache_capacity(MAX_INSERT_ROWS + 8)
            // A checkpoint waits for the disk. The reader runs it, because no call waits for the reader.
            .pragma("wal_autocheckpoint", "0")
            .pragma("journal_size_limit", "16777216");
        let opening = || format!("opening the outbox file {}", path.display());
        let mut connection = options.connect().await.with_context(opening)?;
        connection.execute(TABLE).await.with_context(opening)?;
        let last = connection.fetch_one("SELECT coalesce(max(id), 0) FROM spool").await?;
        let next_id = last.try_get::<i64, _>(0)? + 1;
        let mut depth = [0; 3];
        for row in connection.fetch_all("SELECT rank, count(*) FROM spool GROUP BY rank").await? {
            let (rank, count) = (row.try_get::<i64, _>(0)?, row.try_get::<i64, _>(1)?);
            let depth = usize::try_from(rank).ok().and_then(|rank| depth.get_mut(rank));
            *depth.with_context(opening)? = u64::try_from(count)?;
        }
        let reader = OutboxReader(options.connect().await.with_context(opening)?);
        Ok((OutboxStore { connection, options, next_id, depth, lock: None }, reader))
    }

    /// Replaces the connection after a failure, and tests it with a write that adds no event.
    pub(super) async fn recover(&mut self) -> Result<(), Error> {
        self.connection = self.options.connect().await?;
        self.connection.execute("PRAGMA user_version = 1").await.map(drop)
    }

    /// Inserts events, all or none: one statement is one transaction.
    pub(super) async fn insert(&mut self, events: &[EncodedEvent]) -> Result<(), Error> {
        let sql = SqlText::new("INSERT INTO spool (id, rank, at, body) VALUES ");
        let sql = sql.rows(Placeholder::Anonymous, events.len().max(1), 4, "");
        let (mut query, at) = (sqlx::query(sql), to_i64(now_ms()));
        let first = self.next_id;
        for (id, event) in (first..).zip(events) {
            let rank = event.priority as i64;
            query = query.bind(id).bind(rank).bind(at).bind(event.body.as_slice());
            self.next_id = id + 1;
        }
        query.execute(&mut self.connection).await?;
        for event in events {
            self.depth[event.priority as usize] += 1;
        }
        Ok(())
    }

    /// Deletes events that were delivered or refused.
    pub(super) async fn delete(&mut self, range: IdRange) -> Result<(), Error> {
        let query = sqlx::query("DELETE FROM spool WHERE rank = ? AND id BETWEEN ? AND ?");
        let query = query.bind(range.priority as i64).bind(range.first).bind(range.last);
        let deleted = query.execute(&mut self.connection).await?;
        self.subtract_depth(range.priority, deleted.rows_affected());
        Ok(())
    }

    /// Deletes the oldest `count` events of a priority.
    pub(super) async fn evict(&mut self, priority: Priority, count: u64) -> Result<u64, Error> {
        let query = sqlx::query(
            "DELETE FROM spool WHERE id IN
                (SELECT id FROM spool WHERE rank = ? ORDER BY id LIMIT ?)",
        );
        let query = query.bind(priority as i64).bind(to_i64(count));
        let deleted = query.execute(&mut self.connection).await?.rows_affected();
        self.subtract_depth(priority, deleted);
        Ok(deleted)
    }

    /// Deletes events of a priority that are older than `before`, at most one batch.
    pub(super) async fn expire(&mut self, priority: Priority, before: u64) -> Result<u64, Error> {
        let query = sqlx::query(
            "DELETE FROM spool WHERE at < ? AND id IN
                (SELECT id FROM spool WHERE rank = ? ORDER BY id LIMIT ?)",
        );
        let query = query.bind(to_i64(before)).bind(priority as i64).bind(EXPIRY_BATCH_SIZE);
        let deleted = query.execute(&mut self.connection).await?.rows_affected();
        self.subtract_depth(priority, deleted);
        Ok(deleted)
    }

    /// When the oldest event was stored, in milliseconds since 1970.
    pub(super) async fn oldest(&mut self) -> Result<Option<u64>, Error> {
        let row =
            self.connection.fetch_optional("SELECT at FROM spool ORDER BY id LIMIT 1").await?;
        row.map(|row| row.try_get::<i64, _>(0)).transpose().map(|at| at.map(i64::cast_unsigned))
    }

    /// Checkpoints the whole write-ahead log, and truncates it.
    pub(super) async fn checkpoint(&mut self) -> Result<(), Error> {
        self.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").await.map(drop)
    }

    pub(super) async fn close(self) {
        // Committed events stay even if this fails.
        let _ = self.connection.close().await;
    }

    fn subtract_depth(&mut self, priority: Priority, count: u64) {
        let depth = &mut self.depth[priority as usize];
        *depth = depth.saturating_sub(count);
    }
}

impl OutboxReader {
    /// The next events of a kind to deliver, at most `max`: highest priority first, oldest first.
    pub(super) async fn next(
        &mut self,
        kind: EventKind,
        max: usize,
    ) -> Result<Vec<StoredEvent>, Error> {
        let (mut events, mut bytes) = (Vec::new(), 0);
        for &priority in kind.priorities() {
            let query =
                sqlx::query("SELECT id, body FROM spool WHERE rank = ? ORDER BY id LIMIT ?");
            let left = i64::try_from(max - events.len()).unwrap_or(i64::MAX);
            for row in query.bind(priority as i64).bind(left).fetch_all(&mut self.0).await? {
                let body: Vec<u8> = row.try_get(1)?;
                bytes += body.len();
                if bytes > MAX_BATCH_BYTES && !events.is_empty() {
                    return Ok(events);
                }
                events.push(StoredEvent { priority, id: row.try_get(0)?, body });
            }
            if events.len() == max {
                break;
            }
        }
        Ok(events)
    }

    /// Checkpoints the write-ahead log without blocking the writer. Returns the length of the log in pages.
    pub(super) async fn checkpoint(&mut self) -> Result<i64, Error> {
        self.0.fetch_one("PRAGMA wal_checkpoint(PASSIVE)").await?.try_get(1)
    }
}

/// Locks the file. SQLite lets two processes share a file, but the numbering of rows does not.
async fn lock_file(path: &Path) -> anyhow::Result<FileLock> {
    let (lock_path, name) = (path.with_extension("lock"), path.display().to_string());
    file_lock::lock(&lock_path, "hapa", file_lock::LockMode::Exclusive, &name).await
}

/// Whether an error is caused by damage of the file.
fn is_damaged(path: &Path, error: &anyhow::Error) -> bool {
    is_file_damage(error) || (path.exists() && matches!(damage(path), Ok(Some(_))))
}

fn to_i64(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
