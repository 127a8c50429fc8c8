//! Events on their way to the services that keep them: usage and failures, first in a file of this
//! process, then delivered.
//!
//! What was appended and acknowledged survives the process. It is delivered at least once, under
//! an id that lets the receiver count it once. No call waits for the network, and none longer than
//! [`PATIENCE`] for the file: then it goes on, and its event is written when it can be. What finds
//! no room among those that wait, or can't be written at all, is dropped and counted.

mod event;
mod relay;
mod store;
#[cfg(test)]
mod tests;
mod writer;

use std::path::PathBuf;
use std::pin::Pin;
use std::slice;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::{ArgAction, Args};
use futures_util::future::BoxFuture;
use hapa_proto::analytics::v1::UsageEvent;
use hapa_proto::errors::v1::Occurrence;
use hapa_transport::peer::{AnalyticsClient, ErrorsClient};
use prost::Message as _;
use tokio::sync::{Mutex, Notify, mpsc, oneshot};
use tokio::time::{Timeout, timeout};
use tokio_util::sync::CancellationToken;

use self::relay::Shipper;
use self::store::Store;
use self::writer::Writer;

pub(crate) use self::event::Ended;

/// How long a call waits for its event to be written.
const PATIENCE: Duration = Duration::from_millis(50);
/// Calls whose events wait to be written.
const WAITING: usize = 1_024;
/// Of those, calls of owners alone: a flood of refused strangers must not push out the events of others.
const RESERVED: usize = WAITING / 2;
/// For how long health speaks of an event that was dropped.
const LATELY: Duration = Duration::from_mins(1);

/// Settings of the event spool.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Event spool")]
pub struct SpoolConfig {
    /// Most events that wait in DATA_DIR for the services that keep them; beyond, the oldest go,
    /// those of calls that succeeded first.
    #[arg(long, env = "SPOOL_MAX_EVENTS", default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(1..))]
    pub spool_max_events: u64,
    /// How long an event waits at most, in hours.
    #[arg(long, env = "SPOOL_MAX_AGE_HOURS", default_value_t = 168, value_parser = clap::value_parser!(u32).range(1..=8760))]
    pub spool_max_age_hours: u32,
    /// Whether failures are reported to the errors service.
    #[arg(long, env = "ERROR_MONITORING_ENABLED", action = ArgAction::Set, default_value_t = true)]
    pub error_monitoring_enabled: bool,
    /// Whether what calls use is recorded.
    #[arg(long, env = "USAGE_RECORDING_ENABLED", action = ArgAction::Set, default_value_t = true)]
    pub usage_recording_enabled: bool,
}

/// What is spooled; kinds are delivered on their own, so that none waits for another's receiver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Usage,
    Occurrence,
}

impl Kind {
    const ALL: [Kind; 2] = [Kind::Usage, Kind::Occurrence];

    /// As metrics call it.
    fn name(self) -> &'static str {
        match self {
            Kind::Usage => "usage",
            Kind::Occurrence => "occurrence",
        }
    }

    /// Most worth keeping first.
    fn ranks(self) -> &'static [Rank] {
        match self {
            Kind::Usage => &[Rank::FailedUsage, Rank::Usage],
            Kind::Occurrence => &[Rank::Occurrence],
        }
    }
}

/// Why an event is dropped.
const REASONS: [&str; 6] = ["busy", DISK, "ended", "full", "old", "refused"];
/// The file could not be written.
const DISK: &str = "disk";

/// How much an event is worth keeping, least first; the number is in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rank {
    Usage = 0,
    FailedUsage = 1,
    Occurrence = 2,
}

impl Rank {
    const ALL: [Rank; 3] = [Rank::Usage, Rank::FailedUsage, Rank::Occurrence];

    fn kind(self) -> Kind {
        if self == Rank::Occurrence { Kind::Occurrence } else { Kind::Usage }
    }
}

/// One event, as it is written.
#[derive(Debug)]
struct Item {
    rank: Rank,
    body: Vec<u8>,
}

/// One call's events.
#[derive(Debug)]
struct Append {
    items: Vec<Item>,
    /// None: nobody waits.
    written: Option<oneshot::Sender<()>>,
}

/// How many events wait in a spool's file, which stays as it is.
pub async fn waiting(file: &std::path::Path) -> anyhow::Result<u64> {
    store::waiting(file).await
}

/// A spool in this folder in which an event waits of a call that was made with a credential; it stays as it is.
/// What services do among themselves leaves events too, also in a mesh that was never used.
pub async fn find_of_callers(folder: &std::path::Path) -> Option<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    for file in entries.map(|entry| entry.path()).filter(|path| is_spool(path)) {
        // One that can't be read says nothing.
        let bodies = store::oldest(&file).await.unwrap_or_default();
        if bodies.iter().any(|(kind, body)| is_of_a_caller(*kind, body)) {
            return Some(file);
        }
    }
    None
}

fn is_of_a_caller(kind: Kind, body: &[u8]) -> bool {
    match kind {
        Kind::Usage => UsageEvent::decode(body).is_ok_and(|event| !event.owner.is_empty()),
        Kind::Occurrence => Occurrence::decode(body).is_ok_and(|event| !event.owner.is_empty()),
    }
}

/// Whether a file is called as spools are.
pub fn is_spool(path: &std::path::Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    name.starts_with("spool-") && path.extension().is_some_and(|ending| ending == "db")
}

/// How much is kept, and for how long.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Events of all kinds.
    pub most: u64,
    /// Of an event.
    pub oldest: Duration,
}

/// Where one kind goes.
#[derive(Debug)]
pub struct Receiver<C> {
    /// Its client.
    pub client: C,
    /// Whether this process is the receiver: then its port is closed when the flush would begin.
    pub own: bool,
}

/// Where events go; a kind without a receiver is not spooled.
#[derive(Debug, Default)]
pub struct Receivers {
    /// Usage.
    pub analytics: Option<Receiver<AnalyticsClient>>,
    /// Failures.
    pub errors: Option<Receiver<ErrorsClient>>,
}

/// What the tasks and the callers share.
#[derive(Debug, Default)]
struct State {
    most: AtomicU64,
    depth: [AtomicU64; 3],
    /// Milliseconds since 1970, of what was dropped while the file could be written.
    last_drop: AtomicU64,
    /// The file can't be written at the moment.
    unwritable: AtomicBool,
    /// Fires when there is more to deliver.
    more: [Notify; 2],
    /// The log beside the file has grown: the writer must fold it in.
    heavy: AtomicBool,
}

impl State {
    /// There from the begin, so that the first that is dropped is a change.
    fn none_dropped() {
        for kind in [Kind::Usage, Kind::Occurrence] {
            for reason in REASONS {
                let labels = [("kind", kind.name()), ("reason", reason)];
                metrics::counter!("hapa_spool_dropped_total", &labels).increment(0);
            }
        }
    }

    fn dropped(&self, kind: Kind, reason: &'static str, count: u64) {
        if count == 0 {
            return;
        }
        let labels = [("kind", kind.name()), ("reason", reason)];
        metrics::counter!("hapa_spool_dropped_total", &labels).increment(count);
        if reason == DISK {
            return; // health reports it for as long as the disk fails
        }
        self.last_drop.store(now_ms(), Ordering::Relaxed);
    }

    fn depth(&self, kind: Kind) -> u64 {
        kind.ranks().iter().map(|rank| self.depth[*rank as usize].load(Ordering::Relaxed)).sum()
    }
}

#[derive(Debug)]
struct Open {
    appends: mpsc::Sender<Append>,
    takes: [bool; 2],
}

/// A handle. It takes nothing until it is opened.
#[derive(Clone, Debug, Default)]
pub struct Spool {
    open: Arc<OnceLock<Open>>,
    state: Arc<State>,
}

/// What an open spool needs to be run.
pub struct Work {
    writer: Writer,
    shippers: Vec<Shipper>,
}

impl Spool {
    /// Opens the file at `path`, which no other process may have open.
    pub async fn open(
        &self,
        path: PathBuf,
        bounds: Bounds,
        receivers: Receivers,
    ) -> anyhow::Result<Work> {
        let (store, reader) = Store::open(&path).await?;
        let reader = Arc::new(Mutex::new(reader));
        let (appends, waiting) = mpsc::channel(WAITING);
        let (deletes, deleting) = mpsc::channel(2);
        let takes = [receivers.analytics.is_some(), receivers.errors.is_some()];
        self.state.most.store(bounds.most, Ordering::Relaxed);
        let writer = Writer::new(store, Arc::clone(&self.state), bounds, (waiting, deleting));
        let shippers = Shipper::all(receivers, &reader, &deletes, &self.state);
        anyhow::ensure!(self.open.set(Open { appends, takes }).is_ok(), "a spool opens once");
        State::none_dropped();
        Ok(Work { writer, shippers })
    }

    /// Appends what there is a receiver for; the receipt says when it is written. None: nothing was
    /// taken, so there is nothing to wait for.
    pub fn append(
        &self,
        usage: Option<&UsageEvent>,
        occurrence: Option<&Occurrence>,
    ) -> Option<Receipt> {
        self.append_all(usage, occurrence.map_or(&[], slice::from_ref), true)
    }

    /// The same for all that one call failed with; no receipt where nobody `waits`.
    pub(crate) fn append_all(
        &self,
        usage: Option<&UsageEvent>,
        occurrences: &[Occurrence],
        waits: bool,
    ) -> Option<Receipt> {
        let (written, receipt) = waits.then(oneshot::channel).unzip();
        let taken = self.send(usage, occurrences, written);
        let receipt = receipt.filter(|_| taken)?;
        Some(Receipt(Box::pin(timeout(PATIENCE, receipt))))
    }

    /// Words for an operator while events are lost or about to be.
    pub fn problem(&self) -> Option<&'static str> {
        self.open.get()?;
        if self.state.unwritable.load(Ordering::Relaxed) {
            return Some("E5010: the event spool can't be written, and new events are dropped");
        }
        let depth: u64 = Kind::ALL.iter().map(|kind| self.state.depth(*kind)).sum();
        if depth >= self.state.most.load(Ordering::Relaxed) {
            return Some("E5010: the event spool is full, and the oldest events are dropped");
        }
        let since = now_ms().saturating_sub(self.state.last_drop.load(Ordering::Relaxed));
        let lately = u128::from(since) < LATELY.as_millis();
        lately.then_some("E5010: events were dropped within the last minute")
    }

    /// Tells an operator what is not spooled.
    pub(crate) fn tell(&self) {
        for kind in Kind::ALL.into_iter().filter(|kind| !self.takes(*kind)) {
            tracing::info!(
                kind = kind.name(),
                "no service keeps these events: they are not spooled"
            );
        }
    }

    fn takes(&self, kind: Kind) -> bool {
        self.open.get().is_some_and(|open| open.takes[kind as usize])
    }

    fn send(
        &self,
        usage: Option<&UsageEvent>,
        occurrences: &[Occurrence],
        written: Option<oneshot::Sender<()>>,
    ) -> bool {
        let Some(open) = self.open.get() else { return false };
        let has_owner = usage.is_some_and(|event| !event.owner.is_empty())
            || occurrences.iter().any(|event| !event.owner.is_empty());
        let usage = usage.filter(|_| self.takes(Kind::Usage)).map(|event| {
            let failed = !event.error_code.is_empty();
            let rank = if failed { Rank::FailedUsage } else { Rank::Usage };
            Item { rank, body: event.encode_to_vec() }
        });
        let occurrences = occurrences.iter().filter(|_| self.takes(Kind::Occurrence));
        let occurrences =
            occurrences.map(|event| Item { rank: Rank::Occurrence, body: event.encode_to_vec() });
        let items: Vec<_> = usage.into_iter().chain(occurrences).collect();
        if items.is_empty() {
            return false;
        }
        let append = Append { items, written };
        let (append, reason) = if !has_owner && open.appends.capacity() <= RESERVED {
            (append, "busy")
        } else {
            match open.appends.try_send(append) {
                Ok(()) => return true,
                Err(mpsc::error::TrySendError::Full(append)) => (append, "busy"),
                Err(mpsc::error::TrySendError::Closed(append)) => (append, "ended"),
            }
        };
        for item in append.items {
            self.state.dropped(item.rank.kind(), reason, 1);
        }
        false
    }
}

impl Work {
    /// Runs until `end`, and then for as long as it takes to flush, at most 2 s.
    pub fn run(self, mut spawn: impl FnMut(BoxFuture<'static, ()>), end: &CancellationToken) {
        for shipper in self.shippers {
            spawn(Box::pin(shipper.run(end.clone())));
        }
        spawn(Box::pin(self.writer.run(end.clone())));
    }
}

/// Comes when a call's events are written, or when waiting for that has taken long enough: true
/// where they are.
#[derive(Debug)]
pub struct Receipt(Pin<Box<Timeout<oneshot::Receiver<()>>>>);

impl Future for Receipt {
    type Output = bool;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<bool> {
        let written = ready!(self.0.as_mut().poll(cx));
        Poll::Ready(matches!(written, Ok(Ok(()))))
    }
}

fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
