//! The cursor of a log: how far its events were delivered or dropped. It is rewritten in place, so that a full disk does
//! not stop it. A lost cursor only repeats deliveries.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use bytes::Buf as _;

/// Segment (u64), offset (u64) and the CRC-32 of both.
const CURSOR_LEN: usize = 20;

#[derive(Debug)]
pub(super) struct Cursor(File);

impl Cursor {
    /// Opens the file for writing, and creates it if it is missing.
    pub(super) fn open(path: &Path) -> io::Result<Cursor> {
        File::options().create(true).truncate(false).write(true).open(path).map(Cursor)
    }

    /// The stored segment and offset; `None` if there are none, or if they are damaged.
    pub(super) fn read(path: &Path) -> Option<(u64, u64)> {
        let bytes = std::fs::read(path).ok()?;
        let (mut position, mut checksum) = bytes.get(..CURSOR_LEN)?.split_at(CURSOR_LEN - 4);
        let is_valid = crc32fast::hash(position) == checksum.get_u32_le();
        is_valid.then(|| (position.get_u64_le(), position.get_u64_le()))
    }

    pub(super) fn write(&self, segment: u64, offset: u64) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(CURSOR_LEN);
        bytes.extend_from_slice(&segment.to_le_bytes());
        bytes.extend_from_slice(&offset.to_le_bytes());
        bytes.extend_from_slice(&crc32fast::hash(&bytes).to_le_bytes());
        self.0.write_all_at(&bytes, 0)
    }
}
