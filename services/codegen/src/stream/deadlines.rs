//! The time limits of an answer, and the events that end it early: shutdown, revocation of the credential, and a newer
//! request of the session. Also records when tokens arrived.
//!
//! A generation has the limits of the engine; each subscriber has those of its own call.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use hapa_core::call::Call;
use hapa_core::call_stats::CallStats;
use tokio::time::{Instant, Sleep, sleep_until};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use crate::error::Error;

/// Timer interval if no limit applies.
const IDLE_INTERVAL: Duration = Duration::from_hours(1);

/// The time limits of generations.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Timeouts {
    /// From the arrival of the call to the first token, of reasoning or of the answer.
    pub(crate) first_token: Duration,
    /// Between two tokens.
    pub(crate) between_tokens: Duration,
    /// From the first reasoning token to the first token of the answer.
    pub(crate) reasoning: Duration,
    /// From the arrival of the call to the end of the answer.
    pub(crate) whole: Duration,
    /// Time without an event after which a stream sends a heartbeat.
    pub(crate) heartbeat: Duration,
}

type Signal = Pin<Box<WaitForCancellationFutureOwned>>;

/// The limits of one answer or one subscriber.
pub(crate) struct StreamDeadlines {
    arrived: Instant,
    first_token: Option<Instant>,
    first_answer_token: Option<Instant>,
    last_token: Option<Instant>,
    last_sent: Instant,
    last_read: Instant,
    deadline: Option<Instant>,
    engine: Option<Timeouts>,
    heartbeat: Option<Duration>,
    /// One timer for all limits. It is set to the earliest, and not reset while tokens postpone that.
    timer: Pin<Box<Sleep>>,
    shutdown: Option<Signal>,
    revoked: Option<Signal>,
    superseded: Option<Signal>,
}

impl StreamDeadlines {
    /// For a generation, independent of its subscribers.
    pub(super) fn for_engine(call: &Call, timeouts: Timeouts, shutdown: CancellationToken) -> Self {
        let mut deadlines = StreamDeadlines::new(call, Some(timeouts.heartbeat));
        deadlines.deadline = Some(call.arrived + timeouts.whole);
        deadlines.engine = Some(timeouts);
        deadlines.shutdown = Some(Box::pin(shutdown.cancelled_owned()));
        deadlines.set_timer();
        deadlines
    }

    /// For a subscriber.
    pub(super) fn for_subscriber(call: &Call, heartbeat: Duration) -> Self {
        let mut deadlines = StreamDeadlines::new(call, Some(heartbeat));
        deadlines.deadline = call.deadline;
        let ended = call.ended.clone();
        deadlines.revoked = ended.map(|ended| Box::pin(ended.cancelled_owned()) as Signal);
        deadlines.set_timer();
        deadlines
    }

    fn new(call: &Call, heartbeat: Option<Duration>) -> Self {
        let now = Instant::now();
        StreamDeadlines {
            arrived: call.arrived,
            first_token: None,
            first_answer_token: None,
            last_token: None,
            last_sent: now,
            last_read: now,
            deadline: None,
            engine: None,
            heartbeat,
            timer: Box::pin(sleep_until(now + IDLE_INTERVAL)),
            shutdown: None,
            revoked: None,
            superseded: None,
        }
    }

    /// Ends the answer when the token is cancelled.
    pub(super) fn supersede_with(&mut self, token: CancellationToken) {
        self.superseded = Some(Box::pin(token.cancelled_owned()));
    }

    /// Whether an event has ended the answer early.
    pub(super) fn poll_ended(&mut self, cx: &mut Context<'_>) -> Option<Error> {
        if has_fired(&mut self.shutdown, cx) {
            Some(Error::ShuttingDown)
        } else if has_fired(&mut self.revoked, cx) {
            Some(Error::KeyEnded)
        } else if has_fired(&mut self.superseded, cx) {
            Some(Error::Superseded)
        } else {
            None
        }
    }

    /// Ready when the timer has fired. Then call `check`.
    pub(super) fn poll_timer(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.timer.as_mut().poll(cx)
    }

    /// After the timer has fired: whether a limit is exceeded. If not, sets the timer to the next limit.
    pub(super) fn check(&mut self) -> Result<(), Error> {
        let now = Instant::now();
        if self.deadline.is_some_and(|at| now >= at) {
            return Err(Error::DeadlineExceeded);
        }
        if let Some((at, error)) = self.engine_limit()
            && now >= at
        {
            return Err(error);
        }
        self.set_timer();
        Ok(())
    }

    /// Data has arrived. Fails if that was after the deadline: an engine that never pauses gives the timer no turn.
    pub(super) fn record_read(&mut self) -> Result<(), Error> {
        self.last_read = Instant::now();
        let is_late = self.deadline.is_some_and(|at| self.last_read >= at);
        if is_late { Err(Error::DeadlineExceeded) } else { Ok(()) }
    }

    pub(super) fn last_read(&self) -> Instant {
        self.last_read
    }

    /// An event was sent.
    pub(super) fn record_sent(&mut self) {
        self.last_sent = Instant::now();
    }

    /// A token has arrived. Returns whether it is the first.
    pub(super) fn record_token(&mut self, is_answer: bool) -> bool {
        let now = Instant::now();
        self.last_token = Some(now);
        if is_answer {
            self.first_answer_token.get_or_insert(now);
        }
        self.first_token.replace(self.first_token.unwrap_or(now)).is_none()
    }

    pub(super) fn disable_heartbeat(&mut self) {
        self.heartbeat = None;
    }

    pub(super) fn is_heartbeat_due(&self) -> bool {
        self.heartbeat.is_some_and(|heartbeat| Instant::now() >= self.last_sent + heartbeat)
    }

    /// Whether a token of the answer has arrived.
    pub(super) fn has_answer(&self) -> bool {
        self.first_answer_token.is_some()
    }

    pub(super) fn time_to_first_token(&self) -> Option<Duration> {
        self.first_token.map(|at| at - self.arrived)
    }

    pub(super) fn time_to_first_answer_token(&self) -> Option<Duration> {
        self.first_answer_token.map(|at| at - self.arrived)
    }

    pub(super) fn elapsed(&self) -> Duration {
        self.arrived.elapsed()
    }

    /// Records the times of an answer of so many tokens in the usage event of the call.
    pub(super) fn record_latencies(&self, stats: &CallStats, tokens: u32) {
        if let Some(time) = self.time_to_first_token() {
            stats.set_time_to_first_token(time);
        }
        if let Some(time) = self.time_to_first_answer_token() {
            stats.set_time_to_first_answer_token(time);
        }
        if let Some(time) = self.time_per_output_token(tokens) {
            stats.set_time_per_output_token(time);
        }
    }

    /// Records the times of an answer of so many tokens in the metrics of all generations.
    pub(super) fn record_metrics(&self, tokens: u32) {
        if let Some(time) = self.time_to_first_token() {
            metrics::histogram!("gen_ai_server_time_to_first_token_seconds").record(time);
        }
        if let Some(time) = self.time_to_first_answer_token() {
            metrics::histogram!("hapa_time_to_first_answer_token_seconds").record(time);
        }
        if let Some(time) = self.time_per_output_token(tokens) {
            metrics::histogram!("gen_ai_server_time_per_output_token_seconds").record(time);
        }
    }

    /// Mean time between two tokens.
    fn time_per_output_token(&self, tokens: u32) -> Option<Duration> {
        let gaps = tokens.checked_sub(1).filter(|gaps| *gaps > 0)?;
        Some((self.last_token? - self.first_token?) / gaps)
    }

    /// The earliest limit of the engine, and the error if it is exceeded.
    fn engine_limit(&self) -> Option<(Instant, Error)> {
        let timeouts = self.engine?;
        let Some(first_token) = self.first_token else {
            return Some((self.arrived + timeouts.first_token, Error::FirstTokenTimeout));
        };
        let gap = self.last_read + timeouts.between_tokens;
        if self.first_answer_token.is_some() {
            return Some((gap, Error::Stalled));
        }
        let reasoning = first_token + timeouts.reasoning;
        Some(if reasoning < gap {
            (reasoning, Error::ReasoningTimeout)
        } else {
            (gap, Error::Stalled)
        })
    }

    fn set_timer(&mut self) {
        let now = Instant::now();
        let heartbeat = self.heartbeat.map(|heartbeat| {
            Some(self.last_sent + heartbeat).filter(|at| *at > now).unwrap_or(now + heartbeat)
        });
        let engine = self.engine_limit().map(|(at, _)| at);
        let next = [self.deadline, engine, heartbeat].into_iter().flatten().min();
        self.timer.as_mut().reset(next.unwrap_or(now + IDLE_INTERVAL));
    }
}

fn has_fired(signal: &mut Option<Signal>, cx: &mut Context<'_>) -> bool {
    signal.as_mut().is_some_and(|signal| signal.as_mut().poll(cx).is_ready())
}

/// Whole milliseconds.
pub(crate) fn millis(time: Duration) -> u32 {
    u32::try_from(time.as_millis()).unwrap_or(u32::MAX)
}
