//! A log file that is begun anew when it is full. What was before stands beside it as NAME.1, NAME.2 and
//! so on, newest first, so that no more than (files + 1) times the size is ever on disk.
//!
//! Our own: `tracing-appender` knows times and no sizes, and two files and a rename need no crate.

use std::fs::{File, OpenOptions, create_dir_all, remove_file, rename};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

/// See the module.
#[derive(Debug)]
pub(super) struct LogFile {
    path: PathBuf,
    file: File,
    size: u64,
    most: u64,
    older: u32,
    /// The file ends within a line: the disk was full.
    is_torn: bool,
}

impl LogFile {
    /// Goes on where the file ends.
    pub(super) fn open(path: &Path, most: u64, older: u32) -> io::Result<Self> {
        if let Some(folder) = path.parent() {
            create_dir_all(folder)?;
        }
        let file = open_to_append(path)?;
        let size = file.metadata()?.len();
        Ok(LogFile { path: path.to_owned(), file, size, most, older, is_torn: false })
    }

    /// Opens the file at the path, which may be another one now.
    pub(super) fn open_anew(&mut self) -> io::Result<()> {
        *self = LogFile::open(&self.path, self.most, self.older)?;
        Ok(())
    }

    /// Takes whole lines, as the log writes them: a line is never in two files.
    pub(super) fn append(&mut self, line: &[u8]) -> io::Result<()> {
        let length = line.len() as u64;
        if self.size > 0 && self.size + length > self.most {
            // A folder that can't be written to: the line matters more than the size.
            let _ = self.begin_anew();
        }
        if self.is_torn {
            self.file.write_all(b"\n")?;
            (self.is_torn, self.size) = (false, self.size + 1);
        }
        let mut rest = line;
        while !rest.is_empty() {
            match self.file.write(rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    self.size += written as u64;
                    rest = &rest[written..];
                    self.is_torn = !rest.is_empty();
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn begin_anew(&mut self) -> io::Result<()> {
        // Somebody else may have renamed it: then there is nothing to put aside.
        if self.path.exists() {
            self.put_aside()?;
        }
        self.open_anew()
    }

    fn put_aside(&self) -> io::Result<()> {
        if self.older == 0 {
            return remove_file(&self.path);
        }
        for number in (1..self.older).rev() {
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
    fn a_full_file_is_begun_anew_and_the_oldest_goes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("logs/hapa.log");
        let read = |name: &str| std::fs::read_to_string(folder.path().join("logs").join(name)).ok();
        for line in ["one\n", "two\n", "three\n", "four\n", "a line that is longer than that\n"] {
            // Opened each time: a restart goes on where the file ends.
            LogFile::open(&path, 10, 2).unwrap().append(line.as_bytes()).unwrap();
        }
        assert_eq!(read("hapa.log").unwrap(), "a line that is longer than that\n");
        assert_eq!(read("hapa.log.1").unwrap(), "four\n");
        assert_eq!(read("hapa.log.2").unwrap(), "three\n");
        assert_eq!(read("hapa.log.3"), None);
    }

    #[test]
    fn without_older_files_there_is_one() {
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
    fn a_file_that_was_renamed_is_left_alone_from_when_it_is_opened_anew() {
        let folder = tempfile::tempdir().unwrap();
        let (path, old) = (folder.path().join("hapa.log"), folder.path().join("old.log"));
        let read = |path: &Path| std::fs::read_to_string(path).unwrap();
        let mut log = LogFile::open(&path, 100, 2).unwrap();
        log.append(b"one\n").unwrap();
        rename(&path, &old).unwrap();
        log.append(b"two\n").unwrap();
        log.open_anew().unwrap();
        log.append(b"three\n").unwrap();
        assert_eq!((read(&old), read(&path)), ("one\ntwo\n".to_owned(), "three\n".to_owned()));
        // Renamed, and full before it is told: it is begun anew all the same.
        rename(&path, &old).unwrap();
        log.append(&[b'x'; 100]).unwrap();
        assert_eq!((read(&old), read(&path)), ("three\n".to_owned(), "x".repeat(100)));
    }

    #[test]
    fn a_line_that_was_torn_by_a_full_disk_does_not_take_the_next_one_with_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("hapa.log");
        let mut log = LogFile::open(&path, 1_000, 2).unwrap();
        log.append(b"hal").unwrap();
        log.is_torn = true;
        log.append(b"whole\n").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "hal\nwhole\n");
        let mut full = LogFile::open(Path::new("/dev/full"), 1_000, 2).unwrap();
        assert_eq!(full.append(b"line\n").unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert!(!full.is_torn, "nothing of it was written");
    }
}
