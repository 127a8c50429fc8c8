//! Relay: delivers one kind of event, at least once, in batches. A batch is consumed only after the reply.
//!
//! If a receiver fails or hangs, the relay retries with a growing delay. If a receiver refuses a batch as invalid, the
//! relay halves the batch until it finds the refused event. It drops that event, so that the others are not blocked.

use std::sync::Arc;
use std::time::Duration;

use hapa_core::rpc_error::{ErrorCode, published_code};
use hapa_proto::analytics::v1::RecordEventsRequest;
use hapa_proto::errors::v1::ReportOccurrencesRequest;
use hapa_transport::peer::{AnalyticsClient, ErrorsClient};
use prost::Message;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;
use tonic::{Code, Request, Status};

use super::Receivers;
use super::append_queue::{AppendQueue, RelayRequest};
use super::priority::EventKind;
use super::state::{DropReason, OutboxState};
use super::store::{BATCH_SIZE, EventBatch};

/// Maximum duration of a delivery.
const DELIVERY_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the relay collects further events before a delivery.
const BATCH_DELAY: Duration = Duration::from_millis(100);
/// Delay after the first failed delivery; it doubles with each further one.
const MIN_RETRY_DELAY: Duration = Duration::from_millis(100);
const MAX_RETRY_DELAY: Duration = Duration::from_secs(10);
/// Maximum time for the remaining events at the end, so that the writer has time to finish.
const FLUSH_TIMEOUT: Duration = Duration::from_millis(1_500);

enum ReceiverClient {
    Usage(AnalyticsClient),
    Occurrence(ErrorsClient),
}

/// The relay of one kind of event.
pub(super) struct Relay {
    kind: EventKind,
    client: ReceiverClient,
    is_own_process: bool,
    queue: Arc<AppendQueue>,
    state: Arc<OutboxState>,
    /// The writer ends after the relays.
    _running: TaskTrackerToken,
    /// Maximum size of the next batch.
    batch_size: usize,
    retry_delay: Duration,
    is_failing: bool,
}

/// The outcome of delivering a batch.
enum DeliveryOutcome {
    Accepted,
    Refused,
    Failed(String),
}

impl Relay {
    /// A relay for each receiver.
    pub(super) fn for_receivers(
        receivers: Receivers,
        queue: &Arc<AppendQueue>,
        state: &Arc<OutboxState>,
        running: &TaskTracker,
    ) -> Vec<Relay> {
        let usage = receivers.analytics.map(|receiver| {
            (EventKind::Usage, ReceiverClient::Usage(receiver.client), receiver.is_own_process)
        });
        let occurrences = receivers.errors.map(|receiver| {
            (
                EventKind::Occurrence,
                ReceiverClient::Occurrence(receiver.client),
                receiver.is_own_process,
            )
        });
        let relay = |(kind, client, is_own_process)| Relay {
            kind,
            client,
            is_own_process,
            queue: Arc::clone(queue),
            state: Arc::clone(state),
            _running: running.token(),
            batch_size: BATCH_SIZE,
            retry_delay: MIN_RETRY_DELAY,
            is_failing: false,
        };
        usage.into_iter().chain(occurrences).map(relay).collect()
    }

    pub(super) async fn run(mut self, end: CancellationToken) {
        let flush_timeout = if self.is_own_process { Duration::ZERO } else { FLUSH_TIMEOUT };
        tokio::select! {
            () = self.relay(&end) => {}
            () = flush_ended(&end, flush_timeout) => {}
        }
    }

    /// Delivers events until `end`, and then the remaining ones, with one attempt.
    async fn relay(&mut self, end: &CancellationToken) {
        loop {
            let delivered = match self.next().await {
                Ok(batch) if batch.bodies.is_empty() => {
                    if end.is_cancelled() {
                        return;
                    }
                    self.wait_for_events(end).await;
                    continue;
                }
                Ok(batch) => {
                    let is_partial = batch.bodies.len() < self.batch_size;
                    let delivered = self.deliver(batch).await;
                    if is_partial && delivered.is_ok() {
                        wait_for_batch(end).await;
                    }
                    delivered
                }
                Err(error) => Err(error),
            };
            self.record_result(delivered.as_ref().err());
            if delivered.is_err() {
                if end.is_cancelled() {
                    return;
                }
                let delay = self.retry_delay.mul_f64(0.5 + rand::random::<f64>() / 2.0);
                self.retry_delay = (self.retry_delay * 2).min(MAX_RETRY_DELAY);
                tokio::select! {
                    () = sleep(delay) => {}
                    // The last attempt follows.
                    () = end.cancelled() => {}
                }
            }
        }
    }

    /// The next batch; an empty one if no event is stored.
    async fn next(&self) -> Result<EventBatch, String> {
        if self.state.depth(self.kind) == 0 {
            return Ok(EventBatch::default());
        }
        let (events, batch) = oneshot::channel();
        self.queue.request(RelayRequest::Next { kind: self.kind, max: self.batch_size, events });
        let batch = batch.await.map_err(|_| "the outbox has ended".to_owned())?;
        batch.map_err(|error| format!("the outbox can't be read: {error}"))
    }

    /// Waits for an event, and then for a batch.
    async fn wait_for_events(&self, end: &CancellationToken) {
        tokio::select! {
            () = self.state.more[self.kind as usize].notified() => {}
            () = end.cancelled() => return,
        }
        wait_for_batch(end).await;
    }

    async fn deliver(&mut self, batch: EventBatch) -> Result<(), String> {
        let response = timeout(DELIVERY_TIMEOUT, self.client.send(&batch.bodies)).await;
        let outcome = match response {
            Ok(Ok(())) => DeliveryOutcome::Accepted,
            Ok(Err(status)) if is_refusal(&status) => DeliveryOutcome::Refused,
            Ok(Err(status)) => DeliveryOutcome::Failed(status.to_string()),
            Err(_) => DeliveryOutcome::Failed("no answer".to_owned()),
        };
        let count = batch.bodies.len();
        match outcome {
            DeliveryOutcome::Accepted => {
                self.queue.request(RelayRequest::Consume(batch.end));
                metrics::counter!("hapa_outbox_relayed_total", "kind" => self.kind.label())
                    .increment(count as u64);
                self.batch_size = (self.batch_size * 2).min(BATCH_SIZE);
                self.retry_delay = MIN_RETRY_DELAY;
                Ok(())
            }
            DeliveryOutcome::Refused if count > 1 => {
                self.batch_size = count / 2;
                Ok(())
            }
            DeliveryOutcome::Refused => {
                self.queue.request(RelayRequest::Consume(batch.end));
                self.state.record_drop(self.kind, DropReason::Refused, count as u64);
                Ok(())
            }
            DeliveryOutcome::Failed(error) => Err(error),
        }
    }

    /// Logs when deliveries start to fail and when they succeed again.
    fn record_result(&mut self, error: Option<&String>) {
        let kind = self.kind.label();
        match error {
            Some(error) if !self.is_failing => {
                tracing::warn!(kind, error, "events can't be delivered; the relay retries");
            }
            None if self.is_failing => tracing::info!(kind, "events are delivered again"),
            _ => {}
        }
        self.is_failing = error.is_some();
    }
}

/// Waits for further events, because a batch costs its receiver little more than one event.
async fn wait_for_batch(end: &CancellationToken) {
    tokio::select! {
        () = sleep(BATCH_DELAY) => {}
        () = end.cancelled() => {}
    }
}

impl ReceiverClient {
    async fn send(&mut self, events: &[Vec<u8>]) -> Result<(), Status> {
        match self {
            ReceiverClient::Usage(client) => {
                let request = RecordEventsRequest { events: decode(events)? };
                client.record_events(with_timeout(request)).await.map(drop)
            }
            ReceiverClient::Occurrence(client) => {
                let request = ReportOccurrencesRequest { occurrences: decode(events)? };
                client.report_occurrences(with_timeout(request)).await.map(drop)
            }
        }
    }
}

fn with_timeout<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(DELIVERY_TIMEOUT);
    request
}

/// Decodes events. One that can't be decoded counts as refused.
fn decode<M: Message + Default>(events: &[Vec<u8>]) -> Result<Vec<M>, Status> {
    let messages = events.iter().map(|event| M::decode(event.as_slice()));
    let messages: Result<_, _> = messages.collect();
    messages.map_err(|error| Status::invalid_argument(error.to_string()))
}

/// Whether a receiver would refuse the same batch again.
fn is_refusal(status: &Status) -> bool {
    let too_large = ErrorCode::TooLarge.entry().name;
    status.code() == Code::InvalidArgument
        || published_code(status).is_some_and(|(code, _)| code == too_large)
}

async fn flush_ended(end: &CancellationToken, timeout: Duration) {
    end.cancelled().await;
    sleep_until(Instant::now() + timeout).await;
}
