//! The one task that writes the spool: whatever waits is written together, and each caller is told.
//! It also keeps the bounds, and ends last, when nothing can come any more.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use sqlx::Error;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;

use super::store::{Span, Store, TOGETHER};
use super::{Append, Bounds, DISK, Kind, Rank, State, now_ms};

/// Calls whose events are written together; each has two at most.
const CALLS: usize = TOGETHER / 2;
const TICK: Duration = Duration::from_secs(1);
/// After the end, for calls that were dropped with their connections.
const LINGER: Duration = Duration::from_millis(100);

/// What a shipper wants to be removed, and whom to tell that it is.
pub(super) type Delete = (Vec<Span>, oneshot::Sender<()>);

pub(super) struct Writer {
    store: Store,
    state: Arc<State>,
    bounds: Bounds,
    appends: mpsc::Receiver<Append>,
    /// Ends with the shippers.
    deletes: mpsc::Receiver<Delete>,
    failing: bool,
}

impl Writer {
    pub(super) fn new(
        store: Store,
        state: Arc<State>,
        bounds: Bounds,
        (appends, deletes): (mpsc::Receiver<Append>, mpsc::Receiver<Delete>),
    ) -> Self {
        let writer = Writer { store, state, bounds, appends, deletes, failing: false };
        writer.show();
        writer
    }

    pub(super) async fn run(mut self, end: CancellationToken) {
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut batch, mut shipping, mut appending) = (Vec::with_capacity(CALLS), true, true);
        while shipping || !end.is_cancelled() {
            tokio::select! {
                received = self.appends.recv_many(&mut batch, CALLS), if appending => {
                    appending = received > 0;
                    self.write(&mut batch).await;
                }
                delete = self.deletes.recv(), if shipping => match delete {
                    Some(delete) => self.delete(delete).await,
                    None => shipping = false,
                },
                _ = tick.tick() => self.tend().await,
                () = end.cancelled(), if !shipping => {}
            }
        }
        while let Ok(1..) = timeout(LINGER, self.appends.recv_many(&mut batch, CALLS)).await {
            self.write(&mut batch).await;
        }
        self.store.close().await;
    }

    async fn write(&mut self, batch: &mut Vec<Append>) {
        let (mut items, mut waiting) = (Vec::with_capacity(TOGETHER), Vec::new());
        for append in batch.drain(..) {
            items.extend(append.items);
            waiting.extend(append.written);
        }
        if items.is_empty() {
            return;
        }
        let written = self.store.insert(&items).await;
        if !self.went("written to", &written) {
            for item in &items {
                self.state.dropped(item.rank.kind(), DISK, 1);
            }
            return;
        }
        for written in waiting {
            // Nobody waits any more where this fails.
            let _ = written.send(());
        }
        self.show();
        for kind in Kind::ALL {
            if items.iter().any(|item| item.rank.kind() == kind) {
                self.state.more[kind as usize].notify_one();
            }
        }
        self.keep_size().await;
    }

    async fn delete(&mut self, (spans, deleted): Delete) {
        for span in spans {
            let done = self.store.delete(span).await;
            if !self.went("removed from", &done) {
                return; // the shipper sees that nobody tells it
            }
        }
        self.show();
        let _ = deleted.send(());
    }

    /// Least worth keeping first, oldest first.
    async fn keep_size(&mut self) {
        for rank in Rank::ALL {
            let over = self.store.depth.iter().sum::<u64>().saturating_sub(self.bounds.most);
            let count = over.min(self.store.depth[rank as usize]);
            if count > 0 {
                let gone = self.store.evict(rank, count).await;
                if self.went("removed from", &gone) {
                    self.state.dropped(rank.kind(), "full", gone.unwrap_or_default());
                    self.show();
                }
            }
        }
    }

    /// What is done now and then: age, the log's size, the gauges.
    async fn tend(&mut self) {
        if self.failing {
            let written = self.store.recover().await;
            if !self.went("written to", &written) {
                return;
            }
        }
        let oldest = u64::try_from(self.bounds.oldest.as_millis()).unwrap_or(u64::MAX);
        let before = now_ms().saturating_sub(oldest);
        for rank in Rank::ALL {
            if self.store.depth[rank as usize] > 0 {
                let gone = self.store.expire(rank, before).await;
                if self.went("removed from", &gone) {
                    self.state.dropped(rank.kind(), "old", gone.unwrap_or_default());
                }
            }
        }
        if self.state.heavy.swap(false, Ordering::Relaxed) {
            let folded = self.store.fold().await;
            self.went("folded in", &folded);
        }
        let oldest = self.store.oldest().await.ok().flatten();
        let age = oldest.map_or(0, |at| now_ms().saturating_sub(at));
        metrics::gauge!("hapa_spool_age_seconds").set(Duration::from_millis(age).as_secs_f64());
        self.show();
    }

    /// The depth, as others see it.
    fn show(&self) {
        for (shown, depth) in self.state.depth.iter().zip(self.store.depth) {
            shown.store(depth, Ordering::Relaxed);
        }
        for kind in Kind::ALL {
            let depth = u32::try_from(self.state.depth(kind)).unwrap_or(u32::MAX);
            metrics::gauge!("hapa_spool_depth", "kind" => kind.name()).set(depth);
        }
    }

    /// Whether it worked; says so once when that changes.
    fn went<T>(&mut self, what: &str, done: &Result<T, Error>) -> bool {
        match done {
            Err(error) if !self.failing => {
                tracing::error!(%error, "E5010: the event spool can't be {what}");
            }
            Ok(_) if self.failing => tracing::info!("the event spool works again"),
            _ => {}
        }
        self.failing = done.is_err();
        self.state.unwritable.store(self.failing, Ordering::Relaxed);
        done.is_ok()
    }
}
