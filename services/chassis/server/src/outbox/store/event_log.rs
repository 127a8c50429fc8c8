//! The log of one priority: a queue of events in segment files. Events are appended at the end and consumed from the
//! front, whether they are delivered, evicted or expired.
//!
//! A damaged event is skipped. Nothing is appended to a segment of an earlier process, so that the end of that segment
//! needs no repair.

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};

use super::cursor::Cursor;
use super::record::{Parsed, Record, parse};
use super::segment::{Contents, Segment, examine};
use crate::outbox::priority::Priority;

/// Size beyond which the next write starts a new segment.
pub(in crate::outbox) const SEGMENT_BYTES: u64 = 4 * 1024 * 1024;
/// Size of one read of a delivery.
const DELIVERY_READ_BYTES: usize = 256 * 1024;
/// Size of one read of events that are dropped.
const DROP_READ_BYTES: usize = 16 * 1024;
/// Size of the read of the oldest event.
const OLDEST_READ_BYTES: usize = 1_024;
const EXTENSION: &str = "log";

/// A place between two events. Sequence numbers count the events of this process's log, and are not stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::outbox) struct Position {
    segment: u64,
    offset: u64,
    sequence: u64,
}

#[derive(Debug)]
pub(in crate::outbox) struct EventLog {
    folder: PathBuf,
    priority: Priority,
    segments: VecDeque<Segment>,
    /// The place of the oldest event.
    head: Position,
    last_segment: u64,
    /// `None`: the log is read-only.
    cursor: Option<Cursor>,
    /// Reused by reads.
    buffer: Vec<u8>,
}

/// Something in a log that can't be read, and is skipped.
#[derive(Debug)]
pub(in crate::outbox) struct Damage {
    pub(in crate::outbox) path: PathBuf,
    pub(in crate::outbox) problem: String,
    /// The whole file can't be read.
    pub(in crate::outbox) is_unreadable: bool,
}

impl EventLog {
    /// Reads the files of a log without changing them.
    pub(in crate::outbox) fn scan(
        folder: &Path,
        priority: Priority,
    ) -> io::Result<(EventLog, Vec<Damage>)> {
        let cursor = Cursor::read(&cursor_path(folder, priority));
        let (first, first_offset) = cursor.unwrap_or_default();
        let mut log = EventLog {
            folder: folder.to_owned(),
            priority,
            segments: VecDeque::new(),
            head: Position { segment: first, offset: first_offset, sequence: 0 },
            last_segment: first,
            cursor: None,
            buffer: Vec::new(),
        };
        let mut damages = Vec::new();
        for number in segment_numbers(folder, priority)? {
            log.last_segment = log.last_segment.max(number);
            let offset = if number == first { first_offset } else { 0 };
            // A consumed segment is only deleted.
            let contents = if number < first {
                Ok(Contents::default())
            } else {
                examine(&log.segment_path(number), offset)
            };
            log.add_scanned(number, contents, &mut damages);
        }
        Ok((log, damages))
    }

    /// Opens a log for writing, and deletes its consumed segments.
    pub(in crate::outbox) fn open(
        folder: &Path,
        priority: Priority,
    ) -> io::Result<(EventLog, Vec<Damage>)> {
        let (mut log, damages) = EventLog::scan(folder, priority)?;
        log.cursor = Some(Cursor::open(&cursor_path(folder, priority))?);
        log.save_cursor();
        log.remove_consumed();
        Ok((log, damages))
    }

    fn add_scanned(
        &mut self,
        number: u64,
        contents: io::Result<Contents>,
        damages: &mut Vec<Damage>,
    ) {
        let path = self.segment_path(number);
        let contents = match contents {
            Ok(contents) => contents,
            Err(error) => {
                damages.push(Damage { path, problem: error.to_string(), is_unreadable: true });
                return;
            }
        };
        if contents.damaged_bytes > 0 {
            let problem = format!("{} bytes are no events", contents.damaged_bytes);
            damages.push(Damage { path: path.clone(), problem, is_unreadable: false });
        }
        let (len, end) = (contents.end, self.tail() + contents.event_count);
        self.segments.push_back(Segment { number, path, len, end, is_active: false, file: None });
    }

    /// Number of events.
    pub(in crate::outbox) fn depth(&self) -> u64 {
        self.tail() - self.head.sequence
    }

    /// Appends encoded records, all or none.
    pub(in crate::outbox) fn append(&mut self, records: &[u8], event_count: u64) -> io::Result<()> {
        let is_open = |segment: &Segment| segment.is_active && segment.len < SEGMENT_BYTES;
        if !self.segments.back().is_some_and(is_open) {
            self.start_segment()?;
        }
        match self.segments.back_mut() {
            Some(segment) => segment.append(records, event_count),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// Passes the oldest events to `visit`, until it returns false for an event that is not read yet. Returns the place
    /// after the last one that is read.
    pub(in crate::outbox) fn read(
        &mut self,
        visit: impl FnMut(&[u8]) -> bool,
    ) -> io::Result<Position> {
        let mut visit = visit;
        self.walk(DELIVERY_READ_BYTES, |record| visit(record.body))
    }

    /// Consumes the events up to a place, unless they are already. Returns their number.
    pub(in crate::outbox) fn advance(&mut self, to: Position) -> u64 {
        let count = to.sequence.saturating_sub(self.head.sequence);
        if count > 0 {
            self.head = to;
            self.save_cursor();
            self.remove_consumed();
        }
        count
    }

    /// Consumes the oldest `count` events. Returns their number.
    pub(in crate::outbox) fn evict(&mut self, count: u64) -> io::Result<u64> {
        let first = self.head.sequence;
        let target = first.saturating_add(count).min(self.tail());
        // Whole segments need not be read.
        let whole = self.segments.iter().rev().find(|segment| segment.end <= target);
        if let Some(&Segment { number, len, end, .. }) = whole {
            self.advance(Position { segment: number, offset: len, sequence: end });
        }
        let mut left = target - self.head.sequence;
        let to = self.walk(DROP_READ_BYTES, |_| {
            let is_evicted = left > 0;
            left = left.saturating_sub(1);
            is_evicted
        })?;
        self.advance(to);
        Ok(self.head.sequence - first)
    }

    /// Consumes the oldest events while they are older than `before`, at most `max`. Returns their number.
    pub(in crate::outbox) fn expire(&mut self, before: u64, max: u64) -> io::Result<u64> {
        let mut left = max;
        let to = self.walk(DROP_READ_BYTES, |record| {
            let is_expired = record.time < before && left > 0;
            left = left.saturating_sub(1);
            is_expired
        })?;
        Ok(self.advance(to))
    }

    /// When the oldest event was stored, in milliseconds since 1970.
    pub(in crate::outbox) fn oldest(&mut self) -> Option<u64> {
        let mut oldest = None;
        let read = self.walk(OLDEST_READ_BYTES, |record| {
            oldest = Some(record.time);
            false
        });
        read.ok().and(oldest)
    }

    /// The sequence number of the next event.
    fn tail(&self) -> u64 {
        self.segments.back().map_or(self.head.sequence, |segment| segment.end)
    }

    fn start_segment(&mut self) -> io::Result<()> {
        let (number, tail) = (self.last_segment + 1, self.tail());
        let segment = Segment::create(self.segment_path(number), number, tail)?;
        self.last_segment = number;
        if let Some(previous) = self.segments.back_mut() {
            previous.is_active = false;
            previous.file = None;
        }
        self.segments.push_back(segment);
        self.remove_consumed();
        Ok(())
    }

    fn walk(
        &mut self,
        read_bytes: usize,
        mut visit: impl FnMut(&Record<'_>) -> bool,
    ) -> io::Result<Position> {
        let (mut position, mut buffer) = (self.head, std::mem::take(&mut self.buffer));
        for segment in &mut self.segments {
            if segment.number < position.segment {
                continue;
            }
            if segment.number > position.segment {
                position = Position { segment: segment.number, offset: 0, ..position };
            }
            match walk_segment(segment, &mut buffer, &mut position, (read_bytes, &mut visit)) {
                Ok(true) => {}
                Ok(false) => break,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    tracing::error!(
                        "E5010: the outbox file {} is gone, and its events are lost",
                        segment.path.display()
                    );
                }
                Err(error) => return Err(error),
            }
            // The numbers are right even if the file was damaged while it was open.
            position = Position { offset: segment.len, sequence: segment.end, ..position };
        }
        self.buffer = buffer;
        Ok(position)
    }

    fn save_cursor(&self) {
        if let Some(cursor) = &self.cursor {
            // The loss only repeats deliveries, and the next change writes it again.
            let _ = cursor.write(self.head.segment, self.head.offset);
        }
    }

    fn remove_consumed(&mut self) {
        let head = self.head.sequence;
        let is_consumed = |segment: &mut Segment| segment.end <= head && !segment.is_active;
        while let Some(segment) = self.segments.pop_front_if(is_consumed) {
            // A segment that stays is deleted at the next start.
            let _ = std::fs::remove_file(&segment.path);
        }
    }

    fn segment_path(&self, number: u64) -> PathBuf {
        self.folder.join(format!("{}-{number:016}.{EXTENSION}", self.priority.file_name()))
    }
}

/// Visits the events of a segment from `position` on. Returns false if `visit` did.
fn walk_segment(
    segment: &mut Segment,
    buffer: &mut Vec<u8>,
    position: &mut Position,
    (mut read_bytes, visit): (usize, &mut impl FnMut(&Record<'_>) -> bool),
) -> io::Result<bool> {
    while position.offset < segment.len {
        segment.read(buffer, position.offset, read_bytes)?;
        let mut used = 0;
        let missing = loop {
            let len = match parse(&buffer[used..]) {
                Parsed::Valid(record) if !visit(&record) => return Ok(false),
                Parsed::Valid(record) => {
                    position.sequence += 1;
                    record.len()
                }
                Parsed::Damaged(len) => len,
                Parsed::Incomplete(len) => break len,
            };
            used += len;
            position.offset += len as u64;
        };
        if used == 0 {
            if buffer.len() < read_bytes || missing <= read_bytes {
                break; // the file has become shorter
            }
            read_bytes = missing;
        }
    }
    Ok(true)
}

/// The numbers of the segments of a log, sorted.
fn segment_numbers(folder: &Path, priority: Priority) -> io::Result<Vec<u64>> {
    let mut numbers = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let name = entry?.file_name();
        let number = name.to_str().and_then(|name| {
            let number = name.strip_prefix(priority.file_name())?.strip_prefix('-')?;
            number.strip_suffix(EXTENSION)?.strip_suffix('.')?.parse::<u64>().ok()
        });
        numbers.extend(number);
    }
    numbers.sort_unstable();
    Ok(numbers)
}

fn cursor_path(folder: &Path, priority: Priority) -> PathBuf {
    folder.join(format!("{}.cursor", priority.file_name()))
}
