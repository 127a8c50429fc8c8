//! The SQLite file `spool-NAME.db`, in which earlier versions stored the events of `outbox-NAME`. Its events are moved to
//! the logs once. A move that is interrupted is repeated, and receivers count its events once by their ids.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use hapa_store::file_lock::{self, LockMode};
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{ConnectOptions as _, Connection as _, Executor as _, Row as _, SqliteConnection};

use super::record::append_record;
use super::{BATCH_SIZE, OutboxStore};
use crate::outbox::priority::{EventKind, Priority};

/// Whether a file name is one of a SQLite file: `spool-*.db`.
pub(in crate::outbox) fn is_sqlite_file(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    name.starts_with("spool-") && path.extension().is_some_and(|extension| extension == "db")
}

/// Moves the events of the SQLite file that belongs to a folder, and removes the file. A damaged file is renamed.
pub(super) async fn import(folder: &Path, store: &mut OutboxStore) -> anyhow::Result<()> {
    let Some(path) = sqlite_path(folder).filter(|path| path.exists()) else { return Ok(()) };
    let (lock_path, name) = (path.with_extension("lock"), path.display().to_string());
    let _lock = file_lock::lock(&lock_path, "hapa", LockMode::Exclusive, &name).await?;
    match move_events(&path, store).await {
        Ok(count) => {
            tracing::info!(count, "the events of {name} were moved to {}", folder.display());
            std::fs::remove_file(&path).with_context(|| format!("removing {name}"))?;
        }
        Err(MoveError::Read(error)) => {
            let renamed = path.with_extension("broken");
            tracing::error!(%error, "E5010: the outbox file is damaged and is renamed to {}", renamed.display());
            std::fs::rename(&path, &renamed).context("renaming the damaged outbox file")?;
        }
        Err(MoveError::Write(error)) => {
            // The next start moves the events.
            tracing::error!(%error, "E5010: the events of {name} can't be moved; check the disk of DATA_DIR");
            return Ok(());
        }
    }
    for extension in ["db-wal", "db-shm", "lock"] {
        // It may not exist.
        let _ = std::fs::remove_file(path.with_extension(extension));
    }
    Ok(())
}

/// The number of events in a file, which is opened read-only.
pub(super) async fn count_events(path: &Path) -> anyhow::Result<u64> {
    let mut connection = connect(path, true).await?;
    let row = connection.fetch_one("SELECT COUNT(*) FROM spool").await?;
    Ok(u64::try_from(row.try_get::<i64, _>(0)?).unwrap_or_default())
}

/// The oldest events of each kind in a file, which is opened read-only; at most one batch of each.
pub(super) async fn oldest_events(path: &Path) -> anyhow::Result<Vec<(EventKind, Vec<u8>)>> {
    let mut connection = connect(path, true).await?;
    let mut oldest = Vec::new();
    for kind in EventKind::ALL {
        for &priority in kind.priorities() {
            let rows = read_batch(&mut connection, priority, 0).await?;
            oldest.extend(rows.into_iter().map(|row| (kind, row.body)));
        }
    }
    Ok(oldest)
}

enum MoveError {
    Read(sqlx::Error),
    Write(std::io::Error),
}

struct StoredRow {
    id: i64,
    time: u64,
    body: Vec<u8>,
}

async fn move_events(path: &Path, store: &mut OutboxStore) -> Result<u64, MoveError> {
    let mut connection = connect(path, false).await.map_err(MoveError::Read)?;
    let mut count = 0;
    for priority in Priority::ALL {
        let mut last_id = i64::MIN;
        loop {
            let rows = read_batch(&mut connection, priority, last_id);
            let rows = rows.await.map_err(MoveError::Read)?;
            let Some(last) = rows.last() else { break };
            last_id = last.id;
            let mut records = Vec::new();
            for row in &rows {
                append_record(&mut records, row.time, |log| log.extend_from_slice(&row.body));
            }
            let moved = rows.len() as u64;
            store.append(priority, &records, moved).map_err(MoveError::Write)?;
            count += moved;
        }
    }
    // The file is removed in any case.
    let _ = connection.close().await;
    Ok(count)
}

async fn connect(path: &Path, is_read_only: bool) -> Result<SqliteConnection, sqlx::Error> {
    let options = SqliteConnectOptions::new().filename(path).read_only(is_read_only);
    options.disable_statement_logging().connect().await
}

/// The events of a priority after an id, oldest first, at most one batch.
async fn read_batch(
    connection: &mut SqliteConnection,
    priority: Priority,
    after: i64,
) -> Result<Vec<StoredRow>, sqlx::Error> {
    let query =
        sqlx::query("SELECT id, at, body FROM spool WHERE rank = ? AND id > ? ORDER BY id LIMIT ?");
    let query = query.bind(priority as i64).bind(after);
    let rows = query.bind(i64::try_from(BATCH_SIZE).unwrap_or(i64::MAX)).fetch_all(connection);
    let row = |row: &sqlx::sqlite::SqliteRow| {
        let time = row.try_get::<i64, _>(1)?.cast_unsigned();
        Ok(StoredRow { id: row.try_get(0)?, time, body: row.try_get(2)? })
    };
    rows.await?.iter().map(row).collect()
}

/// `spool-NAME.db` beside `outbox-NAME`.
fn sqlite_path(folder: &Path) -> Option<PathBuf> {
    let name = folder.file_name()?.to_str()?.strip_prefix("outbox-")?;
    Some(folder.with_file_name(format!("spool-{name}.db")))
}
