//! SQLite files that can't be used: how they are told from files that can't be used just now, and how they are
//! set aside.
//!
//! Invariant: nothing is deleted. A file that is set aside keeps its log beside it, so that what can be read of
//! it can be read with SQLite's own tools.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use sqlx::Error;
use time::OffsetDateTime;
use time::macros::format_description;

/// How every SQLite file begins.
const MAGIC: &[u8; 16] = b"SQLite format 3\0";
/// The header of a SQLite file. <https://www.sqlite.org/fileformat.html#the_database_header>
const HEADER_LEN: usize = 100;
/// What stands in the name of a file that was set aside.
const MARK: &str = ".damaged-";
/// What SQLite keeps beside a file.
const BESIDE: [&str; 2] = ["-wal", "-shm"];

/// What is wrong with a file, as far as that shows without SQLite; none where nothing is, or there is no file.
/// Fails where it is not the file that is wrong: no descriptor is left, or the disk can't be read. Nothing of
/// this process may have the file open: closing it here would end SQLite's locks.
pub fn damage(path: &Path) -> io::Result<Option<String>> {
    for ending in BESIDE {
        let beside = beside(path, ending);
        match File::options().read(true).write(true).open(&beside) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return of_the_file(error, &format!("its {ending} file")),
        }
    }
    let has_log = fs::metadata(beside(path, "-wal")).is_ok_and(|log| log.len() > 0);
    let opened = File::options().read(true).write(true).open(path);
    let mut file = match opened {
        Ok(file) => file,
        // SQLite would throw the log away.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Ok(has_log.then(|| "it is missing, and its log is there".to_owned()));
        }
        Err(error) => return of_the_file(error, "it"),
    };
    let length = file.metadata()?.len();
    if length == 0 {
        // Without a log it is a store that was not begun.
        return Ok(has_log.then(|| "it is empty, and its log is not".to_owned()));
    }
    let mut header = [0; HEADER_LEN];
    match file.read_exact(&mut header) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            return Ok(Some("it is cut short".to_owned()));
        }
        read => read?,
    }
    Ok(wrong_header(&header, length, has_log).map(str::to_owned))
}

/// Whether an error is the file's own.
fn of_the_file(error: io::Error, what: &str) -> io::Result<Option<String>> {
    match error.kind() {
        io::ErrorKind::IsADirectory => Ok(Some(format!("{what} is a directory"))),
        io::ErrorKind::PermissionDenied => Ok(Some(format!("{what} can't be opened: {error}"))),
        _ => Err(error),
    }
}

fn wrong_header(header: &[u8; HEADER_LEN], length: u64, has_log: bool) -> Option<&'static str> {
    if header[..16] != *MAGIC {
        return Some("it is no SQLite database");
    }
    // Versions of the format, for writing and for reading: 1 or 2, which is with a log.
    if !(1..=2).contains(&header[18]) || !(1..=2).contains(&header[19]) {
        return Some("it is of a format that is not known");
    }
    // A log may hold what the file lacks.
    (!has_log && length < whole(header)).then_some("it is cut short")
}

/// How long the file is by its header; 0 where the header does not say.
fn whole(header: &[u8; HEADER_LEN]) -> u64 {
    let number = |at: usize| {
        header[at..at + 4].iter().fold(0_u64, |number, byte| number << 8 | u64::from(*byte))
    };
    // The count of pages holds for the version that was written last.
    if number(24) != number(92) {
        return 0;
    }
    let page = match u64::from(header[16]) << 8 | u64::from(header[17]) {
        1 => 65_536,
        size => size,
    };
    number(28) * page
}

/// Whether SQLite says that the file is wrong (CORRUPT, NOTADB), and not the moment: a disk that is full,
/// another process, a migration that fails. <https://www.sqlite.org/rescode.html>
pub fn is_of_the_file(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        let Some(Error::Database(error)) = cause.downcast_ref::<Error>() else { return false };
        let code = error.code().and_then(|code| code.parse::<u32>().ok());
        code.is_some_and(|code| matches!(code & 0xff, 11 | 26))
    })
}

/// Renames a file and what SQLite keeps beside it; the new name.
pub(super) fn set_aside(path: &Path) -> anyhow::Result<PathBuf> {
    let format = format_description!("[year][month][day]T[hour][minute][second]Z");
    let time = OffsetDateTime::now_utc().format(format)?;
    let mut aside = beside(path, &format!("{MARK}{time}"));
    for number in 2..100 {
        if fs::symlink_metadata(&aside).is_err() {
            break;
        }
        aside = beside(path, &format!("{MARK}{time}-{number}"));
    }
    for (from, to) in [(path.to_owned(), aside.clone())]
        .into_iter()
        .chain(BESIDE.map(|ending| (beside(path, ending), beside(&aside, ending))))
    {
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

/// What was set aside of a file, now or before.
pub(super) fn set_aside_of(path: &Path) -> Vec<PathBuf> {
    let (Some(folder), Some(name)) =
        (path.parent(), path.file_name().and_then(|name| name.to_str()))
    else {
        return Vec::new();
    };
    let begin = format!("{name}{MARK}");
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let mut names: Vec<_> = names
        .filter(|name| name.starts_with(&begin))
        // A log without its file, too.
        .map(|name| {
            BESIDE.iter().find_map(|end| name.strip_suffix(end)).unwrap_or(&name).to_owned()
        })
        .collect();
    names.sort();
    names.dedup();
    names.into_iter().map(|name| folder.join(name)).collect()
}

fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ending);
    name.into()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn files_that_can_not_be_a_store_are_told_by_what_is_wrong_with_them() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.db");
        assert_eq!(damage(&path).unwrap(), None, "no file is a new store");
        let found = |text: &[u8]| {
            fs::write(&path, text).unwrap();
            damage(&path).unwrap().unwrap_or_default()
        };
        assert_eq!(found(b""), "", "a store that was not begun");
        assert_eq!(found(&[0; 4096]), "it is no SQLite database");
        assert_eq!(found(&[b'x'; 4096]), "it is no SQLite database");
        assert_eq!(found(&MAGIC[..]), "it is cut short");
        let mut header = [0; 4096];
        header[..16].copy_from_slice(MAGIC);
        (header[16], header[18], header[19]) = (0x10, 2, 2);
        header[31] = 3;
        assert_eq!(found(&header), "it is cut short", "one page of three");
        header[31] = 1;
        assert_eq!(found(&header), "");
        header[18] = 9;
        assert_eq!(found(&header), "it is of a format that is not known");
        fs::write(beside(&path, "-wal"), b"log").unwrap();
        assert_eq!(found(b""), "it is empty, and its log is not");
        fs::remove_file(&path).unwrap();
        let found = || damage(&path).unwrap().unwrap();
        assert_eq!(found(), "it is missing, and its log is there");
        fs::create_dir(&path).unwrap();
        assert_eq!(found(), "it is a directory");
        let aside = set_aside(&path).unwrap();
        assert!(aside.is_dir() && beside(&aside, "-wal").is_file() && !path.exists());
        assert_eq!(set_aside_of(&path), std::slice::from_ref(&aside));
        fs::write(&path, "again").unwrap();
        fs::create_dir(beside(&path, "-shm")).unwrap();
        assert_eq!(damage(&path).unwrap().unwrap(), "its -shm file is a directory");
        let again = set_aside(&path).unwrap();
        assert_eq!(set_aside_of(&path), [aside, again]);
        assert_eq!(set_aside_of(&folder.path().join("y.db")), [""; 0].map(PathBuf::from));
    }

    proptest! {
        #[test]
        fn no_header_makes_it_panic(bytes in proptest::collection::vec(any::<u8>(), HEADER_LEN)) {
            let header: [u8; HEADER_LEN] = bytes.try_into().unwrap();
            let _ = whole(&header);
        }
    }
}
