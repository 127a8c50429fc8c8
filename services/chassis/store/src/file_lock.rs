//! Locks between processes on a directory or a file. An error names the process that holds the lock.
//!
//! The kernel holds a lock (`flock`) and releases it at the end of its process, even after a crash. The content of a
//! lock file is only for messages.

use std::fs::{File, TryLockError};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use hapa_core::config::ConfigError;
use tokio::time::{Instant, sleep};

/// Maximum wait for a process that ends and still holds the lock.
const HANDOVER_TIMEOUT: Duration = Duration::from_secs(5);
/// Time between two attempts to get the lock.
const RETRY_INTERVAL: Duration = Duration::from_millis(50);
/// Name of the lock file in DATA_DIR, which each process of that directory holds.
const DIRECTORY_LOCK_FILE: &str = "process.lock";
/// Maximum number of bytes that are read for the names of holders.
const MAX_HOLDERS_LEN: u64 = 4_096;

/// A held lock. Dropping it releases the lock.
#[derive(Debug)]
pub struct FileLock {
    _file: File,
}

/// Whether other processes may hold a lock at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockMode {
    /// No other process may.
    Exclusive,
    /// Other processes may hold the lock in this mode too.
    Shared,
}

/// Locks DATA_DIR for the process `name`: exclusively for `hapa all`, shared for roles.
///
/// In shared mode a read-only directory is not locked (`None`), because a role may not need it.
pub async fn lock_data_dir(
    folder: &Path,
    name: &str,
    kind: LockMode,
) -> anyhow::Result<Option<FileLock>> {
    let path = folder.join(DIRECTORY_LOCK_FILE);
    match lock(&path, name, kind, &folder.display().to_string()).await {
        Err(error) if kind == LockMode::Shared && is_read_only(&error) => Ok(None),
        locked => locked.map(Some),
    }
}

/// Locks a file exclusively, with a separate lock file.
pub(crate) async fn lock_file(path: &Path, name: &str) -> anyhow::Result<FileLock> {
    let mut lock_path = path.as_os_str().to_owned();
    lock_path.push(".lock");
    lock(Path::new(&lock_path), name, LockMode::Exclusive, &path.display().to_string()).await
}

/// The processes that use DATA_DIR, for an operator; `None` if there are none.
pub fn holders_of(folder: &Path) -> Option<String> {
    let file = File::open(folder.join(DIRECTORY_LOCK_FILE)).ok()?;
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => Some(holders(&file)),
        _ => None,
    }
}

/// Locks `path` for the process `name`, and waits up to 5 s for a process that ends. The error names the holders of
/// `what`.
pub async fn lock(path: &Path, name: &str, kind: LockMode, what: &str) -> anyhow::Result<FileLock> {
    let mut file = open(path)?;
    let begin = Instant::now();
    loop {
        match try_lock(&mut file, name, kind) {
            Ok(()) => return Ok(FileLock { _file: file }),
            Err(TryLockError::WouldBlock) if begin.elapsed() < HANDOVER_TIMEOUT => {
                sleep(RETRY_INTERVAL).await;
            }
            Err(TryLockError::WouldBlock) => {
                let problem = format!(
                    "{what} is in use by {}: stop that process, or choose another DATA_DIR",
                    holders(&file)
                );
                return Err(ConfigError::new("DATA_DIR", problem).into());
            }
            Err(TryLockError::Error(error)) => {
                return Err(error).with_context(|| format!("locking {}", path.display()));
            }
        }
    }
}

fn open(path: &Path) -> anyhow::Result<File> {
    if let Some(directory) = path.parent().filter(|directory| !directory.as_os_str().is_empty()) {
        std::fs::create_dir_all(directory)
            .with_context(|| format!("creating the directory {}", directory.display()))?;
    }
    let file = File::options().create(true).read(true).append(true).open(path);
    file.with_context(|| format!("opening {}", path.display()))
}

fn try_lock(file: &mut File, name: &str, kind: LockMode) -> Result<(), TryLockError> {
    // An exclusive lock, even a temporary one, means that the file contains only names of ended processes.
    match file.try_lock() {
        Ok(()) => file.set_len(0).map_err(TryLockError::Error)?,
        Err(TryLockError::WouldBlock) if kind == LockMode::Shared => {}
        Err(error) => return Err(error),
    }
    if kind == LockMode::Shared {
        file.try_lock_shared()?;
    }
    // On a full disk the name is missing, but the lock is held.
    let _ = writeln!(file, "{} {name}", std::process::id());
    Ok(())
}

/// Names and process ids of the holders, as far as they are known.
fn holders(file: &File) -> String {
    let mut text = String::new();
    let mut file = file;
    // The names are missing if the file can't be read.
    let _ = file.rewind().and_then(|()| file.take(MAX_HOLDERS_LEN).read_to_string(&mut text));
    let mut names: Vec<_> = text
        .lines()
        .filter_map(|line| {
            let (process, name) = line.split_once(' ')?;
            process
                .parse::<u32>()
                .is_ok_and(is_alive)
                .then(|| format!("{name} (process {process})"))
        })
        .collect();
    names.dedup();
    if names.is_empty() { "another process".to_owned() } else { names.join(", ") }
}

/// Whether a process exists; true if the system has no /proc.
fn is_alive(process: u32) -> bool {
    let proc = PathBuf::from("/proc");
    !proc.join("self").exists() || proc.join(process.to_string()).exists()
}

fn is_read_only(error: &anyhow::Error) -> bool {
    let kinds = [io::ErrorKind::PermissionDenied, io::ErrorKind::ReadOnlyFilesystem];
    let cause = error.downcast_ref::<io::Error>();
    cause.is_some_and(|cause| kinds.contains(&cause.kind()))
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn locked(folder: &Path, name: &str, kind: LockMode) -> Result<Option<FileLock>, String> {
        lock_data_dir(folder, name, kind).await.map_err(|error| error.to_string())
    }

    #[tokio::test(start_paused = true)]
    async fn a_directory_is_locked_exclusively_or_shared_and_an_error_names_the_holder() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        assert_eq!(holders_of(folder), None);
        let all = locked(folder, "hapa all", LockMode::Exclusive).await.unwrap();
        let own = std::process::id();
        let exclusive_holder = format!("hapa all (process {own})");
        for kind in [LockMode::Exclusive, LockMode::Shared] {
            let refused = locked(folder, "hapa auth", kind).await.unwrap_err();
            assert!(
                refused.starts_with("DATA_DIR: ") && refused.contains(&exclusive_holder),
                "{refused}"
            );
            assert!(refused.contains(&folder.display().to_string()), "{refused}");
        }
        assert_eq!(holders_of(folder), Some(exclusive_holder));
        drop(all);
        assert_eq!(holders_of(folder), None, "the remaining file is not a lock");
        let auth = locked(folder, "hapa auth", LockMode::Shared).await.unwrap();
        let errors = locked(folder, "hapa errors", LockMode::Shared).await.unwrap();
        let refused = locked(folder, "hapa all", LockMode::Exclusive).await.unwrap_err();
        let shared_holders = format!("hapa auth (process {own}), hapa errors (process {own})");
        assert!(refused.contains(&shared_holders), "{refused}");
        drop((auth, errors));
        drop(locked(folder, "hapa all", LockMode::Exclusive).await.unwrap());
    }

    #[tokio::test(start_paused = true)]
    async fn a_process_waits_for_another_one_that_ends() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("auth.db");
        let first = lock_file(&path, "hapa auth").await.unwrap();
        let ending = async {
            sleep(HANDOVER_TIMEOUT / 2).await;
            drop(first);
        };
        let ((), second) = tokio::join!(ending, lock_file(&path, "hapa auth"));
        second.unwrap();
        assert!(!path.exists(), "the locked file itself is not touched");
    }
}
