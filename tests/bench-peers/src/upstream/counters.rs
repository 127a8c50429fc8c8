//! Counters of the simulator. A request counts as in flight from its head to its last byte or its drop.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use crate::process::now;

const MAX_ABORTS: usize = 200_000;

#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) in_flight: AtomicU64,
    /// Streams of an earlier epoch end at their next token.
    pub(crate) epoch: AtomicU64,
    aborts: Mutex<Vec<(u64, u64)>>,
}

/// The counters as the simulator reports them.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct UpstreamState {
    pub(crate) in_flight: u64,
    /// Numbers of aborted requests, and when each abort was detected.
    pub(crate) aborts: Vec<(u64, u64)>,
}

impl Counters {
    pub(crate) fn state(&self) -> UpstreamState {
        let aborts = self.aborts.lock().unwrap_or_else(PoisonError::into_inner).clone();
        UpstreamState { in_flight: self.in_flight.load(Relaxed), aborts }
    }

    pub(crate) fn forget_aborts(&self) {
        self.aborts.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

/// Counts one request.
#[derive(Debug)]
pub(crate) struct RequestGuard {
    pub(crate) counters: Arc<Counters>,
    id: u64,
    pub(crate) is_finished: bool,
}

impl RequestGuard {
    pub(crate) fn new(counters: Arc<Counters>, id: u64) -> Self {
        counters.in_flight.fetch_add(1, Relaxed);
        RequestGuard { counters, id, is_finished: false }
    }
}

impl Drop for RequestGuard {
    fn drop(&mut self) {
        let at = now();
        self.counters.in_flight.fetch_sub(1, Relaxed);
        if !self.is_finished {
            let mut aborts = self.counters.aborts.lock().unwrap_or_else(PoisonError::into_inner);
            if aborts.len() < MAX_ABORTS {
                aborts.push((self.id, at));
            }
        }
    }
}
