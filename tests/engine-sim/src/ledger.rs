//! Records the requests, counts and aborts of the engine.
//!
//! Invariants: every started generation becomes finished, aborted or cut exactly once, at the latest by the
//! drop of its [`ActiveGeneration`]. A token is counted before it is written, so that the counts include
//! every token that a client has.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, MutexGuard};
use std::time::Instant;

use serde_json::Value;
use tokio::sync::Notify;

use super::lock;

/// The number of recorded requests: enough for every test, and a bound for benchmarks.
const MAX_RECORDED_REQUESTS: usize = 4096;

/// The counts so far. `started` is the sum of `finished`, `aborted`, `cut` and those in flight.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Generation requests that arrived, including refused ones.
    pub started: u64,
    /// Answered up to the end of the script, including errors.
    pub finished: u64,
    /// Aborted by the client before the end.
    pub aborted: u64,
    /// Cut by the engine: by a fault that cuts, or by `Engine::stop`.
    pub cut: u64,
    /// Tokens written, over all streams.
    pub tokens_sent: u64,
    /// In flight, before the response headers.
    pub waiting: u64,
    /// In flight, at a `Script::hold`.
    pub held: u64,
}

impl Counts {
    /// Generations that are being answered.
    pub fn in_flight(self) -> u64 {
        self.started - self.finished - self.aborted - self.cut
    }
}

/// A generation request as it arrived.
#[derive(Clone, Debug)]
pub struct Recorded {
    /// The time at which its last byte arrived.
    pub at: Instant,
    /// Names in lower case, in the order sent.
    pub headers: Vec<(String, String)>,
    /// The body; `Null` if it was not JSON.
    pub body: Value,
}

impl Recorded {
    /// The first header of this name (in lower case).
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }
}

/// A generation that ended because its client closed the connection.
#[derive(Clone, Copy, Debug)]
pub struct Abort {
    /// The time at which the closed connection was detected.
    pub noticed_at: Instant,
    /// Tokens written to it by then.
    pub tokens_sent: u64,
}

/// The end of a generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It ended as scripted, with this finish reason if it was a success.
    Finished(Option<&'static str>),
    Cut,
    Aborted,
}

#[derive(Debug, Default)]
pub(super) struct Ledger {
    state: Mutex<LedgerState>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct LedgerState {
    counts: Counts,
    requests: VecDeque<Recorded>,
    aborts: Vec<Abort>,
    totals: Totals,
}

/// Totals that only the metrics page shows.
#[derive(Clone, Debug, Default)]
pub(super) struct Totals {
    pub(super) prompt_tokens: u64,
    pub(super) succeeded: BTreeMap<&'static str, u64>,
    /// Active generations per model.
    pub(super) running: BTreeMap<String, u64>,
}

impl Ledger {
    pub(super) fn counts(&self) -> Counts {
        self.read().counts
    }

    pub(super) fn totals(&self) -> Totals {
        self.read().totals.clone()
    }

    pub(super) fn requests(&self) -> Vec<Recorded> {
        self.read().requests.iter().cloned().collect()
    }

    pub(super) fn aborts(&self) -> Vec<Abort> {
        self.read().aborts.clone()
    }

    pub(super) async fn wait_until(&self, wanted: impl Fn(Counts) -> bool) -> Counts {
        let mut changed = std::pin::pin!(self.changed.notified());
        loop {
            // Registration comes before the check, so that no change is missed.
            changed.as_mut().enable();
            let counts = self.counts();
            if wanted(counts) {
                return counts;
            }
            changed.as_mut().await;
            changed.set(self.changed.notified());
        }
    }

    pub(super) fn begin(&self, request: Recorded) -> ActiveGeneration<'_> {
        self.write(|state| {
            state.counts.started += 1;
            state.counts.waiting += 1;
            if state.requests.len() == MAX_RECORDED_REQUESTS {
                state.requests.pop_front();
            }
            state.requests.push_back(request);
        });
        ActiveGeneration {
            ledger: self,
            waiting: true,
            model: String::new(),
            tokens_sent: 0,
            end: Outcome::Cut,
        }
    }

    pub(super) fn hold(&self) -> HoldGuard<'_> {
        self.write(|state| state.counts.held += 1);
        HoldGuard(self)
    }

    fn read(&self) -> MutexGuard<'_, LedgerState> {
        lock(&self.state)
    }

    fn write(&self, change: impl FnOnce(&mut LedgerState)) {
        change(&mut lock(&self.state));
        self.changed.notify_waiters();
    }
}

/// One generation from its request to its end.
#[derive(Debug)]
pub(super) struct ActiveGeneration<'a> {
    ledger: &'a Ledger,
    waiting: bool,
    /// The model; empty until the generation runs.
    model: String,
    tokens_sent: u64,
    end: Outcome,
}

impl ActiveGeneration<'_> {
    /// The engine starts the generation; response headers follow.
    pub(super) fn run(&mut self, model: &str, prompt_tokens: u64) {
        self.waiting = false;
        model.clone_into(&mut self.model);
        self.ledger.write(|state| {
            state.counts.waiting -= 1;
            state.totals.prompt_tokens += prompt_tokens;
            *state.totals.running.entry(model.to_owned()).or_default() += 1;
        });
    }

    pub(super) fn send(&mut self, tokens: u64) {
        if tokens > 0 {
            self.tokens_sent += tokens;
            self.ledger.write(|state| state.counts.tokens_sent += tokens);
        }
    }

    pub(super) fn settle(mut self, end: Outcome) {
        self.end = end;
    }
}

impl Drop for ActiveGeneration<'_> {
    /// A generation without an outcome was dropped with its connection by `Engine::stop`, and counts as cut.
    fn drop(&mut self) {
        let noticed_at = Instant::now();
        self.ledger.write(|state| {
            state.counts.waiting -= u64::from(self.waiting);
            if let Some(running) = state.totals.running.get_mut(&self.model) {
                *running -= 1;
            }
            state.totals.running.retain(|_, running| *running > 0);
            match self.end {
                Outcome::Finished(_) => state.counts.finished += 1,
                Outcome::Cut => state.counts.cut += 1,
                Outcome::Aborted => {
                    state.counts.aborted += 1;
                    state.aborts.push(Abort { noticed_at, tokens_sent: self.tokens_sent });
                }
            }
            let reason = match self.end {
                Outcome::Finished(reason) => reason,
                Outcome::Cut | Outcome::Aborted => Some("abort"),
            };
            if let Some(reason) = reason {
                *state.totals.succeeded.entry(reason).or_default() += 1;
            }
        });
    }
}

/// Counts a stream at a hold until it is dropped.
#[derive(Debug)]
pub(super) struct HoldGuard<'a>(&'a Ledger);

impl Drop for HoldGuard<'_> {
    fn drop(&mut self) {
        self.0.write(|state| state.counts.held -= 1);
    }
}
