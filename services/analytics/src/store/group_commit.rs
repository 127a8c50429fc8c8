//! Group commit: one transaction writes all queued batches. It updates aggregates that they share
//! once, and no batch waits for a row lock of another batch in this process. A batch is
//! acknowledged after the commit of its transaction.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use hapa_store::database::Engine;
use tokio::sync::{Semaphore, oneshot};

use crate::error::Error;
use crate::event::CallEvent;
use crate::store::Store;

/// Most events in one transaction. A batch has at most a quarter of it.
const MAX_EVENTS_PER_COMMIT: usize = 4_000;
/// Most queued batches. The bound limits the memory that a stalled store can claim.
const QUEUE_CAPACITY: usize = 64;

/// The queue of batches, and the permits for concurrent transactions.
#[derive(Debug)]
pub(super) struct GroupCommit {
    queue: Mutex<VecDeque<QueuedBatch>>,
    commit_permits: Semaphore,
}

/// A batch in the queue.
#[derive(Debug)]
pub(super) struct QueuedBatch {
    /// Sorted by id.
    pub(super) events: Vec<CallEvent>,
    /// The time of its arrival.
    pub(super) now: i64,
    reply_sender: oneshot::Sender<Result<u32, Error>>,
}

impl GroupCommit {
    pub(super) fn new(engine: Engine) -> Self {
        let commit_permits = match engine {
            Engine::Sqlite => 1,
            // One transaction is prepared and sent while the other one is flushed to disk.
            Engine::Postgres => 2,
        };
        GroupCommit { queue: Mutex::default(), commit_permits: Semaphore::new(commit_permits) }
    }

    fn push(&self, batch: QueuedBatch) -> Result<(), Error> {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        if queue.len() >= QUEUE_CAPACITY {
            return Err(Error::Store(sqlx::Error::PoolTimedOut));
        }
        queue.push_back(batch);
        Ok(())
    }

    /// Removes the oldest batches that fit into one transaction.
    fn drain_next(&self) -> Vec<QueuedBatch> {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let mut events = 0;
        let fits = |batch: &&QueuedBatch| {
            events += batch.events.len();
            events <= MAX_EVENTS_PER_COMMIT
        };
        let count = queue.iter().take_while(fits).count();
        queue.drain(..count).collect()
    }
}

impl Store {
    /// Stores a batch in a group commit and waits for it. Returns how many of its events were new.
    pub(super) async fn enqueue(&self, events: Vec<CallEvent>, now: i64) -> Result<u32, Error> {
        let (reply_sender, reply) = oneshot::channel();
        self.group_commit.push(QueuedBatch { events, now, reply_sender })?;
        // Each batch starts a task, and each task commits at least one batch while any is queued.
        // So no batch is left over, even if its caller has disconnected.
        let store = self.clone();
        drop(self.db.detach(async move { store.flush_next().await }));
        // The sender is dropped only when the process shuts down.
        reply.await.unwrap_or(Err(Error::Store(sqlx::Error::PoolClosed)))
    }

    async fn flush_next(&self) {
        let Ok(_permit) = self.group_commit.commit_permits.acquire().await else { return };
        let batches = self.group_commit.drain_next();
        let mut reply_senders = Vec::with_capacity(batches.len());
        let (mut now, mut events) = (i64::MIN, Vec::new());
        for (index, batch) in batches.into_iter().enumerate() {
            now = now.max(batch.now);
            events.extend(batch.events.into_iter().map(|event| (event, index)));
            reply_senders.push(batch.reply_sender);
        }
        if reply_senders.is_empty() {
            return;
        }
        let counts = self.insert_batches(events, reply_senders.len(), now).await.map_err(Arc::new);
        for (index, reply_sender) in reply_senders.into_iter().enumerate() {
            let result = match &counts {
                Ok(counts) => Ok(counts.get(index).copied().unwrap_or_default()),
                Err(error) => Err(Error::SharedTransaction(Arc::clone(error))),
            };
            // The caller may have disconnected.
            drop(reply_sender.send(result));
        }
    }
}
