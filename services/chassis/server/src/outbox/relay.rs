//! Delivers one kind of event: at least once, in batches, each removed after the reply alone.
//!
//! A receiver that is away or hangs is tried again, later and later. What it refuses as invalid is
//! halved until the one event is found that it refuses, and that one is dropped: it must not hold
//! the others back.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use hapa_core::rpc_error::{ErrorCode, read};
use hapa_proto::analytics::v1::RecordEventsRequest;
use hapa_proto::errors::v1::ReportOccurrencesRequest;
use hapa_transport::peer::{AnalyticsClient, ErrorsClient};
use prost::Message;
use tokio::sync::{Mutex, mpsc, oneshot};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Status};

use super::store::{BATCH, Reader, Row, Span};
use super::writer::Delete;
use super::{Kind, Receivers, State};

/// How long a receiver may take for a batch.
const PATIENCE: Duration = Duration::from_secs(5);
/// What arrives meanwhile is delivered together.
const GATHERING: Duration = Duration::from_millis(100);
/// Between attempts, at first and at most.
const SHORTEST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// For delivering what is left at the end; the writer needs a moment after it.
const FLUSH: Duration = Duration::from_millis(1_500);
/// How often the log beside the file is folded in, and from how many pages on it is heavy (64 MiB).
const FOLDING: Duration = Duration::from_secs(1);
const HEAVY: i64 = 16_384;

enum Client {
    Usage(AnalyticsClient),
    Occurrence(ErrorsClient),
}

pub(super) struct Shipper {
    kind: Kind,
    client: Client,
    own: bool,
    reader: Arc<Mutex<Reader>>,
    deletes: mpsc::Sender<Delete>,
    state: Arc<State>,
    /// The size of the next batch.
    size: usize,
    pause: Duration,
    folded: Instant,
    failing: bool,
}

/// What became of a batch.
enum Outcome {
    Taken,
    Refused,
    Failed(String),
}

impl Shipper {
    pub(super) fn all(
        receivers: Receivers,
        reader: &Arc<Mutex<Reader>>,
        deletes: &mpsc::Sender<Delete>,
        state: &Arc<State>,
    ) -> Vec<Shipper> {
        let usage = receivers
            .analytics
            .map(|receiver| (Kind::Usage, Client::Usage(receiver.client), receiver.own));
        let occurrences = receivers
            .errors
            .map(|receiver| (Kind::Occurrence, Client::Occurrence(receiver.client), receiver.own));
        let shipper = |(kind, client, own)| Shipper {
            kind,
            client,
            own,
            reader: Arc::clone(reader),
            deletes: deletes.clone(),
            state: Arc::clone(state),
            size: BATCH,
            pause: SHORTEST_PAUSE,
            folded: Instant::now(),
            failing: false,
        };
        usage.into_iter().chain(occurrences).map(shipper).collect()
    }

    pub(super) async fn run(mut self, end: CancellationToken) {
        let flush = if self.own { Duration::ZERO } else { FLUSH };
        tokio::select! {
            () = self.ship(&end) => {}
            () = over(&end, flush) => {}
        }
    }

    /// Delivers; at the end what is left, once.
    async fn ship(&mut self, end: &CancellationToken) {
        loop {
            self.fold().await;
            let rows = self.reader.lock().await.next(self.kind, self.size).await;
            let delivered = match rows {
                Ok(rows) if rows.is_empty() => {
                    if end.is_cancelled() {
                        return;
                    }
                    self.rest(end).await;
                    continue;
                }
                Ok(rows) => {
                    let few = rows.len() < self.size;
                    let delivered = self.deliver(&rows).await;
                    if few && delivered.is_ok() {
                        gather(end).await;
                    }
                    delivered
                }
                Err(error) => Err(error.to_string()),
            };
            self.note(delivered.as_ref().err());
            if delivered.is_err() {
                if end.is_cancelled() {
                    return;
                }
                let pause = self.pause.mul_f64(0.5 + rand::random::<f64>() / 2.0);
                self.pause = (self.pause * 2).min(LONGEST_PAUSE);
                tokio::select! {
                    () = sleep(pause) => {}
                    // One attempt more.
                    () = end.cancelled() => {}
                }
            }
        }
    }

    /// Waits until there is something, and then until there is more.
    async fn rest(&self, end: &CancellationToken) {
        tokio::select! {
            () = self.state.more[self.kind as usize].notified() => {}
            () = sleep(FOLDING) => return,
            () = end.cancelled() => return,
        }
        gather(end).await;
    }

    async fn deliver(&mut self, rows: &[Row]) -> Result<(), String> {
        let sent = timeout(PATIENCE, self.client.send(rows)).await;
        let outcome = match sent {
            Ok(Ok(())) => Outcome::Taken,
            Ok(Err(status)) if is_refusal(&status) => Outcome::Refused,
            Ok(Err(status)) => Outcome::Failed(status.to_string()),
            Err(_) => Outcome::Failed("no answer".to_owned()),
        };
        let count = rows.len() as u64;
        match outcome {
            Outcome::Taken => {
                self.remove(rows).await?;
                metrics::counter!("hapa_spool_shipped_total", "kind" => self.kind.name())
                    .increment(count);
                self.size = (self.size * 2).min(BATCH);
                self.pause = SHORTEST_PAUSE;
                Ok(())
            }
            Outcome::Refused if count > 1 => {
                self.size = rows.len() / 2;
                Ok(())
            }
            Outcome::Refused => {
                self.remove(rows).await?;
                self.state.dropped(self.kind, "refused", count);
                Ok(())
            }
            Outcome::Failed(words) => Err(words),
        }
    }

    async fn remove(&self, rows: &[Row]) -> Result<(), String> {
        let (told, removed) = oneshot::channel();
        let gone = || "the spool has ended".to_owned();
        self.deletes.send((spans(rows), told)).await.map_err(|_| gone())?;
        removed.await.map_err(|_| "what was delivered can't be removed".to_owned())
    }

    /// Once, when it begins to fail and when it works again.
    fn note(&mut self, error: Option<&String>) {
        let kind = self.kind.name();
        match error {
            Some(error) if !self.failing => {
                tracing::warn!(kind, error, "events can't be delivered; they wait");
            }
            None if self.failing => tracing::info!(kind, "events are delivered again"),
            _ => {}
        }
        self.failing = error.is_some();
    }

    async fn fold(&mut self) {
        if self.folded.elapsed() < FOLDING {
            return;
        }
        let pages = self.reader.lock().await.fold().await;
        if pages.is_ok_and(|pages| pages > HEAVY) {
            self.state.heavy.store(true, Ordering::Relaxed);
        }
        self.folded = Instant::now();
    }
}

/// Waits until there is more: a receiver takes many events for little more than one.
async fn gather(end: &CancellationToken) {
    tokio::select! {
        () = sleep(GATHERING) => {}
        () = end.cancelled() => {}
    }
}

impl Client {
    async fn send(&mut self, rows: &[Row]) -> Result<(), Status> {
        match self {
            Client::Usage(client) => {
                let request = RecordEventsRequest { events: messages(rows)? };
                client.record_events(bounded(request)).await.map(drop)
            }
            Client::Occurrence(client) => {
                let request = ReportOccurrencesRequest { occurrences: messages(rows)? };
                client.report_occurrences(bounded(request)).await.map(drop)
            }
        }
    }
}

fn bounded<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(PATIENCE);
    request
}

/// A row that can't be read is one that nobody would take.
fn messages<M: Message + Default>(rows: &[Row]) -> Result<Vec<M>, Status> {
    let decode = |row: &Row| M::decode(row.body.as_slice());
    let read: Result<_, _> = rows.iter().map(decode).collect();
    read.map_err(|error| Status::invalid_argument(error.to_string()))
}

/// Whether the same batch would be refused again.
fn is_refusal(status: &Status) -> bool {
    let too_large = ErrorCode::TooLarge.entry().name;
    status.code() == Code::InvalidArgument
        || read(status).is_some_and(|(code, _)| code == too_large)
}

/// The ranges of a batch: its rows stand in order, rank by rank.
fn spans(rows: &[Row]) -> Vec<Span> {
    let ranks = rows.chunk_by(|left, right| left.rank == right.rank);
    let span = |rows: &[Row]| {
        let (first, last) = (rows.first()?, rows.last()?);
        Some(Span { rank: first.rank, first: first.id, last: last.id })
    };
    ranks.filter_map(span).collect()
}

async fn over(end: &CancellationToken, flush: Duration) {
    end.cancelled().await;
    sleep_until(Instant::now() + flush).await;
}
