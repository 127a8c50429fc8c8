//! Locks between processes: who may use a folder or a file, said with the name of who does.
//!
//! A lock is the kernel's (`flock`) and ends with its process, however that ends. What stands in the file is for
//! the message alone.

use std::fs::{File, TryLockError};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use hapa_core::config::Wrong;
use tokio::time::{Instant, sleep};

/// How long a process that ends may hold what the next one wants.
const HANDOVER: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(50);
/// In DATA_DIR: held by each process that uses it.
const FOLDER_LOCK: &str = "process.lock";
/// The longest file that is read for names.
const MAX_HOLDERS_LEN: u64 = 4_096;

/// Held as long as it lives.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

/// What else may hold a lock at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Nothing.
    Exclusive,
    /// Others who share it.
    Shared,
}

/// Locks DATA_DIR for a process that calls itself `name`: `hapa all` has it alone, roles share it.
///
/// A folder that can't be written to is left to roles, since one may need nothing of it.
pub async fn lock_folder(folder: &Path, name: &str, kind: Kind) -> anyhow::Result<Option<Lock>> {
    let path = folder.join(FOLDER_LOCK);
    match lock(&path, name, kind, &folder.display().to_string()).await {
        Err(error) if kind == Kind::Shared && is_read_only(&error) => Ok(None),
        locked => locked.map(Some),
    }
}

/// Locks a file that one process alone may use, by a file beside it.
pub async fn lock_file(path: &Path, name: &str) -> anyhow::Result<Lock> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".lock");
    lock(Path::new(&beside), name, Kind::Exclusive, &path.display().to_string()).await
}

/// Who uses DATA_DIR now, for an operator; none where nobody does.
pub fn holders_of(folder: &Path) -> Option<String> {
    let file = File::open(folder.join(FOLDER_LOCK)).ok()?;
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => Some(holders(&file)),
        _ => None,
    }
}

/// Waits for a process that ends, and is refused by one that goes on: `what` is in use by whom.
pub async fn lock(path: &Path, name: &str, kind: Kind, what: &str) -> anyhow::Result<Lock> {
    let mut file = open(path)?;
    let begin = Instant::now();
    loop {
        match try_lock(&mut file, name, kind) {
            Ok(()) => return Ok(Lock { _file: file }),
            Err(TryLockError::WouldBlock) if begin.elapsed() < HANDOVER => sleep(PAUSE).await,
            Err(TryLockError::WouldBlock) => {
                let words = format!(
                    "{what} is in use by {}: stop that, or choose another DATA_DIR",
                    holders(&file)
                );
                return Err(Wrong::new("DATA_DIR", words).into());
            }
            Err(TryLockError::Error(error)) => {
                return Err(error).with_context(|| format!("locking {}", path.display()));
            }
        }
    }
}

fn open(path: &Path) -> anyhow::Result<File> {
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        std::fs::create_dir_all(folder)
            .with_context(|| format!("making the folder {}", folder.display()))?;
    }
    let file = File::options().create(true).read(true).append(true).open(path);
    file.with_context(|| format!("opening {}", path.display()))
}

fn try_lock(file: &mut File, name: &str, kind: Kind) -> Result<(), TryLockError> {
    // Who has it alone, if for a moment, clears the names of those who are gone.
    match file.try_lock() {
        Ok(()) => file.set_len(0).map_err(TryLockError::Error)?,
        Err(TryLockError::WouldBlock) if kind == Kind::Shared => {}
        Err(error) => return Err(error),
    }
    if kind == Kind::Shared {
        file.try_lock_shared()?;
    }
    // A disk that is full takes a name away, and no lock.
    let _ = writeln!(file, "{} {name}", std::process::id());
    Ok(())
}

/// Names and process ids of who holds a lock, as far as they are known.
fn holders(file: &File) -> String {
    let mut text = String::new();
    let mut file = file;
    // What can't be read has no names.
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

/// Whether there is such a process, where that can be known.
fn is_alive(process: u32) -> bool {
    let all = PathBuf::from("/proc");
    !all.join("self").exists() || all.join(process.to_string()).exists()
}

fn is_read_only(error: &anyhow::Error) -> bool {
    let kinds = [io::ErrorKind::PermissionDenied, io::ErrorKind::ReadOnlyFilesystem];
    let cause = error.downcast_ref::<io::Error>();
    cause.is_some_and(|cause| kinds.contains(&cause.kind()))
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn locked(folder: &Path, name: &str, kind: Kind) -> Result<Option<Lock>, String> {
        lock_folder(folder, name, kind).await.map_err(|error| error.to_string())
    }

    #[tokio::test(start_paused = true)]
    async fn a_folder_is_one_process_s_alone_or_shared_and_who_is_refused_learns_by_whom() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        assert_eq!(holders_of(folder), None);
        let all = locked(folder, "hapa all", Kind::Exclusive).await.unwrap();
        let own = std::process::id();
        let by_all = format!("hapa all (process {own})");
        for kind in [Kind::Exclusive, Kind::Shared] {
            let refused = locked(folder, "hapa auth", kind).await.unwrap_err();
            assert!(refused.starts_with("DATA_DIR: ") && refused.contains(&by_all), "{refused}");
            assert!(refused.contains(&folder.display().to_string()), "{refused}");
        }
        assert_eq!(holders_of(folder), Some(by_all));
        drop(all);
        assert_eq!(holders_of(folder), None, "what a process left behind is no lock");
        let auth = locked(folder, "hapa auth", Kind::Shared).await.unwrap();
        let errors = locked(folder, "hapa errors", Kind::Shared).await.unwrap();
        let refused = locked(folder, "hapa all", Kind::Exclusive).await.unwrap_err();
        let by_both = format!("hapa auth (process {own}), hapa errors (process {own})");
        assert!(refused.contains(&by_both), "{refused}");
        drop((auth, errors));
        drop(locked(folder, "hapa all", Kind::Exclusive).await.unwrap());
    }

    #[tokio::test(start_paused = true)]
    async fn who_comes_while_another_ends_waits_for_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("auth.db");
        let first = lock_file(&path, "hapa auth").await.unwrap();
        let ending = async {
            sleep(HANDOVER / 2).await;
            drop(first);
        };
        let ((), second) = tokio::join!(ending, lock_file(&path, "hapa auth"));
        second.unwrap();
        assert!(!path.exists(), "the file itself is left alone");
    }
}
