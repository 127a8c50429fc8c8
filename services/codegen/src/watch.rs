//! The watch over an answer on its way, of whatever kind: how long to wait for what, who may end it,
//! and when its tokens came. An answer waits through [`Watch::on`] alone, so that nothing that ends
//! it can be forgotten anywhere.

use std::pin::Pin;
use std::time::Duration;

use hapa_core::call::Call;
use hapa_core::call_stats::CallStats;
use hapa_proto::codegen::v1::Usage;
use tokio::time::{Instant, Sleep, sleep_until};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use crate::error::Error;
use crate::upstream::engine::Operation;

/// Of prompts, in the middle between code, English and Korean.
const BYTES_PER_TOKEN: usize = 4;

/// Until the next look where nothing is to come of it.
const NOTHING_DUE: Duration = Duration::from_hours(1);

/// How long to wait for what.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    pub(crate) first_token: Duration,
    pub(crate) between_tokens: Duration,
    pub(crate) whole: Duration,
    pub(crate) heartbeat: Duration,
}

/// Something that ends an answer.
type Signal = Pin<Box<WaitForCancellationFutureOwned>>;

pub(crate) struct Watch {
    arrived: Instant,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
    /// The last sign of life that was sent, and the last that the engine gave.
    last_sent: Instant,
    last_heard: Instant,
    deadline: Option<Instant>,
    /// How long an engine may be silent: before its first token, and then.
    silence: Option<(Duration, Duration)>,
    heartbeat: Option<Duration>,
    /// One timer for all waits: set to the earliest, and left alone while tokens push that out.
    alarm: Pin<Box<Sleep>>,
    /// The end of the server.
    ending: Option<Signal>,
    /// The end of the caller's credential.
    revoked: Option<Signal>,
    /// A newer request took the place of this one.
    superseded: Option<Signal>,
}

impl Watch {
    /// Over an answer that an engine makes for this caller alone.
    pub(crate) fn new(call: &Call, patience: Patience, streams_end: CancellationToken) -> Watch {
        let whole = call.arrived + patience.whole;
        let mut watch = Watch::of_caller(call, patience.heartbeat);
        watch.deadline = Some(call.deadline.map_or(whole, |at| at.min(whole)));
        watch.silence = Some((patience.first_token, patience.between_tokens));
        watch.ending = Some(Box::pin(streams_end.cancelled_owned()));
        watch.set_alarm();
        watch
    }

    /// Over what an engine says, whoever reads it: nobody needs signs of life here.
    pub(crate) fn of_engine(
        call: &Call,
        patience: Patience,
        streams_end: CancellationToken,
    ) -> Watch {
        Watch { heartbeat: None, ..Watch::new(call, patience, streams_end) }
    }

    /// Over a caller who reads what others watch.
    pub(crate) fn of_caller(call: &Call, heartbeat: Duration) -> Watch {
        let now = Instant::now();
        let mut watch = Watch {
            arrived: call.arrived,
            first_token: None,
            last_token: None,
            last_sent: now,
            last_heard: now,
            deadline: call.deadline,
            silence: None,
            heartbeat: Some(heartbeat),
            alarm: Box::pin(sleep_until(now)),
            ending: None,
            revoked: call.ended.clone().map(|ended| Box::pin(ended.cancelled_owned()) as Signal),
            superseded: None,
        };
        watch.set_alarm();
        watch
    }

    /// Ends the answer when this fires, too.
    pub(crate) fn supersede_with(&mut self, token: CancellationToken) {
        self.superseded = Some(Box::pin(token.cancelled_owned()));
    }

    /// Waits for news, the earliest time that means something (none), or whoever ends the answer.
    pub(crate) async fn on<T, E: Into<Error>>(
        &mut self,
        news: impl Future<Output = Result<T, E>>,
    ) -> Result<Option<T>, Error> {
        tokio::select! {
            biased;
            () = fired(&mut self.ending) => Err(Error::ShuttingDown),
            () = fired(&mut self.revoked) => Err(Error::KeyEnded),
            () = fired(&mut self.superseded) => Err(Error::Superseded),
            news = news => news.map(Some).map_err(Into::into),
            () = &mut self.alarm => Ok(None),
        }
    }

    /// The engine spoke.
    pub(crate) fn heard(&mut self) -> Result<(), Error> {
        self.last_heard = Instant::now();
        // An engine that never pauses leaves the alarm no turn.
        let is_late = self.deadline.is_some_and(|at| self.last_heard >= at);
        if is_late { Err(Error::DeadlineExceeded) } else { Ok(()) }
    }

    /// When it last did.
    pub(crate) fn last_heard(&self) -> Instant {
        self.last_heard
    }

    /// Something was put into the stream.
    pub(crate) fn sent(&mut self) {
        self.last_sent = Instant::now();
    }

    /// What was heard last is text, and goes out at once. Whether it is the first.
    pub(crate) fn text(&mut self) -> bool {
        let now = Instant::now();
        self.last_token = Some(now);
        self.last_sent = self.last_heard;
        self.first_token.replace(self.first_token.unwrap_or(now)).is_none()
    }

    /// After an alarm: whether time is up, and if not, when the next is due.
    pub(crate) fn check(&mut self) -> Result<(), Error> {
        let now = Instant::now();
        if self.deadline.is_some_and(|at| now >= at) {
            return Err(Error::DeadlineExceeded);
        }
        if self.silence_ends().is_some_and(|at| now >= at) {
            return Err(if self.has_text() { Error::Stalled } else { Error::FirstTokenTimeout });
        }
        self.set_alarm();
        Ok(())
    }

    pub(crate) fn wants_heartbeat(&self) -> bool {
        self.heartbeat.is_some_and(|heartbeat| Instant::now() >= self.last_sent + heartbeat)
    }

    pub(crate) fn has_text(&self) -> bool {
        self.first_token.is_some()
    }

    pub(crate) fn first_token_ms(&self) -> u32 {
        self.first_token.map_or(0, |at| millis(at - self.arrived))
    }

    pub(crate) fn elapsed_ms(&self) -> u32 {
        millis(self.arrived.elapsed())
    }

    /// Notes when the tokens came, of which there were so many, for the event that remembers the call.
    pub(crate) fn tell_times(&self, report: &CallStats, tokens: u32) {
        if let Some(first) = self.first_token {
            report.set_time_to_first_token(first - self.arrived);
        }
        if let Some(between) = self.between_tokens(tokens) {
            report.set_time_per_output_token(between);
        }
    }

    /// Counts the same among all that engines made.
    pub(crate) fn count_times(&self, tokens: u32) {
        if let Some(first) = self.first_token {
            metrics::histogram!("gen_ai_server_time_to_first_token_seconds")
                .record(first - self.arrived);
        }
        if let Some(between) = self.between_tokens(tokens) {
            metrics::histogram!("gen_ai_server_time_per_output_token_seconds").record(between);
        }
    }

    /// On average.
    fn between_tokens(&self, tokens: u32) -> Option<Duration> {
        let gaps = tokens.checked_sub(1).filter(|gaps| *gaps > 0)?;
        Some((self.last_token? - self.first_token?) / gaps)
    }

    fn silence_ends(&self) -> Option<Instant> {
        let (before, between) = self.silence?;
        Some(match self.first_token {
            Some(_) => self.last_heard + between,
            None => self.arrived + before,
        })
    }

    /// To the earliest time that means something.
    fn set_alarm(&mut self) {
        let now = Instant::now();
        let beat = self.heartbeat.map(|heartbeat| {
            Some(self.last_sent + heartbeat).filter(|at| *at > now).unwrap_or(now + heartbeat)
        });
        let due = [self.deadline, self.silence_ends(), beat].into_iter().flatten().min();
        self.alarm.as_mut().reset(due.unwrap_or(now + NOTHING_DUE));
    }
}

async fn fired(signal: &mut Option<Signal>) {
    match signal {
        Some(signal) => signal.await,
        None => std::future::pending().await,
    }
}

/// About as many tokens as the prompt of this request has, until the engine says.
pub(crate) fn prompt_tokens(body: &[u8]) -> u32 {
    u32::try_from(body.len() / BYTES_PER_TOKEN).unwrap_or(u32::MAX)
}

/// Counts what an engine says that it used.
pub(crate) fn account(usage: Option<&Usage>, ask: Operation) {
    let Some(usage) = usage else { return };
    for (kind, tokens) in [("input", usage.prompt_tokens), ("output", usage.completion_tokens)] {
        metrics::counter!("hapa_ai_tokens_used_total", "type" => kind).increment(tokens.into());
        let labels = [("gen_ai_token_type", kind), ("gen_ai_operation_name", ask.otel_name())];
        metrics::histogram!("gen_ai_client_token_usage", &labels).record(tokens);
    }
}

pub(crate) fn millis(span: Duration) -> u32 {
    u32::try_from(span.as_millis()).unwrap_or(u32::MAX)
}
