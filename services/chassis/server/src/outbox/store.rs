//! The files of an outbox: a folder with one log for each priority.
//!
//! Written events survive the end of the process, but not a power failure: that would cost every call a wait for the
//! disk. One process uses the folder at a time. Damaged parts of files are reported and skipped, because lost events are
//! better than a service that can't start.

mod cursor;
mod event_log;
mod record;
mod segment;
mod sqlite_file;
#[cfg(test)]
pub(super) mod tests;

use std::io;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use hapa_store::file_lock::{self, FileLock, LockMode};

use self::event_log::{Damage, EventLog, Position};
use super::priority::{EventKind, Priority};

pub(super) use self::record::{HEADER_LEN, append_record};
pub(super) use self::sqlite_file::is_sqlite_file;

/// Maximum number of events of one delivery.
pub(super) const BATCH_SIZE: usize = 500;
/// Maximum size of one delivery. Receivers accept messages of 4 MiB.
const MAX_BATCH_BYTES: usize = 1024 * 1024;
/// Maximum number of events that one check of their age drops, so that calls need not wait for it.
const EXPIRY_BATCH_SIZE: u64 = 10_000;
/// Size of the file that tests whether the disk accepts writes: a block.
const PROBE_BYTES: usize = 4_096;

#[derive(Debug)]
pub(super) struct OutboxStore {
    folder: PathBuf,
    /// By priority.
    logs: [EventLog; 3],
    /// Excludes other processes.
    lock: Option<FileLock>,
}

/// The oldest events of a kind: highest priority first, oldest first.
#[derive(Debug, Default)]
pub(super) struct EventBatch {
    pub(super) bodies: Vec<Vec<u8>>,
    pub(super) end: BatchEnd,
}

/// The place after the last event of a batch in each of its logs.
#[derive(Clone, Debug, Default)]
pub(super) struct BatchEnd(Vec<(Priority, Position)>);

impl OutboxStore {
    /// Opens the folder, and creates it if it is missing. It fails if another process has it open.
    pub(super) async fn open(folder: &Path) -> anyhow::Result<OutboxStore> {
        set_aside_file(folder)?;
        let (lock_path, name) = (folder.join("lock"), folder.display().to_string());
        let lock = file_lock::lock(&lock_path, "hapa", LockMode::Exclusive, &name).await?;
        let path = folder.to_owned();
        let opened = tokio::task::spawn_blocking(move || OutboxStore::open_logs(&path)).await?;
        let (mut store, damages) = opened.with_context(|| format!("opening the outbox {name}"))?;
        for Damage { path, problem, .. } in damages {
            let path = path.display();
            tracing::error!("E5010: the outbox file {path} is damaged and is skipped: {problem}");
        }
        store.lock = Some(lock);
        sqlite_file::import(folder, &mut store).await?;
        Ok(store)
    }

    fn open_logs(folder: &Path) -> io::Result<(OutboxStore, Vec<Damage>)> {
        OutboxStore::with_logs(folder, |priority| EventLog::open(folder, priority))
    }

    /// Reads the folder of another process without changing it.
    pub(super) fn scan(folder: &Path) -> io::Result<(OutboxStore, Vec<Damage>)> {
        OutboxStore::with_logs(folder, |priority| EventLog::scan(folder, priority))
    }

    fn with_logs(
        folder: &Path,
        open: impl Fn(Priority) -> io::Result<(EventLog, Vec<Damage>)>,
    ) -> io::Result<(OutboxStore, Vec<Damage>)> {
        let [usage, failed_usage, occurrence] = Priority::ALL.map(open);
        let ((usage, mut damages), (failed_usage, more), (occurrence, last)) =
            (usage?, failed_usage?, occurrence?);
        damages.extend(more.into_iter().chain(last));
        let logs = [usage, failed_usage, occurrence];
        Ok((OutboxStore { folder: folder.to_owned(), logs, lock: None }, damages))
    }

    /// Stored events by priority.
    pub(super) fn depth(&self) -> [u64; 3] {
        self.logs.each_ref().map(EventLog::depth)
    }

    /// Appends encoded records of a priority, all or none.
    pub(super) fn append(
        &mut self,
        priority: Priority,
        records: &[u8],
        event_count: u64,
    ) -> io::Result<()> {
        self.logs[priority as usize].append(records, event_count)
    }

    /// The next events of a kind to deliver, at most `max`.
    pub(super) fn next(&mut self, kind: EventKind, max: usize) -> io::Result<EventBatch> {
        let (mut batch, mut bytes, mut is_full) = (EventBatch::default(), 0, false);
        for &priority in kind.priorities() {
            let log = &mut self.logs[priority as usize];
            if is_full || log.depth() == 0 {
                continue;
            }
            let first = batch.bodies.len();
            let end = log.read(|body| {
                bytes += body.len();
                let is_too_large = bytes > MAX_BATCH_BYTES && !batch.bodies.is_empty();
                is_full = is_too_large || batch.bodies.len() == max;
                if !is_full {
                    batch.bodies.push(body.to_vec());
                }
                !is_full
            })?;
            if batch.bodies.len() > first {
                batch.end.0.push((priority, end));
            } else if !is_full {
                // Its files were removed.
                log.advance(end);
            }
        }
        Ok(batch)
    }

    /// Consumes the events of a batch, as far as they have not been dropped in the meantime.
    pub(super) fn advance(&mut self, end: &BatchEnd) {
        for &(priority, position) in &end.0 {
            self.logs[priority as usize].advance(position);
        }
    }

    /// Drops the oldest `count` events of a priority. Returns their number.
    pub(super) fn evict(&mut self, priority: Priority, count: u64) -> io::Result<u64> {
        self.logs[priority as usize].evict(count)
    }

    /// Drops events of a priority that are older than `before`, at most one batch. Returns their number.
    pub(super) fn expire(&mut self, priority: Priority, before: u64) -> io::Result<u64> {
        self.logs[priority as usize].expire(before, EXPIRY_BATCH_SIZE)
    }

    /// When the oldest event was stored, in milliseconds since 1970.
    pub(super) fn oldest(&mut self) -> Option<u64> {
        self.logs.iter_mut().filter_map(EventLog::oldest).min()
    }

    /// Tests whether the disk accepts writes, without adding an event.
    pub(super) fn probe(&self) -> io::Result<()> {
        let path = self.folder.join("probe");
        let written = std::fs::write(&path, [0; PROBE_BYTES]);
        // The next test replaces a file that stays.
        let _ = std::fs::remove_file(&path);
        written
    }
}

/// The number of events in the outbox of another or ended process.
pub(super) async fn count_events(path: &Path) -> anyhow::Result<u64> {
    if is_sqlite_file(path) {
        return sqlite_file::count_events(path).await;
    }
    let path = path.to_owned();
    let (store, damages) = tokio::task::spawn_blocking(move || OutboxStore::scan(&path)).await??;
    if let Some(Damage { path, problem, .. }) = damages.iter().find(|one| one.is_unreadable) {
        anyhow::bail!("{} can't be read: {problem}", path.display());
    }
    Ok(store.depth().iter().sum())
}

/// The oldest events of each kind in the outbox of another or ended process; at most one batch of each.
pub(super) async fn oldest_events(path: &Path) -> anyhow::Result<Vec<(EventKind, Vec<u8>)>> {
    if is_sqlite_file(path) {
        return sqlite_file::oldest_events(path).await;
    }
    let path = path.to_owned();
    let read = move || {
        let (mut store, _) = OutboxStore::scan(&path)?;
        let mut oldest = Vec::new();
        for kind in EventKind::ALL {
            let batch = store.next(kind, BATCH_SIZE)?;
            oldest.extend(batch.bodies.into_iter().map(|body| (kind, body)));
        }
        anyhow::Ok(oldest)
    };
    tokio::task::spawn_blocking(read).await?
}

/// Renames a file that has the name of the folder.
fn set_aside_file(folder: &Path) -> anyhow::Result<()> {
    if folder.is_file() {
        let renamed = folder.with_extension("broken");
        tracing::error!("E5010: the outbox is no folder and is renamed to {}", renamed.display());
        std::fs::rename(folder, &renamed).context("renaming the damaged outbox")?;
    }
    Ok(())
}
