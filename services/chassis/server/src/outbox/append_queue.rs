//! The queue between calls, relays and the writer. Calls encode their events into a shared buffer, which the writer
//! exchanges for an empty one. No call allocates more than its acknowledgement.
//!
//! Invariant: the lock is never held during file I/O, so that a disk that hangs blocks neither calls nor the runtime.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hapa_proto::analytics::v1::UsageEvent;
use hapa_proto::errors::v1::Occurrence;
use prost::Message;
use tokio::sync::{Notify, oneshot};
use tokio::time::{Instant, sleep, sleep_until};

use super::priority::{EventKind, Priority};
use super::state::{DropReason, now_ms};
use super::store::{BatchEnd, EventBatch, HEADER_LEN, append_record};

/// Maximum time that a call waits for its events to be written.
const WRITE_TIMEOUT: Duration = Duration::from_millis(50);
/// Capacity of the queue in calls.
pub(super) const QUEUE_CAPACITY: usize = 1_024;
/// The part of the queue for calls with an owner, so that many refused calls do not displace the events of users.
pub(super) const OWNER_QUEUE_CAPACITY: usize = QUEUE_CAPACITY / 2;
/// Capacity of the queue in bytes.
pub(super) const QUEUE_BYTES: usize = 8 * 1024 * 1024;
/// The bytes of the queue for calls with an owner.
pub(super) const OWNER_QUEUE_BYTES: usize = QUEUE_BYTES / 2;
/// Memory that a buffer keeps after a burst.
const MAX_IDLE_BUFFER_BYTES: usize = 256 * 1024;
/// How long the queue waits at the end for the events of calls that were dropped with their connections.
const LINGER_TIMEOUT: Duration = Duration::from_millis(100);

/// The events of one call.
#[derive(Clone, Copy, Debug)]
pub(super) struct CallEvents<'e> {
    pub(super) usage: Option<&'e UsageEvent>,
    pub(super) occurrences: &'e [Occurrence],
}

/// A request of a relay to the writer.
#[derive(Debug)]
pub(super) enum RelayRequest {
    /// Reads the next events of a kind, at most `max`.
    Next { kind: EventKind, max: usize, events: oneshot::Sender<std::io::Result<EventBatch>> },
    /// Consumes events that were delivered or refused.
    Consume(BatchEnd),
}

/// What the writer has to do.
#[derive(Debug, Default)]
pub(super) struct Work {
    /// Encoded events by priority, and their numbers.
    pub(super) records: [Vec<u8>; 3],
    pub(super) event_counts: [u64; 3],
    pub(super) requests: Vec<RelayRequest>,
}

/// An acknowledgement that a call waits for.
#[derive(Debug)]
struct PendingAck {
    deadline: Instant,
    written: oneshot::Sender<()>,
}

#[derive(Debug, Default)]
struct Pending {
    work: Work,
    call_count: usize,
    /// Calls that were queued so far.
    total_calls: u64,
    /// Acknowledgements of `work`.
    acks: VecDeque<PendingAck>,
    /// Acknowledgements of the events that are being written.
    writing_acks: VecDeque<PendingAck>,
    /// The writer waits for work.
    is_idle: bool,
    /// The deadline of the first acknowledgement is watched.
    is_watched: bool,
    is_closed: bool,
}

#[derive(Debug, Default)]
pub(super) struct AppendQueue {
    pending: Mutex<Pending>,
    has_work: Condvar,
    has_acks: Notify,
}

impl CallEvents<'_> {
    pub(super) fn is_empty(&self) -> bool {
        self.usage.is_none() && self.occurrences.is_empty()
    }

    fn has_owner(&self) -> bool {
        self.usage.is_some_and(|event| !event.owner.is_empty())
            || self.occurrences.iter().any(|event| !event.owner.is_empty())
    }

    /// Length of the records.
    fn encoded_len(&self) -> usize {
        let usage = self.usage.map_or(0, |event| HEADER_LEN + event.encoded_len());
        let len = |event: &Occurrence| HEADER_LEN + event.encoded_len();
        usage + self.occurrences.iter().map(len).sum::<usize>()
    }
}

impl Work {
    fn bytes(&self) -> usize {
        self.records.iter().map(Vec::len).sum()
    }

    fn is_empty(&self) -> bool {
        self.requests.is_empty() && self.records.iter().all(Vec::is_empty)
    }

    fn push(&mut self, priority: Priority, time: u64, event: &impl Message) {
        let log = &mut self.records[priority as usize];
        append_record(log, time, |log| {
            // A `Vec` grows, so this can't fail.
            let _ = event.encode(log);
        });
        self.event_counts[priority as usize] += 1;
    }

    /// Removes the events, and keeps memory for the next ones.
    pub(super) fn clear(&mut self) {
        for log in &mut self.records {
            log.clear();
            log.shrink_to(MAX_IDLE_BUFFER_BYTES);
        }
        self.event_counts = [0; 3];
        self.requests.clear();
    }
}

impl Pending {
    /// Why a call with records of a length is not accepted.
    fn refusal(&self, bytes: usize, has_owner: bool) -> Option<DropReason> {
        if self.is_closed {
            return Some(DropReason::Closed);
        }
        let (capacity, max_bytes) = if has_owner {
            (QUEUE_CAPACITY, QUEUE_BYTES)
        } else {
            (QUEUE_CAPACITY - OWNER_QUEUE_CAPACITY, QUEUE_BYTES - OWNER_QUEUE_BYTES)
        };
        let is_full = self.call_count >= capacity || self.work.bytes() + bytes > max_bytes;
        is_full.then_some(DropReason::QueueFull)
    }
}

impl AppendQueue {
    /// Queues the events of a call. `written` is completed when they are written, and dropped if that fails or takes
    /// longer than 50 ms.
    pub(super) fn push(
        &self,
        events: CallEvents<'_>,
        written: Option<oneshot::Sender<()>>,
    ) -> Result<(), DropReason> {
        let (bytes, has_owner, time) = (events.encoded_len(), events.has_owner(), now_ms());
        let deadline = Instant::now() + WRITE_TIMEOUT;
        let mut pending = self.lock();
        if let Some(reason) = pending.refusal(bytes, has_owner) {
            return Err(reason);
        }
        if let Some(event) = events.usage {
            let has_failed = !event.error_code.is_empty();
            let priority = if has_failed { Priority::FailedUsage } else { Priority::Usage };
            pending.work.push(priority, time, event);
        }
        for event in events.occurrences {
            pending.work.push(Priority::Occurrence, time, event);
        }
        pending.call_count += 1;
        pending.total_calls += 1;
        let mut is_unwatched = false;
        if let Some(written) = written {
            pending.acks.push_back(PendingAck { deadline, written });
            is_unwatched = !std::mem::replace(&mut pending.is_watched, true);
        }
        self.wake_writer(pending);
        if is_unwatched {
            self.has_acks.notify_one();
        }
        Ok(())
    }

    /// Passes a request to the writer. It is dropped if the writer has ended.
    pub(super) fn request(&self, request: RelayRequest) {
        let mut pending = self.lock();
        if !pending.is_closed {
            pending.work.requests.push(request);
            self.wake_writer(pending);
        }
    }

    /// Waits for work, or until a time. Exchanges `work`, which must be empty. Returns false after the last work.
    pub(super) fn wait(&self, work: &mut Work, until: Instant) -> bool {
        let mut pending = self.lock();
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if !pending.work.is_empty() || pending.is_closed || left.is_zero() {
                break;
            }
            pending.is_idle = true;
            let waited = self.has_work.wait_timeout(pending, left);
            (pending, _) = waited.unwrap_or_else(PoisonError::into_inner);
            pending.is_idle = false;
        }
        let pending = &mut *pending;
        std::mem::swap(&mut pending.work, work);
        pending.call_count = 0;
        pending.writing_acks.append(&mut pending.acks);
        !(pending.is_closed && work.is_empty())
    }

    /// Completes the acknowledgements of the work that was taken last.
    pub(super) fn complete(&self, is_written: bool) {
        let acks = std::mem::take(&mut self.lock().writing_acks);
        for ack in acks.into_iter().filter(|_| is_written) {
            // It fails if the call has ended.
            let _ = ack.written.send(());
        }
    }

    /// Ends the wait of calls whose events are not written in time.
    pub(super) async fn expire_acks(&self) {
        loop {
            match self.expire(Instant::now()) {
                Some(deadline) => sleep_until(deadline).await,
                None => self.has_acks.notified().await,
            }
        }
    }

    /// Ends the waits whose deadline has passed. Returns the next deadline.
    fn expire(&self, now: Instant) -> Option<Instant> {
        let mut pending = self.lock();
        let Pending { acks, writing_acks, .. } = &mut *pending;
        for acks in [&mut *writing_acks, &mut *acks] {
            while acks.pop_front_if(|ack| ack.deadline <= now).is_some() {}
        }
        let next = writing_acks.front().or(acks.front()).map(|ack| ack.deadline);
        pending.is_watched = next.is_some();
        next
    }

    /// Waits until no call has been queued for 100 ms.
    pub(super) async fn linger(&self) {
        let mut before = None;
        loop {
            let total = self.lock().total_calls;
            if before.replace(total) == Some(total) {
                return;
            }
            sleep(LINGER_TIMEOUT).await;
        }
    }

    /// Refuses further calls. The writer ends after the work that is queued.
    pub(super) fn close(&self) {
        let mut pending = self.lock();
        pending.is_closed = true;
        self.wake_writer(pending);
    }

    /// Refuses further calls, and drops the work that is queued.
    pub(super) fn abandon(&self) {
        let mut pending = self.lock();
        *pending = Pending { is_closed: true, ..Pending::default() };
    }

    fn wake_writer(&self, mut pending: MutexGuard<'_, Pending>) {
        // Only one wake-up for each wait.
        let is_idle = std::mem::take(&mut pending.is_idle);
        drop(pending);
        if is_idle {
            self.has_work.notify_one();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
