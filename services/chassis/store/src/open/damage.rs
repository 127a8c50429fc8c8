//! Detection of damaged SQLite files, as opposed to temporary failures, and how they are set aside.
//!
//! Invariant: nothing is deleted. A file that is set aside keeps its write-ahead log, so that SQLite's own tools can
//! recover its data.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use sqlx::Error;
use time::OffsetDateTime;
use time::macros::format_description;

/// The first bytes of every SQLite file.
const MAGIC: &[u8; 16] = b"SQLite format 3\0";
/// Length of the header of a SQLite file, in bytes. <https://www.sqlite.org/fileformat.html#the_database_header>
const HEADER_LEN: usize = 100;
/// Part of the name of a file that was set aside.
const SET_ASIDE_INFIX: &str = ".damaged-";
/// Suffixes of the files that belong to a SQLite file.
const SIDECAR_SUFFIXES: [&str; 2] = ["-wal", "-shm"];

/// The damage of a file, as far as it is visible without SQLite; `None` if there is none, or no file. Fails if the
/// cause is not the file itself, such as a lack of file descriptors or an unreadable disk. No other part of this
/// process may have the file open: closing it here would release SQLite's locks.
pub fn damage(path: &Path) -> io::Result<Option<String>> {
    for suffix in SIDECAR_SUFFIXES {
        match File::options().read(true).write(true).open(with_suffix(path, suffix)) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return damage_of_error(error, &format!("its {suffix} file")),
        }
    }
    let has_log = fs::metadata(with_suffix(path, "-wal")).is_ok_and(|log| log.len() > 0);
    let opened = File::options().read(true).write(true).open(path);
    let mut file = match opened {
        Ok(file) => file,
        // SQLite would discard the log.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Ok(has_log.then(|| "it is missing, but its log exists".to_owned()));
        }
        Err(error) => return damage_of_error(error, "it"),
    };
    let length = file.metadata()?.len();
    if length == 0 {
        // Without a log it is a new store.
        return Ok(has_log.then(|| "it is empty, but its log is not".to_owned()));
    }
    let mut header = [0; HEADER_LEN];
    match file.read_exact(&mut header) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            return Ok(Some("it is truncated".to_owned()));
        }
        read => read?,
    }
    Ok(header_damage(&header, length, has_log).map(str::to_owned))
}

/// The damage that an error indicates. Other errors are returned as they are.
fn damage_of_error(error: io::Error, what: &str) -> io::Result<Option<String>> {
    match error.kind() {
        io::ErrorKind::IsADirectory => Ok(Some(format!("{what} is a directory"))),
        io::ErrorKind::PermissionDenied => Ok(Some(format!("{what} can't be opened: {error}"))),
        _ => Err(error),
    }
}

fn header_damage(header: &[u8; HEADER_LEN], length: u64, has_log: bool) -> Option<&'static str> {
    if header[..16] != *MAGIC {
        return Some("it is not a SQLite database");
    }
    // Versions of the format for writing and for reading: 1, or 2 with a write-ahead log.
    if !(1..=2).contains(&header[18]) || !(1..=2).contains(&header[19]) {
        return Some("its format version is unknown");
    }
    // The log may contain pages that the file lacks.
    (!has_log && length < expected_len(header)).then_some("it is truncated")
}

/// Length of the file according to its header; 0 if the header does not contain it.
fn expected_len(header: &[u8; HEADER_LEN]) -> u64 {
    let number = |at: usize| {
        header[at..at + 4].iter().fold(0_u64, |number, byte| number << 8 | u64::from(*byte))
    };
    // The page count is valid only for the latest version of the file.
    if number(24) != number(92) {
        return 0;
    }
    let page = match u64::from(header[16]) << 8 | u64::from(header[17]) {
        1 => 65_536,
        size => size,
    };
    number(28) * page
}

/// Whether SQLite reports a damaged file (CORRUPT, NOTADB), as opposed to a full disk, another process or a failed
/// migration. <https://www.sqlite.org/rescode.html>
pub fn is_file_damage(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        let Some(Error::Database(error)) = cause.downcast_ref::<Error>() else { return false };
        let code = error.code().and_then(|code| code.parse::<u32>().ok());
        code.is_some_and(|code| matches!(code & 0xff, 11 | 26))
    })
}

/// Renames a file and the files that belong to it. Returns the new name.
pub(super) fn set_aside(path: &Path) -> anyhow::Result<PathBuf> {
    let format = format_description!("[year][month][day]T[hour][minute][second]Z");
    let time = OffsetDateTime::now_utc().format(format)?;
    let mut aside = with_suffix(path, &format!("{SET_ASIDE_INFIX}{time}"));
    for number in 2..100 {
        if fs::symlink_metadata(&aside).is_err() {
            break;
        }
        aside = with_suffix(path, &format!("{SET_ASIDE_INFIX}{time}-{number}"));
    }
    for (from, to) in [(path.to_owned(), aside.clone())].into_iter().chain(
        SIDECAR_SUFFIXES.map(|suffix| (with_suffix(path, suffix), with_suffix(&aside, suffix))),
    ) {
        match fs::rename(&from, &to) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).with_context(|| {
                    format!("{} is damaged and can't be set aside", from.display())
                });
            }
            _ => {}
        }
    }
    Ok(aside)
}

/// All files that were set aside of a file.
pub(super) fn set_aside_of(path: &Path) -> Vec<PathBuf> {
    let (Some(directory), Some(name)) =
        (path.parent(), path.file_name().and_then(|name| name.to_str()))
    else {
        return Vec::new();
    };
    let prefix = format!("{name}{SET_ASIDE_INFIX}");
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let mut names: Vec<_> = names
        .filter(|name| name.starts_with(&prefix))
        // Includes a log without its file.
        .map(|name| {
            let base = SIDECAR_SUFFIXES.iter().find_map(|suffix| name.strip_suffix(suffix));
            base.unwrap_or(&name).to_owned()
        })
        .collect();
    names.sort();
    names.dedup();
    names.into_iter().map(|name| directory.join(name)).collect()
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn files_that_can_not_be_a_store_are_detected_with_their_damage() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.db");
        assert_eq!(damage(&path).unwrap(), None, "no file is a new store");
        let found = |text: &[u8]| {
            fs::write(&path, text).unwrap();
            damage(&path).unwrap().unwrap_or_default()
        };
        assert_eq!(found(b""), "", "a new store");
        assert_eq!(found(&[0; 4096]), "it is not a SQLite database");
        assert_eq!(found(&[b'x'; 4096]), "it is not a SQLite database");
        assert_eq!(found(&MAGIC[..]), "it is truncated");
        let mut header = [0; 4096];
        header[..16].copy_from_slice(MAGIC);
        (header[16], header[18], header[19]) = (0x10, 2, 2);
        header[31] = 3;
        assert_eq!(found(&header), "it is truncated", "one page of three");
        header[31] = 1;
        assert_eq!(found(&header), "");
        header[18] = 9;
        assert_eq!(found(&header), "its format version is unknown");
        fs::write(with_suffix(&path, "-wal"), b"log").unwrap();
        assert_eq!(found(b""), "it is empty, but its log is not");
        fs::remove_file(&path).unwrap();
        let found = || damage(&path).unwrap().unwrap();
        assert_eq!(found(), "it is missing, but its log exists");
        fs::create_dir(&path).unwrap();
        assert_eq!(found(), "it is a directory");
        let aside = set_aside(&path).unwrap();
        assert!(aside.is_dir() && with_suffix(&aside, "-wal").is_file() && !path.exists());
        assert_eq!(set_aside_of(&path), std::slice::from_ref(&aside));
        fs::write(&path, "again").unwrap();
        fs::create_dir(with_suffix(&path, "-shm")).unwrap();
        assert_eq!(damage(&path).unwrap().unwrap(), "its -shm file is a directory");
        let again = set_aside(&path).unwrap();
        assert_eq!(set_aside_of(&path), [aside, again]);
        assert_eq!(set_aside_of(&folder.path().join("y.db")), [""; 0].map(PathBuf::from));
    }

    proptest! {
        #[test]
        fn no_header_causes_a_panic(bytes in proptest::collection::vec(any::<u8>(), HEADER_LEN)) {
            let header: [u8; HEADER_LEN] = bytes.try_into().unwrap();
            let _ = expected_len(&header);
        }
    }
}
