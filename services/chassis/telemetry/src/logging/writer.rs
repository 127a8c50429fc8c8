//! The log's writer: a bounded queue of lines, and one thread that writes them out.
//!
//! Invariant: logging never waits for standard error or a disk. A line that finds no room, or that can't be
//! written, is dropped and counted, and the log says so after the next line that was written.
//!
//! Our own: `tracing-appender` bounds lines and not bytes, and can't open its file anew.

use std::io::{self, Write as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;

use tracing_subscriber::fmt::MakeWriter;

use super::file::LogFile;

/// Most bytes that wait to be written, [`LINE_OVERHEAD`] for each line included.
const MAX_QUEUED_BYTES: usize = 4 * 1024 * 1024;
/// What a line that waits costs beside its text.
const LINE_OVERHEAD: usize = 64;
/// Longest wait, at the end of the process, for the lines that are queued.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// Where lines go.
pub(super) trait Output: Send + 'static {
    /// Writes one line, its end included.
    fn write_line(&mut self, line: &[u8]) -> io::Result<()>;

    /// Opens it anew, so that a file which was renamed is left alone.
    fn reopen(&mut self) -> io::Result<()>;
}

impl Output for io::Stderr {
    fn write_line(&mut self, line: &[u8]) -> io::Result<()> {
        self.write_all(line)
    }

    fn reopen(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Output for LogFile {
    fn write_line(&mut self, line: &[u8]) -> io::Result<()> {
        self.append(line)
    }

    fn reopen(&mut self) -> io::Result<()> {
        self.open_anew()
    }
}

enum Message {
    Line(Vec<u8>),
    /// Answered when all that was queued before is written.
    Flush(Sender<()>),
    /// Looks whether the output is to be opened anew.
    Wake,
}

#[derive(Debug, Default)]
struct Shared {
    queued_bytes: AtomicUsize,
    dropped: AtomicU64,
    reopen: AtomicBool,
}

impl Shared {
    fn drop_line(&self) {
        self.dropped.fetch_add(1, Ordering::Relaxed);
        metrics::counter!("hapa_log_lines_dropped_total").increment(1);
    }
}

/// Queues lines for the thread that writes them. Clones are one.
#[derive(Clone, Debug)]
pub struct LogWriter {
    messages: Sender<Message>,
    shared: Arc<Shared>,
}

impl LogWriter {
    /// With a thread that writes for as long as the process lives.
    pub(super) fn start(output: impl Output) -> io::Result<LogWriter> {
        let (messages, received) = channel();
        let shared = Arc::new(Shared::default());
        let writer = LogWriter { messages, shared: Arc::clone(&shared) };
        thread::Builder::new()
            .name("log-writer".to_owned())
            .spawn(move || write_lines(&received, &shared, output))?;
        Ok(writer)
    }

    /// Opens the output anew before the next line.
    pub(super) fn reopen(&self) {
        self.shared.reopen.store(true, Ordering::Release);
        // Fails only where the thread is gone.
        let _ = self.messages.send(Message::Wake);
    }

    /// Waits until what is queued is written, for a bounded time; false where it is not.
    pub fn flush(&self, timeout: Duration) -> bool {
        let (written, is_written) = channel();
        let sent = self.messages.send(Message::Flush(written));
        sent.is_ok() && is_written.recv_timeout(timeout).is_ok()
    }

    fn push(&self, line: &[u8]) {
        let cost = line.len() + LINE_OVERHEAD;
        let queued = self.shared.queued_bytes.fetch_add(cost, Ordering::Relaxed);
        let fits = queued.saturating_add(cost) <= MAX_QUEUED_BYTES;
        if !fits || self.messages.send(Message::Line(line.to_vec())).is_err() {
            self.shared.queued_bytes.fetch_sub(cost, Ordering::Relaxed);
            self.shared.drop_line();
        }
    }
}

impl io::Write for &LogWriter {
    /// Takes whole lines, as `tracing` writes them.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.push(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for LogWriter {
    type Writer = &'a LogWriter;

    fn make_writer(&'a self) -> &'a LogWriter {
        self
    }
}

/// The log of a process that serves. Dropping it writes out what is queued, for a second at most.
#[derive(Debug)]
pub struct Log {
    pub(super) writer: LogWriter,
    pub(super) place: Place,
}

/// Where the log goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Terminal,
    /// A pipe, mostly.
    Stderr,
    File,
}

impl Log {
    /// Opens LOG_FILE anew, where there is one, so that a file which was renamed is left alone. Lines that wait
    /// go to the new one.
    pub fn reopen(&self) {
        if self.place == Place::File {
            self.writer.reopen();
            tracing::info!("LOG_FILE is opened anew");
        }
    }

    /// Whether lines go to a terminal.
    pub fn is_terminal(&self) -> bool {
        self.place == Place::Terminal
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        self.writer.flush(FLUSH_TIMEOUT);
    }
}

fn write_lines(messages: &Receiver<Message>, shared: &Shared, mut output: impl Output) {
    let mut reported = 0;
    for message in messages {
        if shared.reopen.swap(false, Ordering::AcqRel)
            && let Err(error) = output.reopen()
        {
            tracing::error!(%error, "LOG_FILE can't be opened anew; lines go on to where they went");
        }
        let line = match message {
            Message::Line(line) => line,
            Message::Flush(written) => {
                // Nobody waits any more where it took too long.
                let _ = written.send(());
                continue;
            }
            Message::Wake => continue,
        };
        let written = output.write_line(&line);
        shared.queued_bytes.fetch_sub(line.len() + LINE_OVERHEAD, Ordering::Relaxed);
        if written.is_err() {
            shared.drop_line();
            continue;
        }
        // Only after a line that was written: a report that fails itself must not cause another.
        let dropped = shared.dropped.load(Ordering::Relaxed);
        let has_room = shared.queued_bytes.load(Ordering::Relaxed) < MAX_QUEUED_BYTES / 2;
        if dropped > reported && has_room {
            tracing::error!(lines = dropped - reported, "log lines were dropped");
            reported = dropped;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::mpsc::SyncSender;

    use super::*;

    /// Collects lines; takes one only when it is allowed to, and fails on demand.
    struct Slow {
        allowed: Receiver<bool>,
        lines: Arc<Mutex<Vec<Vec<u8>>>>,
        reopened: Arc<AtomicUsize>,
    }

    impl Output for Slow {
        fn write_line(&mut self, line: &[u8]) -> io::Result<()> {
            let allowed = self.allowed.recv().unwrap_or(true);
            if !allowed {
                return Err(io::ErrorKind::StorageFull.into());
            }
            self.lines.lock().unwrap().push(line.to_vec());
            Ok(())
        }

        fn reopen(&mut self) -> io::Result<()> {
            self.reopened.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }
    }

    struct Parts {
        writer: LogWriter,
        allow: SyncSender<bool>,
        lines: Arc<Mutex<Vec<Vec<u8>>>>,
        reopened: Arc<AtomicUsize>,
    }

    fn start() -> Parts {
        let (allow, allowed) = std::sync::mpsc::sync_channel(64);
        let (lines, reopened) = (Arc::default(), Arc::default());
        let output = Slow { allowed, lines: Arc::clone(&lines), reopened: Arc::clone(&reopened) };
        Parts { writer: LogWriter::start(output).unwrap(), allow, lines, reopened }
    }

    #[test]
    fn a_writer_that_is_blocked_stops_nobody_and_holds_a_bounded_number_of_bytes() {
        let parts = start();
        let line = [b'x'; 1024];
        let fit = MAX_QUEUED_BYTES / (line.len() + LINE_OVERHEAD);
        for _ in 0..fit + 100 {
            (&parts.writer).write_all(&line).unwrap();
        }
        assert_eq!(parts.writer.shared.dropped.load(Ordering::Relaxed), 100);
        assert!(parts.writer.shared.queued_bytes.load(Ordering::Relaxed) <= MAX_QUEUED_BYTES);
        assert!(!parts.writer.flush(Duration::from_millis(1)), "it is blocked");
        drop(parts.allow);
        assert!(parts.writer.flush(Duration::from_mins(1)));
        assert_eq!(parts.lines.lock().unwrap().len(), fit);
        assert_eq!(parts.writer.shared.queued_bytes.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_line_that_is_larger_than_the_queue_is_dropped_alone() {
        let parts = start();
        drop(parts.allow);
        (&parts.writer).write_all(&vec![b'x'; MAX_QUEUED_BYTES]).unwrap();
        (&parts.writer).write_all(b"short\n").unwrap();
        assert!(parts.writer.flush(Duration::from_mins(1)));
        assert_eq!(*parts.lines.lock().unwrap(), [b"short\n".to_vec()]);
        assert_eq!(parts.writer.shared.dropped.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn lines_that_can_not_be_written_are_counted_and_the_next_ones_are_written() {
        let parts = start();
        for allowed in [true, false, false, true] {
            parts.allow.send(allowed).unwrap();
            (&parts.writer).write_all(if allowed { b"kept\n" } else { b"lost\n" }).unwrap();
        }
        assert!(parts.writer.flush(Duration::from_mins(1)));
        assert_eq!(*parts.lines.lock().unwrap(), [b"kept\n".to_vec(), b"kept\n".to_vec()]);
        assert_eq!(parts.writer.shared.dropped.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn a_log_that_is_dropped_has_written_what_was_queued_and_is_opened_anew_when_told() {
        let Parts { writer, allow, lines, reopened } = start();
        drop(allow);
        let log = Log { writer: writer.clone(), place: Place::File };
        (&writer).write_all(b"before\n").unwrap();
        log.reopen();
        (&writer).write_all(b"last\n").unwrap();
        drop(log);
        assert_eq!(*lines.lock().unwrap(), [b"before\n".to_vec(), b"last\n".to_vec()]);
        assert_eq!(reopened.load(Ordering::Relaxed), 1);
    }
}
