//! A log file that is begun anew when it is full. What was before stands beside it as NAME.1, NAME.2 and
//! so on, newest first, so that no more than (files + 1) times the size is ever on disk.
//!
//! Our own: `tracing-appender` knows times and no sizes, and two files and a rename need no crate.

use std::fs::{File, OpenOptions, create_dir_all, remove_file, rename};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// See the module.
#[derive(Debug)]
pub(super) struct LogFile {
    path: PathBuf,
    file: File,
    size: u64,
    most: u64,
    older: u32,
}

impl LogFile {
    /// Goes on where the file ends.
    pub(super) fn open(path: &Path, most: u64, older: u32) -> io::Result<Self> {
        if let Some(folder) = path.parent() {
            create_dir_all(folder)?;
        }
        let file = append(path)?;
        let size = file.metadata()?.len();
        Ok(LogFile { path: path.to_owned(), file, size, most, older })
    }

    fn begin_anew(&mut self) -> io::Result<()> {
        if self.older == 0 {
            remove_file(&self.path)?;
        } else {
            for number in (1..self.older).rev() {
                if self.numbered(number).exists() {
                    rename(self.numbered(number), self.numbered(number + 1))?;
                }
            }
            rename(&self.path, self.numbered(1))?;
        }
        self.file = append(&self.path)?;
        self.size = 0;
        Ok(())
    }

    fn numbered(&self, number: u32) -> PathBuf {
        let mut name = self.path.clone().into_os_string();
        name.push(format!(".{number}"));
        name.into()
    }
}

impl Write for LogFile {
    /// Takes whole lines, as the log writes them: a line is never in two files.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let length = line.len() as u64;
        if self.size > 0 && self.size + length > self.most {
            // A folder that can't be written to: the line matters more than the size.
            let _ = self.begin_anew();
        }
        self.file.write_all(line)?;
        self.size += length;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

fn append(path: &Path) -> io::Result<File> {
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
            LogFile::open(&path, 10, 2).unwrap().write_all(line.as_bytes()).unwrap();
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
            log.write_all(line.as_bytes()).unwrap();
        }
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "three\n");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
