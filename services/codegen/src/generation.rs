//! One answer on its way: opened, read, split into code and explanation, and ended in exactly one of
//! two ways, `finished` or `failed`.
//!
//! It is pulled: nothing runs unless the caller's side asks for the next frame, so there is no task
//! and no channel to leak, and dropping it at any await closes the engine's connection.

use std::collections::VecDeque;
use std::pin::Pin;
use std::time::Duration;

use hapa_chassis::{Call, Fault, Report};
use hapa_proto::codegen::v1::stream_generate_code_response::{
    Delta, Event, Failed, Finished, Heartbeat, Kind,
};
use hapa_proto::codegen::v1::{StreamGenerateCodeResponse, Usage};
use tokio::time::{Instant, Sleep, sleep_until};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::Status;

use crate::engine::{self, Batch};
use crate::error::Error;
use crate::fence::Splitter;
use crate::order::{Order, Patience};
use crate::route::{Fleet, Opened};

type Opening = Pin<Box<dyn Future<Output = Result<Opened<Batch>, Error>> + Send>>;

enum Source {
    /// No token has come yet.
    Opening(Opening),
    Open(Box<Opened<Batch>>),
    /// All was said; the connection can be kept for the next call once its end was read.
    Closing(Box<Opened<Batch>>),
    /// Nothing more will be read: the connection is closed or done.
    Ended,
}

/// What happened while waiting.
enum Happened {
    Opened(Box<Opened<Batch>>),
    Read,
    Alarm,
}

pub(crate) struct Generation {
    source: Source,
    /// Fires when an engine has answered.
    answered: CancellationToken,
    order: Order,
    patience: Patience,
    arrived: Instant,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
    /// Where it says once what it used.
    report: Option<Report>,
    /// The last sign of life that was sent, and the last that the engine gave.
    last_sent: Instant,
    last_heard: Instant,
    deadline: Instant,
    /// One timer for all waits: set to the earliest, and left alone while tokens push that out.
    alarm: Pin<Box<Sleep>>,
    ending: Pin<Box<WaitForCancellationFutureOwned>>,
    /// The end of the caller's credential.
    revoked: Option<Pin<Box<WaitForCancellationFutureOwned>>>,
    /// About as many tokens as the prompt has, until the engine says.
    prompt_tokens: i64,
    splitter: Splitter,
    batch: Batch,
    frames: VecDeque<Event>,
    sequence: u32,
    failure: Option<Status>,
}

impl Generation {
    /// Asks the engine, and waits for its answer to begin as long as nothing need be sent: so that
    /// an engine that refuses at once gives a plain status and no stream.
    pub(crate) async fn begin(
        fleet: &Fleet,
        mut order: Order,
        call: &Call,
        patience: Patience,
        streams_end: CancellationToken,
    ) -> Result<Generation, Error> {
        let now = Instant::now();
        let (fleet, answered) = (fleet.clone(), CancellationToken::new());
        let prompt_tokens = order.prompt_tokens();
        let request = order.request(call.report(), &answered);
        let deadline = call.arrived + patience.whole;
        let deadline = call.deadline.map_or(deadline, |at| at.min(deadline));
        let mut generation = Generation {
            source: Source::Opening(Box::pin(async move { fleet.open(request).await })),
            answered,
            order,
            patience,
            arrived: call.arrived,
            first_token: None,
            last_token: None,
            report: Some(call.report().clone()),
            last_sent: now,
            last_heard: now,
            deadline,
            alarm: Box::pin(sleep_until(now)),
            ending: Box::pin(streams_end.cancelled_owned()),
            revoked: call.ended.clone().map(|ended| Box::pin(ended.cancelled_owned())),
            prompt_tokens,
            splitter: Splitter::default(),
            batch: Batch::default(),
            frames: VecDeque::new(),
            sequence: 0,
            failure: None,
        };
        call.report().model(&generation.order.model);
        call.report().task(&generation.order.task);
        let happened = generation.wait_for_answer().await?;
        generation.frames.push_back(generation.order.started());
        if let Some(Happened::Opened(opened)) = happened
            && let Err(error) = generation.open(opened)
        {
            generation.fail(error);
        }
        Ok(generation)
    }

    /// Waits until an engine answers, also where its first token takes longer.
    async fn wait_for_answer(&mut self) -> Result<Option<Happened>, Error> {
        let (answered, due) = (self.answered.clone(), self.due());
        self.alarm.as_mut().reset(due);
        tokio::select! {
            biased;
            happened = self.wait() => match happened? {
                Happened::Opened(opened) => return Ok(Some(Happened::Opened(opened))),
                Happened::Read | Happened::Alarm => self.check_time()?,
            },
            () = answered.cancelled() => {}
        }
        Ok(None)
    }

    /// The next frame of the stream; after `failed`, its status; none after the end.
    pub(crate) async fn next(&mut self) -> Option<Result<StreamGenerateCodeResponse, Status>> {
        loop {
            if let Some(event) = self.frames.pop_front() {
                let sequence = self.sequence;
                self.sequence += 1;
                return Some(Ok(StreamGenerateCodeResponse { sequence, event: Some(event) }));
            }
            if let Some(status) = self.failure.take() {
                return Some(Err(status));
            }
            match &mut self.source {
                Source::Ended => return None,
                Source::Closing(opened) => {
                    opened.tokens.close().await;
                    self.source = Source::Ended;
                }
                Source::Opening(_) | Source::Open(_) => {
                    if let Err(error) = self.advance().await {
                        self.fail(error);
                    }
                }
            }
        }
    }

    async fn advance(&mut self) -> Result<(), Error> {
        match self.wait().await {
            Ok(Happened::Opened(opened)) => self.open(opened)?,
            Ok(Happened::Read) => self.take_batch()?,
            Ok(Happened::Alarm) => {
                // The alarm may have come between two chunks that were to be taken together.
                self.take_text();
                self.check_time()?;
                if Instant::now() >= self.last_sent + self.patience.heartbeat {
                    self.send(Event::Heartbeat(Heartbeat {}));
                }
            }
            Err(error) => {
                // What came in the same read before the break is the caller's.
                self.take_text();
                return Err(error);
            }
        }
        Ok(())
    }

    /// Takes what came with the first token, and that it broke in the same read, where it did.
    fn open(&mut self, mut opened: Box<Opened<Batch>>) -> Result<(), Error> {
        self.batch = std::mem::take(&mut opened.events);
        let broke = opened.broke.take();
        self.source = Source::Open(opened);
        let Some(error) = broke else { return self.take_batch() };
        self.take_text();
        Err(error.into())
    }

    /// Tells the lease what was used until now: as the engine says, else by what was read. What no
    /// engine answered, none has read.
    fn count(&mut self) {
        if !self.answered.is_cancelled() {
            return;
        }
        let Some(lease) = &mut self.order.lease else { return };
        lease.count(match &self.batch.usage {
            Some(usage) => usage.total_tokens.into(),
            None => self.prompt_tokens.saturating_add(self.batch.pieces.into()),
        });
    }

    /// Waits for the engine, the earliest time that means something, or the end of the server.
    async fn wait(&mut self) -> Result<Happened, Error> {
        let (source, batch) = (&mut self.source, &mut self.batch);
        let heard = async {
            match source {
                Source::Opening(opening) => {
                    opening.await.map(|opened| Happened::Opened(Box::new(opened)))
                }
                Source::Open(opened) => {
                    opened.tokens.read(batch).await?;
                    Ok(Happened::Read)
                }
                Source::Closing(_) | Source::Ended => std::future::pending().await,
            }
        };
        let happened = tokio::select! {
            biased;
            () = &mut self.ending => return Err(Error::ShuttingDown),
            () = fired(&mut self.revoked) => return Err(Error::KeyEnded),
            heard = heard => heard?,
            () = &mut self.alarm => Happened::Alarm,
        };
        if !matches!(happened, Happened::Alarm) {
            self.last_heard = Instant::now();
            // An engine that never pauses leaves the alarm no turn.
            if self.last_heard >= self.deadline {
                return Err(Error::TimeUp);
            }
        }
        Ok(happened)
    }

    fn check_time(&mut self) -> Result<(), Error> {
        let now = Instant::now();
        if now >= self.deadline {
            return Err(Error::TimeUp);
        }
        if now >= self.silence_ends() {
            return Err(if self.first_token.is_some() {
                Error::Stalled
            } else {
                Error::NoFirstToken
            });
        }
        let due = self.due();
        self.alarm.as_mut().reset(due);
        Ok(())
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

    fn send(&mut self, event: Event) {
        self.last_sent = Instant::now();
        self.frames.push_back(event);
    }

    /// Turns what was read into frames.
    fn take_batch(&mut self) -> Result<(), Error> {
        self.take_text();
        self.count();
        if !self.batch.done {
            return Ok(());
        }
        // [DONE] follows errors too: only a reason says that the answer is whole.
        let reason = self.batch.finish_reason.take();
        let Some(finish_reason) =
            reason.filter(|reason| !matches!(reason.as_str(), "abort" | "error"))
        else {
            return Err(engine::Error::Truncated.into());
        };
        self.end_text();
        let usage = self.batch.usage.take();
        self.tell(usage.as_ref());
        let finished = Finished {
            finish_reason,
            usage,
            time_to_first_token_ms: self.first_token.map_or(0, |at| millis(at - self.arrived)),
            response_time_ms: millis(self.arrived.elapsed()),
            warnings: std::mem::take(&mut self.order.warnings),
        };
        self.send(Event::Finished(finished));
        self.order.turn.take();
        if let Source::Open(opened) = std::mem::replace(&mut self.source, Source::Ended) {
            self.source = Source::Closing(opened);
        }
        Ok(())
    }

    fn take_text(&mut self) {
        if self.batch.text.is_empty() {
            return;
        }
        let now = Instant::now();
        self.last_token = Some(now);
        if self.first_token.is_none() {
            self.first_token = Some(now);
            metrics::histogram!("gen_ai_server_time_to_first_token_seconds")
                .record(now - self.arrived);
        }
        let text = std::mem::take(&mut self.batch.text);
        let (splitter, frames) = (&mut self.splitter, &mut self.frames);
        splitter.push(&text, &mut |kind, text| add_delta(frames, kind, text));
        self.last_sent = self.last_heard;
    }

    /// Says once what was used: as the engine counted, else as far as it is known.
    fn tell(&mut self, usage: Option<&Usage>) {
        let Some(report) = self.report.take() else { return };
        account(usage);
        let (prompt, tokens) = match usage {
            Some(usage) => (usage.prompt_tokens, usage.completion_tokens),
            // An engine that never answered has read nothing.
            None if !self.answered.is_cancelled() => (0, 0),
            None => (u32::try_from(self.prompt_tokens).unwrap_or(u32::MAX), self.batch.pieces),
        };
        report.tokens(prompt, tokens);
        let Some((first, last)) = self.first_token.zip(self.last_token) else { return };
        report.time_to_first_token(first - self.arrived);
        if let Some(gaps) = tokens.checked_sub(1).filter(|gaps| *gaps > 0) {
            report.between_tokens((last - first) / gaps);
        }
    }

    fn end_text(&mut self) {
        let (splitter, frames) = (&mut self.splitter, &mut self.frames);
        splitter.end(&mut |kind, text| add_delta(frames, kind, text));
    }

    fn fail(&mut self, error: Error) {
        self.end_text();
        self.count();
        let usage = self.batch.usage.take();
        self.tell(usage.as_ref());
        let partial = self.first_token.is_some();
        let fault: Fault = error.fault(partial);
        let failed = Failed {
            error_code: fault.code().to_string(),
            message: fault.message().to_owned(),
            incident_id: fault.incident_id().to_owned(),
            partial,
        };
        self.send(Event::Failed(failed));
        self.failure = Some(fault.into());
        // Dropping the source is what stops the engine.
        self.source = Source::Ended;
        self.order.turn.take();
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        // A caller who left: what was read until then was used.
        if self.report.is_some() {
            self.count();
        }
        let usage = self.batch.usage.take();
        self.tell(usage.as_ref());
    }
}

async fn fired(token: &mut Option<Pin<Box<WaitForCancellationFutureOwned>>>) {
    match token {
        Some(token) => token.await,
        None => std::future::pending().await,
    }
}

fn account(usage: Option<&Usage>) {
    let Some(usage) = usage else { return };
    for (kind, tokens) in [("input", usage.prompt_tokens), ("output", usage.completion_tokens)] {
        metrics::counter!("hapa_ai_tokens_used_total", "type" => kind).increment(tokens.into());
    }
}

/// Neighbours of one kind become one frame.
fn add_delta(frames: &mut VecDeque<Event>, kind: Kind, text: &str) {
    match frames.back_mut() {
        Some(Event::Delta(last)) if last.kind == kind as i32 => last.text.push_str(text),
        _ => frames.push_back(Event::Delta(Delta { text: text.to_owned(), kind: kind.into() })),
    }
}

pub(crate) fn millis(span: Duration) -> u32 {
    u32::try_from(span.as_millis()).unwrap_or(u32::MAX)
}
