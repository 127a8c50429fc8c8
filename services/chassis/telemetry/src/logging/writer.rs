//! The writer of the log: a bounded queue of lines, and one thread that writes them.
//!
//! Invariant: logging never waits for standard error or a disk. A line that does not fit into the queue, or that can't
//! be written, is dropped and counted. The number of dropped lines is logged after the next line that is written.
//!
//! `tracing-appender` does not serve: it limits the number of lines, not of bytes, and cannot reopen its file.

use std::io::{self, Write as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;

use tracing_subscriber::fmt::MakeWriter;

use super::file::LogFile;

/// Maximum size of the queue, including [`LINE_OVERHEAD_BYTES`] per line.
const MAX_QUEUED_BYTES: usize = 4 * 1024 * 1024;
/// Memory of a queued line in addition to its text.
const LINE_OVERHEAD_BYTES: usize = 64;
/// How long the thread collects lines after it has written some. Lines that are queued meanwhile need no wake-up of it.
const BATCH_DELAY: Duration = Duration::from_millis(5);
/// Maximum wait for queued lines at the end of the process.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// A destination of lines.
pub(super) trait Output: Send + 'static {
    /// Writes one line, including its line break.
    fn write_line(&mut self, line: &[u8]) -> io::Result<()>;

    /// Reopens the destination, so that a renamed file is no longer written to.
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
        LogFile::reopen(self)
    }
}

enum Message {
    Line(Vec<u8>),
    /// Replies when all earlier lines have been written.
    Flush(Sender<()>),
    /// Makes the thread check `reopen`.
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

/// Queues lines for the thread that writes them. Clones share the queue.
#[derive(Clone, Debug)]
pub(crate) struct LogWriter {
    messages: Sender<Message>,
    shared: Arc<Shared>,
}

impl LogWriter {
    /// Starts the thread, which runs until the end of the process.
    pub(super) fn start(output: impl Output) -> io::Result<LogWriter> {
        let (messages, received) = channel();
        let shared = Arc::new(Shared::default());
        let writer = LogWriter { messages, shared: Arc::clone(&shared) };
        thread::Builder::new()
            .name("log-writer".to_owned())
            .spawn(move || write_lines(&received, &shared, output))?;
        Ok(writer)
    }

    /// Reopens the destination before the next line.
    pub(super) fn reopen(&self) {
        self.shared.reopen.store(true, Ordering::Release);
        // Fails only if the thread has ended.
        let _ = self.messages.send(Message::Wake);
    }

    /// Waits until the queued lines are written. Returns false on a timeout.
    pub(crate) fn flush(&self, timeout: Duration) -> bool {
        let (written, is_written) = channel();
        let sent = self.messages.send(Message::Flush(written));
        sent.is_ok() && is_written.recv_timeout(timeout).is_ok()
    }

    fn push(&self, line: &[u8]) {
        let cost = line.len() + LINE_OVERHEAD_BYTES;
        let queued = self.shared.queued_bytes.fetch_add(cost, Ordering::Relaxed);
        let fits = queued.saturating_add(cost) <= MAX_QUEUED_BYTES;
        if !fits || self.messages.send(Message::Line(line.to_vec())).is_err() {
            self.shared.queued_bytes.fetch_sub(cost, Ordering::Relaxed);
            self.shared.drop_line();
        }
    }
}

impl io::Write for &LogWriter {
    /// Expects a complete line, as `tracing` writes it.
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

/// The log of a server process. Dropping it waits up to 1 s until the queued lines are written.
#[derive(Debug)]
pub struct Log {
    pub(super) writer: LogWriter,
    pub(super) destination: Destination,
}

/// The destination of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Destination {
    Terminal,
    /// Standard error, usually a pipe.
    Stderr,
    File,
}

impl Log {
    /// Reopens LOG_FILE, if there is one, so that a renamed file is no longer written to. Queued lines go to the new
    /// file.
    pub fn reopen(&self) {
        if self.destination == Destination::File {
            self.writer.reopen();
            tracing::info!("LOG_FILE is reopened");
        }
    }

    /// Whether the log goes to a terminal.
    pub fn is_terminal(&self) -> bool {
        self.destination == Destination::Terminal
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        self.writer.flush(FLUSH_TIMEOUT);
    }
}

fn write_lines(messages: &Receiver<Message>, shared: &Shared, output: impl Output) {
    let mut lines = LineWriter { shared, output, reported: 0 };
    while let Ok(message) = messages.recv() {
        lines.handle(message);
        for message in messages.try_iter() {
            lines.handle(message);
        }
        thread::sleep(BATCH_DELAY);
    }
}

/// The thread's part of a [`LogWriter`].
struct LineWriter<'s, O> {
    shared: &'s Shared,
    output: O,
    /// Number of dropped lines that were logged.
    reported: u64,
}

impl<O: Output> LineWriter<'_, O> {
    fn handle(&mut self, message: Message) {
        let shared = self.shared;
        if shared.reopen.swap(false, Ordering::AcqRel)
            && let Err(error) = self.output.reopen()
        {
            tracing::error!(%error, "LOG_FILE can't be reopened; the old file remains in use");
        }
        let line = match message {
            Message::Line(line) => line,
            Message::Flush(written) => {
                // Fails if the flush has timed out.
                let _ = written.send(());
                return;
            }
            Message::Wake => return,
        };
        let written = self.output.write_line(&line);
        shared.queued_bytes.fetch_sub(line.len() + LINE_OVERHEAD_BYTES, Ordering::Relaxed);
        if written.is_err() {
            return shared.drop_line();
        }
        // Only after a successful write, so that a failing report does not cause another one.
        let dropped = shared.dropped.load(Ordering::Relaxed);
        let has_room = shared.queued_bytes.load(Ordering::Relaxed) < MAX_QUEUED_BYTES / 2;
        if dropped > self.reported && has_room {
            tracing::error!(lines = dropped - self.reported, "log lines were dropped");
            self.reported = dropped;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::mpsc::SyncSender;

    use super::*;

    /// Collects lines. Each write waits for a permission, and fails if it is `false`.
    struct ControlledOutput {
        allowed: Receiver<bool>,
        lines: Arc<Mutex<Vec<Vec<u8>>>>,
        reopened: Arc<AtomicUsize>,
    }

    impl Output for ControlledOutput {
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

    struct Fixture {
        writer: LogWriter,
        allow: SyncSender<bool>,
        lines: Arc<Mutex<Vec<Vec<u8>>>>,
        reopened: Arc<AtomicUsize>,
    }

    fn start() -> Fixture {
        let (allow, allowed) = std::sync::mpsc::sync_channel(64);
        let (lines, reopened) = (Arc::default(), Arc::default());
        let output = ControlledOutput {
            allowed,
            lines: Arc::clone(&lines),
            reopened: Arc::clone(&reopened),
        };
        Fixture { writer: LogWriter::start(output).unwrap(), allow, lines, reopened }
    }

    #[test]
    fn a_blocked_output_does_not_block_logging_and_the_queue_is_bounded() {
        let fixture = start();
        let line = [b'x'; 1024];
        let fit = MAX_QUEUED_BYTES / (line.len() + LINE_OVERHEAD_BYTES);
        for _ in 0..fit + 100 {
            (&fixture.writer).write_all(&line).unwrap();
        }
        assert_eq!(fixture.writer.shared.dropped.load(Ordering::Relaxed), 100);
        assert!(fixture.writer.shared.queued_bytes.load(Ordering::Relaxed) <= MAX_QUEUED_BYTES);
        assert!(!fixture.writer.flush(Duration::from_millis(1)), "the output is blocked");
        drop(fixture.allow);
        assert!(fixture.writer.flush(Duration::from_mins(1)));
        assert_eq!(fixture.lines.lock().unwrap().len(), fit);
        assert_eq!(fixture.writer.shared.queued_bytes.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn of_several_lines_only_the_one_larger_than_the_queue_is_dropped() {
        let fixture = start();
        drop(fixture.allow);
        (&fixture.writer).write_all(&vec![b'x'; MAX_QUEUED_BYTES]).unwrap();
        (&fixture.writer).write_all(b"short\n").unwrap();
        assert!(fixture.writer.flush(Duration::from_mins(1)));
        assert_eq!(*fixture.lines.lock().unwrap(), [b"short\n".to_vec()]);
        assert_eq!(fixture.writer.shared.dropped.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn failed_lines_are_counted_and_the_next_ones_are_written() {
        let fixture = start();
        for allowed in [true, false, false, true] {
            fixture.allow.send(allowed).unwrap();
            (&fixture.writer).write_all(if allowed { b"kept\n" } else { b"lost\n" }).unwrap();
        }
        assert!(fixture.writer.flush(Duration::from_mins(1)));
        assert_eq!(*fixture.lines.lock().unwrap(), [b"kept\n".to_vec(), b"kept\n".to_vec()]);
        assert_eq!(fixture.writer.shared.dropped.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn dropping_a_log_writes_the_queued_lines_and_reopen_takes_effect() {
        let Fixture { writer, allow, lines, reopened } = start();
        drop(allow);
        let log = Log { writer: writer.clone(), destination: Destination::File };
        (&writer).write_all(b"before\n").unwrap();
        log.reopen();
        (&writer).write_all(b"last\n").unwrap();
        drop(log);
        assert_eq!(*lines.lock().unwrap(), [b"before\n".to_vec(), b"last\n".to_vec()]);
        assert_eq!(reopened.load(Ordering::Relaxed), 1);
    }
}
