//! What the engine has seen and done: requests, counts, aborts.
//!
//! Kept true: every generation that was started is, exactly once, finished, aborted or cut; the
//! drop of its [`Flight`] sees to it. A token is counted before it is written, so no client ever
//! holds a token that the counts do not.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, MutexGuard};
use std::time::Instant;

use serde_json::Value;
use tokio::sync::Notify;

use super::lock;

/// How many requests are remembered: enough for any test, bounded for a benchmark.
const REMEMBERED: usize = 4096;

/// What happened so far. `started` is the sum of `finished`, `aborted`, `cut` and those in flight.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Generation requests that arrived, those that were refused included.
    pub started: u64,
    /// Answered up to the end that the script asked for, errors included.
    pub finished: u64,
    /// Left by the client before the end.
    pub aborted: u64,
    /// Broken off by the engine: a fault that cuts, or `Engine::stop`.
    pub cut: u64,
    /// Tokens written, over all streams.
    pub tokens_sent: u64,
    /// In flight, and not taken up: hanging before the response headers.
    pub waiting: u64,
    /// In flight, and standing at a `Script::hold`.
    pub held: u64,
}

impl Counts {
    /// Generations that are being answered.
    pub fn in_flight(self) -> u64 {
        self.started - self.finished - self.aborted - self.cut
    }
}

/// A generation request as it came in.
#[derive(Clone, Debug)]
pub struct Recorded {
    /// When its last byte had arrived.
    pub at: Instant,
    /// Names in lower case, in the order sent.
    pub headers: Vec<(String, String)>,
    /// The body; `Null` if it was no JSON.
    pub body: Value,
}

impl Recorded {
    /// The first header of this name (in lower case).
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }
}

/// A generation whose client closed the connection before its end.
#[derive(Clone, Copy, Debug)]
pub struct Abort {
    /// When the closed connection was noticed.
    pub noticed_at: Instant,
    /// Tokens written to it by then.
    pub tokens_sent: u64,
}

/// How a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// As scripted, with this finish reason if it was a success.
    Finished(Option<&'static str>),
    Cut,
    Aborted,
}

#[derive(Debug, Default)]
pub(super) struct Ledger {
    books: Mutex<Books>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Books {
    counts: Counts,
    requests: VecDeque<Recorded>,
    aborts: Vec<Abort>,
    totals: Totals,
}

/// What only the metrics page shows.
#[derive(Clone, Debug, Default)]
pub(super) struct Totals {
    pub(super) prompt_tokens: u64,
    pub(super) succeeded: BTreeMap<&'static str, u64>,
    /// How many run of each model.
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
            // Listen first, look second: a change in between is not missed.
            changed.as_mut().enable();
            let counts = self.counts();
            if wanted(counts) {
                return counts;
            }
            changed.as_mut().await;
            changed.set(self.changed.notified());
        }
    }

    pub(super) fn begin(&self, request: Recorded) -> Flight<'_> {
        self.write(|books| {
            books.counts.started += 1;
            books.counts.waiting += 1;
            if books.requests.len() == REMEMBERED {
                books.requests.pop_front();
            }
            books.requests.push_back(request);
        });
        Flight { ledger: self, waiting: true, model: String::new(), tokens_sent: 0, end: End::Cut }
    }

    pub(super) fn hold(&self) -> Held<'_> {
        self.write(|books| books.counts.held += 1);
        Held(self)
    }

    fn read(&self) -> MutexGuard<'_, Books> {
        lock(&self.books)
    }

    fn write(&self, change: impl FnOnce(&mut Books)) {
        change(&mut lock(&self.books));
        self.changed.notify_waiters();
    }
}

/// One generation from its request to its end.
#[derive(Debug)]
pub(super) struct Flight<'a> {
    ledger: &'a Ledger,
    waiting: bool,
    /// Once it runs.
    model: String,
    tokens_sent: u64,
    end: End,
}

impl Flight<'_> {
    /// The engine takes it up: response headers come next.
    pub(super) fn run(&mut self, model: &str, prompt_tokens: u64) {
        self.waiting = false;
        model.clone_into(&mut self.model);
        self.ledger.write(|books| {
            books.counts.waiting -= 1;
            books.totals.prompt_tokens += prompt_tokens;
            *books.totals.running.entry(model.to_owned()).or_default() += 1;
        });
    }

    pub(super) fn send(&mut self, tokens: u64) {
        if tokens > 0 {
            self.tokens_sent += tokens;
            self.ledger.write(|books| books.counts.tokens_sent += tokens);
        }
    }

    pub(super) fn settle(mut self, end: End) {
        self.end = end;
    }
}

impl Drop for Flight<'_> {
    /// A flight that nobody settled was dropped with its connection, by `Engine::stop`: cut.
    fn drop(&mut self) {
        let noticed_at = Instant::now();
        self.ledger.write(|books| {
            books.counts.waiting -= u64::from(self.waiting);
            if let Some(running) = books.totals.running.get_mut(&self.model) {
                *running -= 1;
            }
            books.totals.running.retain(|_, running| *running > 0);
            match self.end {
                End::Finished(_) => books.counts.finished += 1,
                End::Cut => books.counts.cut += 1,
                End::Aborted => {
                    books.counts.aborted += 1;
                    books.aborts.push(Abort { noticed_at, tokens_sent: self.tokens_sent });
                }
            }
            let reason = match self.end {
                End::Finished(reason) => reason,
                End::Cut | End::Aborted => Some("abort"),
            };
            if let Some(reason) = reason {
                *books.totals.succeeded.entry(reason).or_default() += 1;
            }
        });
    }
}

/// A stream that stands at a hold, for as long as this lives.
#[derive(Debug)]
pub(super) struct Held<'a>(&'a Ledger);

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.write(|books| books.counts.held -= 1);
    }
}
