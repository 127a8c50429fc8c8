//! Batches that come at once are taken in together: one transaction for all that wait, so that the
//! sums which they share are touched once, and none waits for a row that another one of this process
//! has locked. A batch is answered when the transaction that it is in has been committed.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use hapa_store::database::Engine;
use tokio::sync::{Semaphore, oneshot};

use crate::error::Error;
use crate::event::Event;
use crate::store::Store;

/// Events of a transaction; a batch has at most a quarter of it.
const MOST_EVENTS: usize = 4_000;
/// Batches that wait: more would be what a store owes that doesn't answer.
const MOST_WAITING: usize = 64;

/// See the module.
#[derive(Debug)]
pub(super) struct Line {
    waiting: Mutex<VecDeque<Waiting>>,
    /// Of transactions.
    turns: Semaphore,
}

/// A batch that waits.
#[derive(Debug)]
pub(super) struct Waiting {
    /// Sorted by id.
    pub(super) events: Vec<Event>,
    /// When it came.
    pub(super) now: i64,
    answer: oneshot::Sender<Result<u32, Error>>,
}

impl Line {
    pub(super) fn new(engine: Engine) -> Self {
        let turns = match engine {
            Engine::Sqlite => 1,
            // One is prepared and sent while the other is at the disk.
            Engine::Postgres => 2,
        };
        Line { waiting: Mutex::default(), turns: Semaphore::new(turns) }
    }

    fn join(&self, batch: Waiting) -> Result<(), Error> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.len() >= MOST_WAITING {
            return Err(Error::Store(sqlx::Error::PoolTimedOut));
        }
        waiting.push_back(batch);
        Ok(())
    }

    /// The first that wait, as many as go together.
    fn take(&self) -> Vec<Waiting> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let mut events = 0;
        let fits = |batch: &&Waiting| {
            events += batch.events.len();
            events <= MOST_EVENTS
        };
        let count = waiting.iter().take_while(fits).count();
        waiting.drain(..count).collect()
    }
}

impl Store {
    /// Stores a batch, together with those that wait beside it; how many of its events were new.
    pub(super) async fn stand_in_line(&self, events: Vec<Event>, now: i64) -> Result<u32, Error> {
        let (answer, answered) = oneshot::channel();
        self.line.join(Waiting { events, now, answer })?;
        // Each batch comes with a task, and each task takes a batch at least while any waits. So
        // none is left over, also where the callers of some are gone.
        let store = self.clone();
        drop(self.db.detach(async move { store.take_turn().await }));
        // Without an answer the process ends.
        answered.await.unwrap_or(Err(Error::Store(sqlx::Error::PoolClosed)))
    }

    async fn take_turn(&self) {
        let Ok(_turn) = self.line.turns.acquire().await else { return };
        let batches = self.line.take();
        let mut answers = Vec::with_capacity(batches.len());
        let (mut now, mut together) = (i64::MIN, Vec::new());
        for (whose, batch) in batches.into_iter().enumerate() {
            now = now.max(batch.now);
            together.extend(batch.events.into_iter().map(|event| (event, whose)));
            answers.push(batch.answer);
        }
        if answers.is_empty() {
            return;
        }
        let counts = self.take_in(together, answers.len(), now).await.map_err(Arc::new);
        // Who is gone hears nothing.
        for (whose, answer) in answers.into_iter().enumerate() {
            let told = match &counts {
                Ok(counts) => Ok(counts.get(whose).copied().unwrap_or_default()),
                Err(error) => Err(Error::Together(Arc::clone(error))),
            };
            drop(answer.send(told));
        }
    }
}
