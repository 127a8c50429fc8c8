//! One file of a log. It is appended to until it is full, read from the front, and deleted when its events are consumed.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use super::record::{Parsed, parse};

/// A segment of a log, with the events that were valid when it was opened or written.
#[derive(Debug)]
pub(super) struct Segment {
    pub(super) number: u64,
    pub(super) path: PathBuf,
    /// The end of its last valid event. What follows is never read.
    pub(super) len: u64,
    /// The sequence number that follows its last event.
    pub(super) end: u64,
    /// Whether this process appends to it.
    pub(super) is_active: bool,
    /// Open while it is active or read.
    pub(super) file: Option<File>,
}

/// What a file contains after an offset.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Contents {
    pub(super) event_count: u64,
    /// The end of the last valid event.
    pub(super) end: u64,
    /// Bytes that belong to no valid event.
    pub(super) damaged_bytes: u64,
}

impl Segment {
    /// Creates an empty file.
    pub(super) fn create(path: PathBuf, number: u64, end: u64) -> io::Result<Segment> {
        let file = File::options().read(true).write(true).create_new(true).open(&path)?;
        Ok(Segment { number, path, len: 0, end, is_active: true, file: Some(file) })
    }

    /// Appends all bytes or none: what a failed write leaves is not read, and is overwritten.
    pub(super) fn append(&mut self, bytes: &[u8], event_count: u64) -> io::Result<()> {
        let len = self.len;
        let file = self.open()?;
        if let Err(error) = file.write_all_at(bytes, len) {
            // Without the truncation, the next start would report the rest as damage.
            let _ = file.set_len(len);
            return Err(error);
        }
        self.len += bytes.len() as u64;
        self.end += event_count;
        Ok(())
    }

    /// Replaces `buffer` with at most `len` bytes at an offset.
    pub(super) fn read(&mut self, buffer: &mut Vec<u8>, offset: u64, len: usize) -> io::Result<()> {
        let left = usize::try_from(self.len.saturating_sub(offset)).unwrap_or(usize::MAX);
        buffer.resize(len.min(left), 0);
        let (file, mut filled) = (self.open()?, 0);
        while filled < buffer.len() {
            match file.read_at(&mut buffer[filled..], offset + filled as u64) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        buffer.truncate(filled);
        Ok(())
    }

    fn open(&mut self) -> io::Result<&File> {
        let file = match self.file.take() {
            Some(file) => file,
            None => File::open(&self.path)?,
        };
        Ok(self.file.insert(file))
    }
}

/// Reads a file from an offset on. A file that has been deleted is empty.
pub(super) fn examine(path: &Path, offset: u64) -> io::Result<Contents> {
    let bytes = match std::fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        read => read?,
    };
    let start = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
    let (mut contents, mut position) = (Contents { end: offset, ..Contents::default() }, start);
    let mut valid_bytes = 0;
    loop {
        match parse(&bytes[position..]) {
            Parsed::Valid(record) => {
                position += record.len();
                valid_bytes += record.len();
                contents.event_count += 1;
                contents.end = position as u64;
            }
            Parsed::Damaged(len) => position += len,
            Parsed::Incomplete(_) => break,
        }
    }
    contents.damaged_bytes = (bytes.len() - start - valid_bytes) as u64;
    Ok(contents)
}
