//! A log file that is rotated by size. Rotated files are named NAME.1, NAME.2 and so on, newest first. The log uses at
//! most (rotated files + 1) times the maximum size.
//!
//! `tracing-appender` does not serve: it rotates by time only.

use std::fs::{File, OpenOptions, create_dir_all, remove_file, rename};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

/// A log file with rotation by size.
#[derive(Debug)]
pub(super) struct LogFile {
    path: PathBuf,
    file: File,
    size: u64,
    max_size: u64,
    rotated_count: u32,
    /// Whether the file ends with a partial line, because the disk was full.
    ends_with_partial_line: bool,
}

impl LogFile {
    /// Opens the file and appends to it.
    pub(super) fn open(path: &Path, max_size: u64, rotated_count: u32) -> io::Result<Self> {
        if let Some(directory) = path.parent() {
            create_dir_all(directory)?;
        }
        let file = open_to_append(path)?;
        let size = file.metadata()?.len();
        let ends_with_partial_line = false;
        let path = path.to_owned();
        Ok(LogFile { path, file, size, max_size, rotated_count, ends_with_partial_line })
    }

    /// Reopens the path, which may be a different file after a rename.
    pub(super) fn reopen(&mut self) -> io::Result<()> {
        *self = LogFile::open(&self.path, self.max_size, self.rotated_count)?;
        Ok(())
    }

    /// Appends a complete line. A line is never split between two files.
    pub(super) fn append(&mut self, line: &[u8]) -> io::Result<()> {
        let length = line.len() as u64;
        if self.size > 0 && self.size + length > self.max_size {
            // If the rotation fails, the line is still appended: it matters more than the maximum size.
            let _ = self.rotate();
        }
        if self.ends_with_partial_line {
            self.file.write_all(b"\n")?;
            (self.ends_with_partial_line, self.size) = (false, self.size + 1);
        }
        let mut rest = line;
        while !rest.is_empty() {
            match self.file.write(rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    self.size += written as u64;
                    rest = &rest[written..];
                    self.ends_with_partial_line = !rest.is_empty();
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn rotate(&mut self) -> io::Result<()> {
        // Another process may have renamed the file.
        if self.path.exists() {
            self.shift_rotated()?;
        }
        self.reopen()
    }

    fn shift_rotated(&self) -> io::Result<()> {
        if self.rotated_count == 0 {
            return remove_file(&self.path);
        }
        for number in (1..self.rotated_count).rev() {
            if self.numbered(number).exists() {
                rename(self.numbered(number), self.numbered(number + 1))?;
            }
        }
        rename(&self.path, self.numbered(1))
    }

    fn numbered(&self, number: u32) -> PathBuf {
        let mut name = self.path.clone().into_os_string();
        name.push(format!(".{number}"));
        name.into()
    }
}

fn open_to_append(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.create(true).append(true).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_file_is_rotated_and_the_oldest_file_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("logs/hapa.log");
        let read = |name: &str| std::fs::read_to_string(folder.path().join("logs").join(name)).ok();
        for line in ["one\n", "two\n", "three\n", "four\n", "a line that is longer than that\n"] {
            // Opened for each line, because a restart must append to the file.
            LogFile::open(&path, 10, 2).unwrap().append(line.as_bytes()).unwrap();
        }
        assert_eq!(read("hapa.log").unwrap(), "a line that is longer than that\n");
        assert_eq!(read("hapa.log.1").unwrap(), "four\n");
        assert_eq!(read("hapa.log.2").unwrap(), "three\n");
        assert_eq!(read("hapa.log.3"), None);
    }

    #[test]
    fn without_rotated_files_there_is_only_the_log_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("hapa.log");
        let mut log = LogFile::open(&path, 10, 0).unwrap();
        for line in ["one\n", "two\n", "three\n"] {
            log.append(line.as_bytes()).unwrap();
        }
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "three\n");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_renamed_file_is_not_written_to_after_a_reopen() {
        let folder = tempfile::tempdir().unwrap();
        let (path, old) = (folder.path().join("hapa.log"), folder.path().join("old.log"));
        let read = |path: &Path| std::fs::read_to_string(path).unwrap();
        let mut log = LogFile::open(&path, 100, 2).unwrap();
        log.append(b"one\n").unwrap();
        rename(&path, &old).unwrap();
        log.append(b"two\n").unwrap();
        log.reopen().unwrap();
        log.append(b"three\n").unwrap();
        assert_eq!((read(&old), read(&path)), ("one\ntwo\n".to_owned(), "three\n".to_owned()));
        // Renamed, and full before the reopen: the rotation reopens it.
        rename(&path, &old).unwrap();
        log.append(&[b'x'; 100]).unwrap();
        assert_eq!((read(&old), read(&path)), ("three\n".to_owned(), "x".repeat(100)));
    }

    #[test]
    fn a_partial_line_on_a_full_disk_does_not_damage_the_next_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("hapa.log");
        let mut log = LogFile::open(&path, 1_000, 2).unwrap();
        log.append(b"hal").unwrap();
        log.ends_with_partial_line = true;
        log.append(b"whole\n").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "hal\nwhole\n");
        let mut full = LogFile::open(Path::new("/dev/full"), 1_000, 2).unwrap();
        assert_eq!(full.append(b"line\n").unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert!(!full.ends_with_partial_line, "no part of the line was written");
    }
}
