//! The writer: the one thread that reads and writes the files of the outbox. It writes all waiting events together and
//! acknowledges each call. It also enforces the limits, and ends last, after the relays.
//!
//! It is no task of the runtime, because a disk that hangs blocks it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::append_queue::{AppendQueue, RelayRequest, Work};
use super::config::OutboxLimits;
use super::priority::{EventKind, Priority};
use super::state::{DropReason, OutboxState, now_ms};
use super::store::OutboxStore;

const MAINTENANCE_INTERVAL: Duration = Duration::from_secs(1);

pub(super) struct OutboxWriter {
    store: OutboxStore,
    state: Arc<OutboxState>,
    limits: OutboxLimits,
    queue: Arc<AppendQueue>,
    /// The last write failed.
    is_failing: bool,
    /// The last search for events to drop failed.
    is_unreadable: bool,
}

/// Closes the queue of a writer whose task is dropped.
struct CloseOnDrop(Arc<AppendQueue>);

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// Releases the waiting calls of a thread that ends.
struct AbandonOnDrop(Arc<AppendQueue>);

impl Drop for AbandonOnDrop {
    fn drop(&mut self) {
        self.0.abandon();
    }
}

impl OutboxWriter {
    pub(super) fn new(
        store: OutboxStore,
        state: Arc<OutboxState>,
        limits: OutboxLimits,
        queue: Arc<AppendQueue>,
    ) -> Self {
        let (is_failing, is_unreadable) = (false, false);
        let writer = OutboxWriter { store, state, limits, queue, is_failing, is_unreadable };
        writer.publish_depth();
        writer
    }

    /// Starts the thread, and ends it after `end` and after the relays.
    pub(super) async fn run(self, running_relays: TaskTracker, end: CancellationToken) {
        let (queue, (running, ended)) = (Arc::clone(&self.queue), oneshot::channel::<()>());
        let _close = CloseOnDrop(Arc::clone(&queue));
        let thread = thread::Builder::new().name("outbox-writer".to_owned());
        let started = thread.spawn(move || {
            self.serve();
            drop(running);
        });
        if let Err(error) = started {
            tracing::error!(%error, "E5010: the outbox has no thread, and events are dropped");
            return;
        }
        let shutdown = async {
            end.cancelled().await;
            running_relays.wait().await;
            queue.linger().await;
            queue.close();
            // The thread drops the sender.
            let _ = ended.await;
        };
        tokio::select! {
            () = shutdown => {}
            () = queue.expire_acks() => {}
        }
    }

    fn serve(mut self) {
        let queue = Arc::clone(&self.queue);
        let _abandon = AbandonOnDrop(Arc::clone(&queue));
        let (mut work, mut maintain_at) = (Work::default(), Instant::now());
        while queue.wait(&mut work, maintain_at) {
            self.write(&work);
            for request in work.requests.drain(..) {
                self.answer(request);
            }
            work.clear();
            if Instant::now() >= maintain_at {
                self.maintain();
                maintain_at = Instant::now() + MAINTENANCE_INTERVAL;
            }
        }
        self.publish_gauges();
    }

    fn write(&mut self, work: &Work) {
        if work.event_counts == [0; 3] {
            return;
        }
        let mut written = Ok(());
        for priority in Priority::ALL {
            let records = &work.records[priority as usize];
            let event_count = work.event_counts[priority as usize];
            if event_count == 0 {
                continue;
            }
            if let Err(error) = self.store.append(priority, records, event_count) {
                self.state.record_drop(priority.kind(), DropReason::Disk, event_count);
                written = Err(error);
            }
        }
        let is_written = self.record_written(&written);
        self.publish_depth();
        self.queue.complete(is_written);
        for kind in EventKind::ALL {
            let has_events = |priority: &Priority| work.event_counts[*priority as usize] > 0;
            if kind.priorities().iter().any(has_events) {
                self.state.more[kind as usize].notify_one();
            }
        }
        self.enforce_max_events();
    }

    fn answer(&mut self, request: RelayRequest) {
        match request {
            RelayRequest::Next { kind, max, events } => {
                let batch = self.store.next(kind, max);
                self.publish_depth();
                // It fails if the relay has ended.
                let _ = events.send(batch);
            }
            RelayRequest::Consume(end) => {
                self.store.advance(&end);
                self.publish_depth();
            }
        }
    }

    /// Evicts events beyond the maximum: lowest priority first, oldest first.
    fn enforce_max_events(&mut self) {
        for priority in Priority::ALL {
            let depth = self.store.depth();
            let excess = depth.iter().sum::<u64>().saturating_sub(self.limits.max_events);
            let count = excess.min(depth[priority as usize]);
            if count > 0 {
                let evicted = self.store.evict(priority, count);
                self.record_dropped(priority, DropReason::FileFull, evicted);
            }
        }
    }

    /// Runs periodic work: maximum age, maximum number, gauges.
    fn maintain(&mut self) {
        if self.is_failing {
            let recovered = self.store.probe();
            if !self.record_written(&recovered) {
                return;
            }
        }
        let max_age = u64::try_from(self.limits.max_age.as_millis()).unwrap_or(u64::MAX);
        let before = now_ms().saturating_sub(max_age);
        for priority in Priority::ALL {
            if self.store.depth()[priority as usize] > 0 {
                let expired = self.store.expire(priority, before);
                self.record_dropped(priority, DropReason::TooOld, expired);
            }
        }
        self.enforce_max_events();
        self.publish_gauges();
    }

    fn record_dropped(&mut self, priority: Priority, reason: DropReason, count: io::Result<u64>) {
        match count {
            Ok(count) => {
                self.is_unreadable = false;
                self.state.record_drop(priority.kind(), reason, count);
                self.publish_depth();
            }
            Err(error) if !std::mem::replace(&mut self.is_unreadable, true) => {
                tracing::error!(%error, "E5010: the outbox can't be read; check the disk of DATA_DIR");
            }
            Err(_) => {}
        }
    }

    /// Publishes the number of stored events to the handles.
    fn publish_depth(&self) {
        for (published, depth) in self.state.depth.iter().zip(self.store.depth()) {
            published.store(depth, Ordering::Relaxed);
        }
    }

    fn publish_gauges(&mut self) {
        let oldest = self.store.oldest();
        let age = oldest.map_or(0, |at| now_ms().saturating_sub(at));
        metrics::gauge!("hapa_outbox_age_seconds").set(Duration::from_millis(age).as_secs_f64());
        for kind in EventKind::ALL {
            let depth = u32::try_from(self.state.depth(kind)).unwrap_or(u32::MAX);
            metrics::gauge!("hapa_outbox_depth", "kind" => kind.label()).set(depth);
        }
    }

    /// Records whether a write succeeded, and logs when that changes. Returns whether it did.
    fn record_written(&mut self, result: &io::Result<()>) -> bool {
        match result {
            Err(error) if !self.is_failing => {
                tracing::error!(%error, "E5010: the outbox can't be written to; check the disk of DATA_DIR");
            }
            Ok(()) if self.is_failing => tracing::info!("the outbox can be written again"),
            _ => {}
        }
        self.is_failing = result.is_err();
        self.state.is_unwritable.store(self.is_failing, Ordering::Relaxed);
        result.is_ok()
    }
}
