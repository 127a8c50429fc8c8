//! Outbox: usage events and occurrences of failures wait in a file of this process until they are delivered to
//! analytics and errors.
//!
//! An acknowledged event survives the end of the process. It is delivered at least once, with an id by which its
//! receiver counts it once. No call waits for the network, and none longer than 50 ms for the file. After that the
//! call goes on, and its event is written later. Events that find the queue full, or that can't be written, are
//! dropped and counted.

mod completed_call;
mod config;
mod encoded_event;
mod files;
mod relay;
mod state;
mod store;
#[cfg(test)]
mod tests;
mod writer;

use std::path::PathBuf;
use std::pin::Pin;
use std::slice;
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures_util::future::BoxFuture;
use hapa_proto::analytics::v1::UsageEvent;
use hapa_proto::errors::v1::Occurrence;
use hapa_transport::peer::{AnalyticsClient, ErrorsClient};
use prost::Message as _;
use tokio::sync::{Mutex, mpsc, oneshot};
use tokio::time::{Timeout, timeout};
use tokio_util::sync::CancellationToken;

use self::encoded_event::{EncodedEvent, EventKind, Priority};
use self::relay::Relay;
use self::state::{DropReason, OutboxState};
use self::store::OutboxStore;
use self::writer::{AppendRequest, OutboxWriter};

pub(crate) use self::completed_call::CompletedCall;
pub use self::config::{OutboxConfig, OutboxLimits};
pub use self::files::{count_events, find_with_user_events, is_outbox_file};

/// Maximum time that a call waits for its events to be written.
const WRITE_TIMEOUT: Duration = Duration::from_millis(50);
/// Capacity of the queue in front of the writer, in calls.
const QUEUE_CAPACITY: usize = 1_024;
/// The part of the queue for calls with an owner, so that many refused calls do not displace the events of users.
const OWNER_QUEUE_CAPACITY: usize = QUEUE_CAPACITY / 2;
/// Capacity of the queue of deletions, one for each relay.
const DELETE_QUEUE_CAPACITY: usize = 2;

/// The service that receives one kind of event.
#[derive(Debug)]
pub struct Receiver<C> {
    /// The client of the service.
    pub client: C,
    /// Whether this process runs the service. Its port is closed when the final flush would start.
    pub is_own_process: bool,
}

/// The services that receive events. Events of a kind without a receiver are not stored.
#[derive(Debug, Default)]
pub struct Receivers {
    /// Receives usage events.
    pub analytics: Option<Receiver<AnalyticsClient>>,
    /// Receives occurrences.
    pub errors: Option<Receiver<ErrorsClient>>,
}

#[derive(Debug)]
struct OpenOutbox {
    appends: mpsc::Sender<AppendRequest>,
    /// Which kinds have a receiver.
    accepts: [bool; 2],
}

/// A handle on an outbox, which accepts no events until it is opened. Clones share one outbox.
#[derive(Clone, Debug, Default)]
pub struct Outbox {
    open: Arc<OnceLock<OpenOutbox>>,
    state: Arc<OutboxState>,
}

/// The tasks of an open outbox.
pub struct OutboxTasks {
    writer: OutboxWriter,
    relays: Vec<Relay>,
}

impl Outbox {
    /// Opens the file at `path`. It fails if another process has the file open.
    pub async fn open(
        &self,
        path: PathBuf,
        limits: OutboxLimits,
        receivers: Receivers,
    ) -> anyhow::Result<OutboxTasks> {
        let (store, reader) = OutboxStore::open(&path).await?;
        let reader = Arc::new(Mutex::new(reader));
        let (appends, append_requests) = mpsc::channel(QUEUE_CAPACITY);
        let (deletes, delete_requests) = mpsc::channel(DELETE_QUEUE_CAPACITY);
        let accepts = [receivers.analytics.is_some(), receivers.errors.is_some()];
        self.state.max_events.store(limits.max_events, Ordering::Relaxed);
        let requests = (append_requests, delete_requests);
        let writer = OutboxWriter::new(store, Arc::clone(&self.state), limits, requests);
        let relays = Relay::for_receivers(receivers, &reader, &deletes, &self.state);
        let opened = self.open.set(OpenOutbox { appends, accepts });
        anyhow::ensure!(opened.is_ok(), "an outbox can be opened once only");
        OutboxState::register_drop_counters();
        Ok(OutboxTasks { writer, relays })
    }

    /// Appends the events that have a receiver. The acknowledgement completes when they are written; `None`: there
    /// is no event to wait for.
    pub fn append(
        &self,
        usage: Option<&UsageEvent>,
        occurrence: Option<&Occurrence>,
    ) -> Option<DurabilityAck> {
        self.append_all(usage, occurrence.map_or(&[], slice::from_ref), true)
    }

    /// Appends the events of a call. `needs_ack`: something waits for the acknowledgement.
    pub(crate) fn append_call(
        &self,
        completed: &CompletedCall<'_>,
        needs_ack: bool,
    ) -> Option<DurabilityAck> {
        let usage = self.accepts(EventKind::Usage).then(|| completed.usage()).flatten();
        let occurrences =
            if self.accepts(EventKind::Occurrence) { completed.occurrences() } else { Vec::new() };
        self.append_all(usage.as_ref(), &occurrences, needs_ack)
    }

    fn append_all(
        &self,
        usage: Option<&UsageEvent>,
        occurrences: &[Occurrence],
        needs_ack: bool,
    ) -> Option<DurabilityAck> {
        let (written, ack) = needs_ack.then(oneshot::channel).unzip();
        let is_queued = self.enqueue(usage, occurrences, written);
        let ack = ack.filter(|_| is_queued)?;
        Some(DurabilityAck(Box::pin(timeout(WRITE_TIMEOUT, ack))))
    }

    /// A message for operators while events are dropped or about to be.
    pub fn problem(&self) -> Option<&'static str> {
        self.open.get()?;
        if self.state.is_unwritable.load(Ordering::Relaxed) {
            return Some("E5010: the outbox can't be written, and new events are dropped");
        }
        let depth: u64 = EventKind::ALL.iter().map(|kind| self.state.depth(*kind)).sum();
        if depth >= self.state.max_events.load(Ordering::Relaxed) {
            return Some("E5010: the outbox is full, and the oldest events are dropped");
        }
        let has_dropped = self.state.has_dropped_recently();
        has_dropped.then_some("E5010: events were dropped within the last minute")
    }

    /// Logs the kinds of events that are not stored.
    pub(crate) fn log_missing_receivers(&self) {
        for kind in EventKind::ALL.into_iter().filter(|kind| !self.accepts(*kind)) {
            tracing::info!(kind = kind.label(), "these events have no receiver and are not stored");
        }
    }

    fn accepts(&self, kind: EventKind) -> bool {
        self.open.get().is_some_and(|open| open.accepts[kind as usize])
    }

    /// Queues the events that have a receiver. Returns whether any is queued.
    fn enqueue(
        &self,
        usage: Option<&UsageEvent>,
        occurrences: &[Occurrence],
        written: Option<oneshot::Sender<()>>,
    ) -> bool {
        let Some(open) = self.open.get() else { return false };
        let has_owner = usage.is_some_and(|event| !event.owner.is_empty())
            || occurrences.iter().any(|event| !event.owner.is_empty());
        let events = self.encode(usage, occurrences);
        if events.is_empty() {
            return false;
        }
        let append = AppendRequest { events, written };
        let is_reserved = open.appends.capacity() <= OWNER_QUEUE_CAPACITY;
        let (append, reason) = if is_reserved && !has_owner {
            (append, DropReason::QueueFull)
        } else {
            match open.appends.try_send(append) {
                Ok(()) => return true,
                Err(mpsc::error::TrySendError::Full(append)) => (append, DropReason::QueueFull),
                Err(mpsc::error::TrySendError::Closed(append)) => (append, DropReason::Closed),
            }
        };
        for event in append.events {
            self.state.record_drop(event.priority.kind(), reason, 1);
        }
        false
    }

    fn encode(&self, usage: Option<&UsageEvent>, occurrences: &[Occurrence]) -> Vec<EncodedEvent> {
        let usage = usage.filter(|_| self.accepts(EventKind::Usage)).map(|event| {
            let has_failed = !event.error_code.is_empty();
            let priority = if has_failed { Priority::FailedUsage } else { Priority::Usage };
            EncodedEvent { priority, body: event.encode_to_vec() }
        });
        let occurrences = occurrences.iter().filter(|_| self.accepts(EventKind::Occurrence));
        let occurrences = occurrences.map(|event| EncodedEvent {
            priority: Priority::Occurrence,
            body: event.encode_to_vec(),
        });
        usage.into_iter().chain(occurrences).collect()
    }
}

impl OutboxTasks {
    /// Runs until `end`, and then until the remaining events are flushed, at most 2 s.
    pub fn run(self, mut spawn: impl FnMut(BoxFuture<'static, ()>), end: &CancellationToken) {
        for relay in self.relays {
            spawn(Box::pin(relay.run(end.clone())));
        }
        spawn(Box::pin(self.writer.run(end.clone())));
    }
}

/// Completes when the events of a call are written, with true, or when the wait for that times out, with false.
#[derive(Debug)]
pub struct DurabilityAck(Pin<Box<Timeout<oneshot::Receiver<()>>>>);

impl Future for DurabilityAck {
    type Output = bool;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<bool> {
        let written = ready!(self.0.as_mut().poll(cx));
        Poll::Ready(matches!(written, Ok(Ok(()))))
    }
}
