//! The writer: the one task that writes the outbox file. It writes all waiting events together and acknowledges each
//! call. It also enforces the limits, and ends last, after the relays.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use sqlx::Error;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;

use super::config::OutboxLimits;
use super::encoded_event::{EncodedEvent, EventKind, Priority};
use super::state::{DropReason, OutboxState, now_ms};
use super::store::{IdRange, MAX_INSERT_ROWS, OutboxStore};

/// Maximum number of calls with events that are written together. A call has two events, rarely more.
const BATCH_SIZE: usize = MAX_INSERT_ROWS / 2;
const MAINTENANCE_INTERVAL: Duration = Duration::from_secs(1);
/// How long the writer waits at the end for the events of calls that were dropped with their connections.
const LINGER_TIMEOUT: Duration = Duration::from_millis(100);

/// Asks the writer to store the events of one call.
#[derive(Debug)]
pub(super) struct AppendRequest {
    pub(super) events: Vec<EncodedEvent>,
    /// Completed when they are stored. `None`: nothing waits for them.
    pub(super) written: Option<oneshot::Sender<()>>,
}

/// Asks the writer to delete delivered events.
pub(super) struct DeleteRequest {
    pub(super) ranges: Vec<IdRange>,
    /// Completed when they are deleted; dropped if that fails.
    pub(super) deleted: oneshot::Sender<()>,
}

pub(super) struct OutboxWriter {
    store: OutboxStore,
    state: Arc<OutboxState>,
    limits: OutboxLimits,
    appends: mpsc::Receiver<AppendRequest>,
    /// Closed when the relays have ended.
    deletes: mpsc::Receiver<DeleteRequest>,
    is_failing: bool,
}

impl OutboxWriter {
    pub(super) fn new(
        store: OutboxStore,
        state: Arc<OutboxState>,
        limits: OutboxLimits,
        (appends, deletes): (mpsc::Receiver<AppendRequest>, mpsc::Receiver<DeleteRequest>),
    ) -> Self {
        let writer = OutboxWriter { store, state, limits, appends, deletes, is_failing: false };
        writer.publish_depth();
        writer
    }

    pub(super) async fn run(mut self, end: CancellationToken) {
        let mut tick = interval(MAINTENANCE_INTERVAL);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut batch = Vec::with_capacity(BATCH_SIZE);
        let (mut has_relays, mut has_appenders) = (true, true);
        while has_relays || !end.is_cancelled() {
            tokio::select! {
                received = self.appends.recv_many(&mut batch, BATCH_SIZE), if has_appenders => {
                    has_appenders = received > 0;
                    self.write(&mut batch).await;
                }
                delete = self.deletes.recv(), if has_relays => match delete {
                    Some(delete) => self.delete(delete).await,
                    None => has_relays = false,
                },
                _ = tick.tick() => self.maintain().await,
                () = end.cancelled(), if !has_relays => {}
            }
        }
        while let Ok(1..) =
            timeout(LINGER_TIMEOUT, self.appends.recv_many(&mut batch, BATCH_SIZE)).await
        {
            self.write(&mut batch).await;
        }
        self.store.close().await;
    }

    async fn write(&mut self, batch: &mut Vec<AppendRequest>) {
        let (mut events, mut waiting) = (Vec::with_capacity(MAX_INSERT_ROWS), Vec::new());
        for append in batch.drain(..) {
            events.extend(append.events);
            waiting.extend(append.written);
        }
        if events.is_empty() {
            return;
        }
        let inserted = self.store.insert(&events).await;
        if !self.record_result("written to", &inserted) {
            for event in &events {
                self.state.record_drop(event.priority.kind(), DropReason::Disk, 1);
            }
            return;
        }
        for written in waiting {
            // It fails if the call has stopped waiting.
            let _ = written.send(());
        }
        self.publish_depth();
        for kind in EventKind::ALL {
            if events.iter().any(|event| event.priority.kind() == kind) {
                self.state.more[kind as usize].notify_one();
            }
        }
        self.enforce_max_events().await;
    }

    async fn delete(&mut self, DeleteRequest { ranges, deleted }: DeleteRequest) {
        for range in ranges {
            let result = self.store.delete(range).await;
            if !self.record_result("deleted from", &result) {
                return; // dropping `deleted` reports the failure to the relay
            }
        }
        self.publish_depth();
        let _ = deleted.send(());
    }

    /// Evicts events beyond the maximum: lowest priority first, oldest first.
    async fn enforce_max_events(&mut self) {
        for priority in Priority::ALL {
            let total = self.store.depth.iter().sum::<u64>();
            let excess = total.saturating_sub(self.limits.max_events);
            let count = excess.min(self.store.depth[priority as usize]);
            if count > 0 {
                let evicted = self.store.evict(priority, count).await;
                if self.record_result("deleted from", &evicted) {
                    let count = evicted.unwrap_or_default();
                    self.state.record_drop(priority.kind(), DropReason::FileFull, count);
                    self.publish_depth();
                }
            }
        }
    }

    /// Runs periodic work: maximum age, checkpoint, gauges.
    async fn maintain(&mut self) {
        if self.is_failing {
            let recovered = self.store.recover().await;
            if !self.record_result("written to", &recovered) {
                return;
            }
        }
        let max_age = u64::try_from(self.limits.max_age.as_millis()).unwrap_or(u64::MAX);
        let before = now_ms().saturating_sub(max_age);
        for priority in Priority::ALL {
            if self.store.depth[priority as usize] > 0 {
                let expired = self.store.expire(priority, before).await;
                if self.record_result("deleted from", &expired) {
                    let count = expired.unwrap_or_default();
                    self.state.record_drop(priority.kind(), DropReason::TooOld, count);
                }
            }
        }
        if self.state.needs_checkpoint.swap(false, Ordering::Relaxed) {
            let result = self.store.checkpoint().await;
            self.record_result("checkpointed", &result);
        }
        let oldest = self.store.oldest().await.ok().flatten();
        let age = oldest.map_or(0, |at| now_ms().saturating_sub(at));
        metrics::gauge!("hapa_outbox_age_seconds").set(Duration::from_millis(age).as_secs_f64());
        self.publish_depth();
    }

    /// Publishes the number of stored events to the handles and to metrics.
    fn publish_depth(&self) {
        for (published, depth) in self.state.depth.iter().zip(self.store.depth) {
            published.store(depth, Ordering::Relaxed);
        }
        for kind in EventKind::ALL {
            let depth = u32::try_from(self.state.depth(kind)).unwrap_or(u32::MAX);
            metrics::gauge!("hapa_outbox_depth", "kind" => kind.label()).set(depth);
        }
    }

    /// Records whether an operation on the file succeeded, and logs when that changes. Returns whether it did.
    fn record_result<T>(&mut self, operation: &str, result: &Result<T, Error>) -> bool {
        match result {
            Err(error) if !self.is_failing => {
                tracing::error!(%error, "E5010: the outbox can't be {operation}; check the disk of DATA_DIR");
            }
            Ok(_) if self.is_failing => tracing::info!("the outbox can be written again"),
            _ => {}
        }
        self.is_failing = result.is_err();
        self.state.is_unwritable.store(self.is_failing, Ordering::Relaxed);
        result.is_ok()
    }
}
