//! The engines behind the mesh as one: a request goes to the engine that suits it best, and to
//! another where that one fails before its first token.
//!
//! Kept true: no token is asked for twice once one has come; no request waits for a look at an engine
//! but the first of a process; what an attempt took is given back by its drop.

mod board;
mod breaker;
pub mod choose;
mod open;
mod replica;
mod retry;
mod scrape;
mod source;
#[cfg(test)]
mod tests;
mod watch;

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use futures_util::future::join_all;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use self::replica::Replica;
use self::retry::Budget;
use crate::engine::EngineAccess;

pub(crate) use self::board::{Board, Listed};
pub(crate) use self::open::{Error, Opened, Request};
pub(crate) use self::source::Source;

/// How long the first requests of a process wait for the first look.
const FIRST_LOOK: Duration = Duration::from_secs(3);
/// Engines that metrics have names for, over the life of a process.
const MOST_LABELS: usize = 256;
/// The name of all further ones.
const OTHER: &str = "other";

/// How long to wait for what.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    /// For the first token of one engine, where another may be asked.
    pub(crate) attempt: Duration,
    /// An engine that runs requests and makes no token for so long is stuck.
    pub(crate) stuck: Duration,
}

/// All engines.
#[derive(Clone)]
pub(crate) struct Fleet(Arc<Inner>);

struct Inner {
    sources: Vec<Source>,
    access: EngineAccess,
    bounds: Bounds,
    board: RwLock<Arc<Board>>,
    /// Held while the board is made anew, so that the latest wins.
    making: Mutex<()>,
    /// Names of engines that metrics have.
    labels: Mutex<HashSet<Arc<str>>>,
    budget: Budget,
    /// Fires when the names were looked up once.
    resolved: CancellationToken,
    looked: AtomicBool,
    /// When the latest look at all began.
    refreshed: tokio::sync::Mutex<Option<Instant>>,
    /// Replicas have come.
    joined: Notify,
    /// Looks have found what the board has not yet.
    stale: AtomicBool,
}

impl Fleet {
    pub(crate) fn new(
        sources: Vec<Source>,
        access: EngineAccess,
        bounds: Bounds,
    ) -> anyhow::Result<Fleet> {
        let fleet = Fleet(Arc::new(Inner {
            sources,
            access,
            bounds,
            board: RwLock::default(),
            making: Mutex::default(),
            labels: Mutex::default(),
            budget: Budget::new(),
            resolved: CancellationToken::new(),
            looked: AtomicBool::new(false),
            refreshed: tokio::sync::Mutex::default(),
            joined: Notify::new(),
            stale: AtomicBool::new(false),
        }));
        let mut replicas = Vec::new();
        for source in &fleet.0.sources {
            // Made of names too: what can't be used is said at the start.
            let engine = source.engine(None, &fleet.0.access)?;
            if !source.by_name {
                replicas.push(fleet.replica(source.name(None), engine));
            }
        }
        fleet.set(replicas);
        if fleet.0.sources.iter().all(|source| !source.by_name) {
            fleet.0.resolved.cancel();
        }
        Ok(fleet)
    }

    /// What is known now; at a process's start, once anything is.
    pub(crate) async fn board(&self) -> Arc<Board> {
        if !self.0.looked.load(Ordering::Acquire) {
            let first = async {
                self.0.resolved.cancelled().await;
                self.refresh().await;
            };
            // Without an answer a request says more than a wait.
            let _ = timeout(FIRST_LOOK, first).await;
        }
        self.known()
    }

    /// Looks at all engines, at once and bounded; those who ask meanwhile share one look.
    pub(crate) async fn refresh(&self) {
        let asked = Instant::now();
        let mut refreshed = self.0.refreshed.lock().await;
        if refreshed.is_some_and(|began| began >= asked) {
            return;
        }
        let began = Instant::now();
        let replicas = self.known().replicas.clone();
        let looks = replicas.iter().map(|replica| replica.look(self.0.bounds.stuck));
        join_all(looks).await;
        self.publish();
        *refreshed = Some(began);
    }

    /// What is known now.
    pub(crate) fn known(&self) -> Arc<Board> {
        Arc::clone(&self.0.board.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn replica(&self, name: String, engine: crate::engine::Engine) -> Arc<Replica> {
        let mut labels = self.0.labels.lock().unwrap_or_else(PoisonError::into_inner);
        let label: Arc<str> = match labels.get(name.as_str()) {
            Some(known) => Arc::clone(known),
            None if labels.len() < MOST_LABELS => Arc::from(name.as_str()),
            None => Arc::from(OTHER),
        };
        labels.insert(Arc::clone(&label));
        Arc::new(Replica::new(name, label, engine))
    }

    /// These are the engines from now on. What others are asked already goes on.
    fn set(&self, replicas: Vec<Arc<Replica>>) {
        let before = self.known();
        let stays = |old: &Replica| replicas.iter().any(|new| new.id == old.id);
        for gone in before.replicas.iter().filter(|old| !stays(old)) {
            tracing::info!(engine = gone.name, "an engine has gone");
            gone.leave();
        }
        self.remake(Some(replicas));
        self.0.joined.notify_one();
    }

    /// Makes the board of what is known now.
    fn publish(&self) {
        self.remake(None);
    }

    fn remake(&self, replicas: Option<Vec<Arc<Replica>>>) {
        let _making = self.0.making.lock().unwrap_or_else(PoisonError::into_inner);
        let replicas = replicas.unwrap_or_else(|| self.known().replicas.clone());
        let looked = replicas.iter().any(|replica| replica.was_looked_at());
        let board = Arc::new(Board::of(replicas));
        *self.0.board.write().unwrap_or_else(PoisonError::into_inner) = board;
        if looked {
            self.0.looked.store(true, Ordering::Release);
        }
    }
}
