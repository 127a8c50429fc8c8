//! Records of a log file: length of the body (u32), CRC-32 (u32), time in milliseconds since 1970 (u64), body. Numbers
//! are little-endian. The checksum covers the length, the time and the body.

use bytes::Buf as _;
use crc32fast::Hasher;

/// Length of a record without its body.
pub(in crate::outbox) const HEADER_LEN: usize = 16;

/// The beginning of a log, or of a part of it.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Parsed<'b> {
    Valid(Record<'b>),
    /// A record with a wrong checksum, with its length.
    Damaged(usize),
    /// The bytes end before the record, which has this length.
    Incomplete(usize),
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Record<'b> {
    pub(super) time: u64,
    pub(super) body: &'b [u8],
}

impl Record<'_> {
    /// Length in the file.
    pub(super) fn len(&self) -> usize {
        HEADER_LEN + self.body.len()
    }
}

/// Appends a record, whose body `write_body` appends.
pub(in crate::outbox) fn append_record(
    log: &mut Vec<u8>,
    time: u64,
    write_body: impl FnOnce(&mut Vec<u8>),
) {
    let start = log.len();
    log.extend_from_slice(&[0; HEADER_LEN]);
    write_body(log);
    let record = &mut log[start..];
    // The bounds of the queue exclude longer ones.
    let len = u32::try_from(record.len() - HEADER_LEN).unwrap_or(u32::MAX).to_le_bytes();
    record[..4].copy_from_slice(&len);
    record[8..HEADER_LEN].copy_from_slice(&time.to_le_bytes());
    let checksum = checksum(record);
    record[4..8].copy_from_slice(&checksum.to_le_bytes());
}

/// Parses the record at the beginning of `bytes`.
pub(super) fn parse(bytes: &[u8]) -> Parsed<'_> {
    let Some(mut header) = bytes.get(..HEADER_LEN) else {
        return Parsed::Incomplete(HEADER_LEN);
    };
    let body_len = usize::try_from(header.get_u32_le()).unwrap_or(usize::MAX);
    let (expected, time) = (header.get_u32_le(), header.get_u64_le());
    let len = HEADER_LEN.saturating_add(body_len);
    let Some(record) = bytes.get(..len) else { return Parsed::Incomplete(len) };
    if checksum(record) != expected {
        return Parsed::Damaged(len);
    }
    Parsed::Valid(Record { time, body: &record[HEADER_LEN..] })
}

fn checksum(record: &[u8]) -> u32 {
    let mut hasher = Hasher::new();
    hasher.update(&record[..4]);
    hasher.update(&record[8..]);
    hasher.finalize()
}
