//! Outbox: usage events and occurrences of failures wait in files of this process until they are delivered to
//! analytics and errors.
//!
//! An acknowledged event survives the end of the process. It is delivered at least once, with an id by which its
//! receiver counts it once. No call waits for the network, and none longer than 50 ms for the disk. After that the
//! call goes on, and its event is written later. Events that find the queue full, or that can't be written, are
//! dropped and counted.

mod append_queue;
mod completed_call;
mod config;
mod files;
mod priority;
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

use futures_util::future::BoxFuture;
use hapa_proto::analytics::v1::UsageEvent;
use hapa_proto::errors::v1::Occurrence;
use hapa_transport::peer::{AnalyticsClient, ErrorsClient};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::append_queue::{AppendQueue, CallEvents};
use self::priority::EventKind;
use self::relay::Relay;
use self::state::OutboxState;
use self::store::OutboxStore;
use self::writer::OutboxWriter;

pub(crate) use self::completed_call::CompletedCall;
pub use self::config::{OutboxConfig, OutboxLimits};
pub use self::files::{count_events, find_with_user_events, is_outbox_file};

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
    queue: Arc<AppendQueue>,
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
    running_relays: TaskTracker,
}

impl Outbox {
    /// Opens the folder at `path`. It fails if another process has the folder open.
    pub async fn open(
        &self,
        path: PathBuf,
        limits: OutboxLimits,
        receivers: Receivers,
    ) -> anyhow::Result<OutboxTasks> {
        let store = OutboxStore::open(&path).await?;
        let (queue, running_relays) = (Arc::new(AppendQueue::default()), TaskTracker::new());
        let accepts = [receivers.analytics.is_some(), receivers.errors.is_some()];
        self.state.max_events.store(limits.max_events, Ordering::Relaxed);
        let relays = Relay::for_receivers(receivers, &queue, &self.state, &running_relays);
        let writer = OutboxWriter::new(store, Arc::clone(&self.state), limits, Arc::clone(&queue));
        let opened = self.open.set(OpenOutbox { queue, accepts });
        anyhow::ensure!(opened.is_ok(), "an outbox can be opened once only");
        OutboxState::register_drop_counters();
        Ok(OutboxTasks { writer, relays, running_relays })
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
        let open = self.open.get()?;
        let usage = usage.filter(|_| self.accepts(EventKind::Usage));
        let occurrences = if self.accepts(EventKind::Occurrence) { occurrences } else { &[] };
        let events = CallEvents { usage, occurrences };
        if events.is_empty() {
            return None;
        }
        let (written, ack) = needs_ack.then(oneshot::channel).unzip();
        match open.queue.push(events, written) {
            Ok(()) => ack.map(DurabilityAck),
            Err(reason) => {
                self.state.record_drop(EventKind::Usage, reason, usage.iter().len() as u64);
                self.state.record_drop(EventKind::Occurrence, reason, occurrences.len() as u64);
                None
            }
        }
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
}

impl OutboxTasks {
    /// Runs until `end`, and then until the remaining events are flushed, at most 2 s.
    pub fn run(self, mut spawn: impl FnMut(BoxFuture<'static, ()>), end: &CancellationToken) {
        self.running_relays.close();
        for relay in self.relays {
            spawn(Box::pin(relay.run(end.clone())));
        }
        spawn(Box::pin(self.writer.run(self.running_relays, end.clone())));
    }
}

/// Completes when the events of a call are written, with true, or when that fails or takes longer than 50 ms, with
/// false.
#[derive(Debug)]
pub struct DurabilityAck(oneshot::Receiver<()>);

impl Future for DurabilityAck {
    type Output = bool;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<bool> {
        let written = ready!(Pin::new(&mut self.0).poll(cx));
        Poll::Ready(written.is_ok())
    }
}
