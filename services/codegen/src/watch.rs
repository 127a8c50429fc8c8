//! The watch over an answer on its way, of whatever kind: how long to wait for what, who may end it,
//! and when its tokens came. An answer waits through [`Watch::on`] alone, so that nothing that ends
//! it can be forgotten anywhere.

use std::pin::Pin;
use std::time::Duration;

use hapa_chassis::{Call, Report};
use hapa_proto::codegen::v1::Usage;
use tokio::time::{Instant, Sleep, sleep_until};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use crate::engine::Ask;
use crate::error::Error;

/// Of prompts, in the middle between code, English and Korean.
const BYTES_PER_TOKEN: usize = 4;

/// How long to wait for what.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    pub(crate) first_token: Duration,
    pub(crate) between_tokens: Duration,
    pub(crate) whole: Duration,
    pub(crate) heartbeat: Duration,
}

/// Something that ends an answer.
pub(crate) type Signal = Pin<Box<WaitForCancellationFutureOwned>>;

pub(crate) struct Watch {
    patience: Patience,
    arrived: Instant,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
    /// The last sign of life that was sent, and the last that the engine gave.
    last_sent: Instant,
    last_heard: Instant,
    deadline: Instant,
    /// One timer for all waits: set to the earliest, and left alone while tokens push that out.
    alarm: Pin<Box<Sleep>>,
    ending: Signal,
    /// The end of the caller's credential.
    revoked: Option<Signal>,
    /// A newer request took the place of this one.
    superseded: Option<Signal>,
}

impl Watch {
    pub(crate) fn new(call: &Call, patience: Patience, streams_end: CancellationToken) -> Watch {
        let now = Instant::now();
        let deadline = call.arrived + patience.whole;
        let mut watch = Watch {
            patience,
            arrived: call.arrived,
            first_token: None,
            last_token: None,
            last_sent: now,
            last_heard: now,
            deadline: call.deadline.map_or(deadline, |at| at.min(deadline)),
            alarm: Box::pin(sleep_until(now)),
            ending: Box::pin(streams_end.cancelled_owned()),
            revoked: call.ended.clone().map(|ended| Box::pin(ended.cancelled_owned())),
            superseded: None,
        };
        let due = watch.due();
        watch.alarm.as_mut().reset(due);
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
            () = &mut self.ending => Err(Error::ShuttingDown),
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
        if self.last_heard >= self.deadline { Err(Error::TimeUp) } else { Ok(()) }
    }

    /// Something was put into the stream.
    pub(crate) fn sent(&mut self) {
        self.last_sent = Instant::now();
    }

    /// What the engine said last is text, and goes out at once.
    pub(crate) fn text(&mut self) {
        let now = Instant::now();
        self.last_token = Some(now);
        if self.first_token.is_none() {
            self.first_token = Some(now);
            metrics::histogram!("gen_ai_server_time_to_first_token_seconds")
                .record(now - self.arrived);
        }
        self.last_sent = self.last_heard;
    }

    /// After an alarm: whether time is up, and if not, when the next is due.
    pub(crate) fn check(&mut self) -> Result<(), Error> {
        let now = Instant::now();
        if now >= self.deadline {
            return Err(Error::TimeUp);
        }
        if now >= self.silence_ends() {
            return Err(if self.has_text() { Error::Stalled } else { Error::NoFirstToken });
        }
        let due = self.due();
        self.alarm.as_mut().reset(due);
        Ok(())
    }

    pub(crate) fn wants_heartbeat(&self) -> bool {
        Instant::now() >= self.last_sent + self.patience.heartbeat
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

    /// Notes when the tokens came, of which there were so many.
    pub(crate) fn tell_times(&self, report: &Report, tokens: u32) {
        let Some((first, last)) = self.first_token.zip(self.last_token) else { return };
        report.time_to_first_token(first - self.arrived);
        if let Some(gaps) = tokens.checked_sub(1).filter(|gaps| *gaps > 0) {
            let between = (last - first) / gaps;
            report.between_tokens(between);
            metrics::histogram!("gen_ai_server_time_per_output_token_seconds").record(between);
        }
    }

    fn silence_ends(&self) -> Instant {
        match self.first_token {
            Some(_) => self.last_heard + self.patience.between_tokens,
            None => self.arrived + self.patience.first_token,
        }
    }

    fn due(&self) -> Instant {
        let (now, heartbeat) = (Instant::now(), self.patience.heartbeat);
        let next_beat = Some(self.last_sent + heartbeat).filter(|at| *at > now);
        self.deadline.min(self.silence_ends()).min(next_beat.unwrap_or(now + heartbeat))
    }
}

pub(crate) async fn fired(signal: &mut Option<Signal>) {
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
pub(crate) fn account(usage: Option<&Usage>, ask: Ask) {
    let Some(usage) = usage else { return };
    for (kind, tokens) in [("input", usage.prompt_tokens), ("output", usage.completion_tokens)] {
        metrics::counter!("hapa_ai_tokens_used_total", "type" => kind).increment(tokens.into());
        let labels = [("gen_ai_token_type", kind), ("gen_ai_operation_name", ask.operation())];
        metrics::histogram!("gen_ai_client_token_usage", &labels).record(tokens);
    }
}

pub(crate) fn millis(span: Duration) -> u32 {
    u32::try_from(span.as_millis()).unwrap_or(u32::MAX)
}
