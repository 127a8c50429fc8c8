//! One engine: what the last look at it showed, what we ask of it now, and its breaker.
//!
//! Looks come from the background, requests read what they left behind: no request waits for a look.
//! Whoever asks holds an [`Attempt`], whose drop gives back all that it took, however it ends.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hapa_telemetry::trace::Part;
use metrics::Gauge;
use reqwest::header::HeaderMap;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::Span;

use super::breaker::{Breaker, Ticket, Verdict};
use super::choose::{Candidate, hash};
use super::scrape::{Load, Progress};
use crate::engine::{self, Ask, Engine, ListedModel};

/// What looks found out.
#[derive(Debug, Default)]
struct Seen {
    models: Vec<ListedModel>,
    adapters: Vec<String>,
    progress: Progress,
    trouble: Option<String>,
}

pub(super) struct Replica {
    /// `host:port`, or the name that metrics have for too many.
    label: Arc<str>,
    pub(super) name: String,
    pub(super) id: u64,
    pub(super) engine: Engine,
    /// Fires when it is no engine of ours any more: what is in flight goes on.
    pub(super) gone: CancellationToken,
    seen: Mutex<Seen>,
    breaker: Mutex<Breaker>,
    is_up: AtomicBool,
    was_looked_at: AtomicBool,
    own: AtomicU32,
    unheard: AtomicU32,
    /// Counts at the last look: waiting, running, our own; and the cache in thousandths.
    waiting: AtomicU32,
    running: AtomicU32,
    own_then: AtomicU32,
    cache: AtomicU64,
    gauges: Gauges,
}

struct Gauges {
    in_flight: Gauge,
    breaker: Gauge,
    up: Gauge,
}

/// What a look shows of a replica, for lists.
pub(super) struct Shown {
    pub(super) models: Vec<ListedModel>,
    pub(super) adapters: Vec<String>,
}

impl Replica {
    pub(super) fn new(name: String, label: Arc<str>, engine: Engine) -> Self {
        let gauge = |gauge: fn(Arc<str>) -> Gauge| gauge(Arc::clone(&label));
        let gauges = Gauges {
            in_flight: gauge(|l| metrics::gauge!("hapa_engine_requests_in_flight", "engine" => l)),
            breaker: gauge(|l| metrics::gauge!("hapa_engine_breaker_state", "engine" => l)),
            up: gauge(|l| metrics::gauge!("hapa_engine_up", "engine" => l)),
        };
        gauges.in_flight.increment(0.0);
        gauges.breaker.set(0.0);
        gauges.up.set(0.0);
        Replica {
            id: hash(0, name.as_bytes()),
            label,
            name,
            engine,
            gone: CancellationToken::new(),
            seen: Mutex::default(),
            breaker: Mutex::new(Breaker::new()),
            // Believed until a look says otherwise.
            is_up: AtomicBool::new(true),
            was_looked_at: AtomicBool::new(false),
            own: AtomicU32::new(0),
            unheard: AtomicU32::new(0),
            waiting: AtomicU32::new(0),
            running: AtomicU32::new(0),
            own_then: AtomicU32::new(0),
            cache: AtomicU64::new(0),
            gauges,
        }
    }

    /// Whether it answered when it was last looked at, and gets on.
    pub(super) fn is_up(&self) -> bool {
        self.is_up.load(Ordering::Relaxed)
    }

    /// Up, and its breaker closed or about to be.
    pub(super) fn is_well(&self) -> bool {
        self.is_up() && self.was_looked_at() && lock(&self.breaker).level() < 2
    }

    pub(super) fn was_looked_at(&self) -> bool {
        self.was_looked_at.load(Ordering::Acquire)
    }

    /// Looks at it; tells whether its models or its adapters are others than before.
    pub(super) async fn look(&self, stuck_after: Duration) -> bool {
        let own_then = self.own.load(Ordering::Relaxed);
        let (models, page) =
            futures_util::future::join(self.engine.models(), self.engine.metrics()).await;
        let load = page.map(|page| Load::read(&page)).unwrap_or_default();
        let unheard = self.unheard.load(Ordering::Relaxed);
        let mut seen = lock(&self.seen);
        let stuck = seen.progress.is_stuck(&load, unheard, stuck_after, Instant::now());
        let mut changed = !self.was_looked_at.swap(true, Ordering::AcqRel);
        seen.trouble = match models {
            Ok(models) => {
                changed |= !same(&seen.models, &models);
                seen.models = models;
                stuck.then(|| "the engine runs requests and makes no tokens".to_owned())
            }
            // What it had is remembered: it may be back before it is looked at.
            Err(error) => Some(error.to_string()),
        };
        self.note(&load, own_then);
        changed |= seen.adapters != load.adapters;
        seen.adapters = load.adapters;
        let is_up = seen.trouble.is_none();
        drop(seen);
        self.set_up(is_up);
        changed
    }

    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "from 0 up; what is too large is as large as can be"
    )]
    fn note(&self, load: &Load, own_then: u32) {
        self.waiting.store(load.waiting as u32, Ordering::Relaxed);
        self.running.store(load.running as u32, Ordering::Relaxed);
        self.cache.store((load.cache * 1_000.0) as u64, Ordering::Relaxed);
        self.own_then.store(own_then, Ordering::Relaxed);
    }

    fn set_up(&self, is_up: bool) {
        let was_up = self.is_up.swap(is_up, Ordering::Relaxed);
        if is_up && !was_up {
            lock(&self.breaker).is_back();
        }
        self.show();
    }

    /// It can't be connected to: no look is needed to know.
    pub(super) fn is_away(&self, error: &engine::Error) {
        lock(&self.seen).trouble = Some(error.to_string());
        self.set_up(false);
    }

    /// It says that it has not this model.
    pub(super) fn has_not(&self, model: &str) {
        lock(&self.seen).models.retain(|listed| listed.id != model);
    }

    pub(super) fn shown(&self) -> Shown {
        let seen = lock(&self.seen);
        Shown { models: seen.models.clone(), adapters: seen.adapters.clone() }
    }

    /// Whether it listed a model when it was last looked at.
    pub(super) fn lists(&self, model: &str) -> bool {
        lock(&self.seen).models.iter().any(|listed| listed.id == model)
    }

    /// What is wrong with it, in published words.
    pub(super) fn trouble(&self) -> Option<String> {
        lock(&self.seen).trouble.clone()
    }

    #[expect(clippy::cast_precision_loss, reason = "thousandths of a whole")]
    pub(super) fn candidate(&self, resident: bool) -> Candidate {
        Candidate {
            id: self.id,
            waiting: self.waiting.load(Ordering::Relaxed),
            running: self.running.load(Ordering::Relaxed),
            own: self.own.load(Ordering::Relaxed),
            own_then: self.own_then.load(Ordering::Relaxed),
            cache: self.cache.load(Ordering::Relaxed) as f32 / 1_000.0,
            resident,
        }
    }

    /// Whether its breaker would let an attempt in; else when to ask again.
    pub(super) fn admits(&self, now: Instant) -> Result<(), Instant> {
        lock(&self.breaker).admits(now)
    }

    /// Begins to ask it. Silence until `patience` has passed is a failure.
    pub(super) fn enter(
        self: &Arc<Self>,
        now: Instant,
        patience: Duration,
    ) -> Result<Attempt, Instant> {
        let ticket = lock(&self.breaker).enter(now)?;
        self.own.fetch_add(1, Ordering::Relaxed);
        self.unheard.fetch_add(1, Ordering::Relaxed);
        self.gauges.in_flight.increment(1.0);
        self.show();
        let patient_until = now + patience;
        Ok(Attempt {
            replica: Arc::clone(self),
            ticket: Some(ticket),
            patient_until,
            part: Part::default(),
        })
    }

    /// It is no engine of ours any more.
    pub(super) fn leave(&self) {
        self.gone.cancel();
        self.show();
    }

    fn show(&self) {
        let here = !self.gone.is_cancelled();
        self.gauges.up.set(f64::from(u8::from(here && self.is_up())));
        let level = lock(&self.breaker).level();
        self.gauges.breaker.set(f64::from(if here { level } else { 0 }));
    }
}

fn same(before: &[ListedModel], now: &[ListedModel]) -> bool {
    let key =
        |listed: &ListedModel| (listed.id.clone(), listed.parent.clone(), listed.max_model_len);
    before.iter().map(key).eq(now.iter().map(key))
}

/// One request to a replica, until its answer has ended.
pub(crate) struct Attempt {
    pub(super) replica: Arc<Replica>,
    /// Until it is known how it went.
    ticket: Option<Ticket>,
    pub(super) patient_until: Instant,
    /// Its span, once it is asked.
    part: Part,
}

impl Attempt {
    /// It is asked now; tells it of the trace that it belongs to.
    pub(super) fn ask(&mut self, span: &Span, ask: Ask) -> HeaderMap {
        self.part = Part::ask_under(span, || format!("POST {}", ask.path()));
        self.part.set("http.request.method", "POST");
        self.part.set_server(&self.replica.name);
        let mut headers = HeaderMap::new();
        self.part.carry(&mut headers);
        headers
    }

    /// It answers.
    pub(super) fn answers(&self) {
        self.part.set("http.response.status_code", 200);
    }

    /// It failed before its first token.
    pub(super) fn failed(&self, error: &engine::Error) {
        if let engine::Error::Refused { status, .. } = error {
            self.part.set("http.response.status_code", i64::from(status.as_u16()));
        }
        self.part.fail(error.kind(), "the engine failed before its first token");
    }

    /// Where it is asked: `host:port`.
    pub(super) fn place(&self) -> &str {
        &self.replica.name
    }

    /// How it went; the first word counts.
    pub(super) fn went(&mut self, verdict: Verdict) {
        let Some(ticket) = self.ticket.take() else { return };
        lock(&self.replica.breaker).leave(ticket, verdict, Instant::now());
        self.replica.unheard.fetch_sub(1, Ordering::Relaxed);
        self.replica.show();
        let outcome = match verdict {
            Verdict::Success => "success",
            Verdict::Failure => "failure",
            Verdict::Neutral => "neutral",
        };
        let engine = Arc::clone(&self.replica.label);
        metrics::counter!("hapa_engine_attempts_total", "engine" => engine, "outcome" => outcome)
            .increment(1);
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        // Nobody waits any more: it was silent for too long, or its caller left.
        let was_silent = Instant::now() >= self.patient_until;
        if self.ticket.is_some() && was_silent {
            self.failed(&engine::Error::Silent);
        }
        self.went(if was_silent { Verdict::Failure } else { Verdict::Neutral });
        self.replica.own.fetch_sub(1, Ordering::Relaxed);
        self.replica.gauges.in_flight.decrement(1.0);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
