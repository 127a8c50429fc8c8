//! Plays a script on a connection: the only place that combines pace, framing and faults.
//!
//! Invariants: all previous events are on the wire before a hold, a silence or an end. A stream has one
//! timer. Only the client or `Engine::stop` end a `pending`.

mod choices;

use std::future::pending;
use std::io;
use std::time::Duration;

use tokio::io::AsyncWriteExt as _;
use tokio::net::tcp::WriteHalf;
use tokio::time::{Instant, Interval, interval_at};

use super::Shared;
use super::http::{LAST_FRAME, Response, frame, stream_head};
use super::ledger::{ActiveGeneration, Outcome};
use super::request::{Api, GenerationRequest};
use super::script::{Fault, LineEnd, Script, UsageReport};
use super::shapes::{self, ChunkWriter, Usage};

const BROKEN: &str = "EngineCore encountered an issue. See stack trace (above) for the root cause.";
const ENDLESS_LINE_BYTES: usize = 64 * 1024 * 1024;
const ENDLESS_PIECE_BYTES: usize = 64 * 1024;

pub(super) struct Player<'a, 'w, 'f> {
    shared: &'a Shared,
    script: &'a Script,
    out: &'a mut WriteHalf<'w>,
    generation: &'a mut ActiveGeneration<'f>,
    /// The events that are not yet written, and the number of their tokens.
    body: Vec<u8>,
    events: usize,
    tokens: u64,
    /// The buffer of a write, reused for its allocation.
    wire: Vec<u8>,
}

/// Whether the body continues after a write.
#[derive(Clone, Copy, PartialEq, Eq)]
enum BodyState {
    Follows,
    Ends,
}

impl<'a, 'w, 'f> Player<'a, 'w, 'f> {
    pub(super) fn new(
        shared: &'a Shared,
        script: &'a Script,
        out: &'a mut WriteHalf<'w>,
        generation: &'a mut ActiveGeneration<'f>,
    ) -> Self {
        Self {
            shared,
            script,
            out,
            generation,
            body: Vec::new(),
            events: 0,
            tokens: 0,
            wire: Vec::new(),
        }
    }

    pub(super) async fn answer(mut self, request: &GenerationRequest) -> io::Result<Outcome> {
        self.shared.wait_while_frozen().await;
        match &self.script.fault {
            Some(Fault::Status { code, retry_after }) => {
                return self.refuse(*code, *retry_after).await;
            }
            Some(Fault::Reply { code, body }) => {
                let is_json = body.starts_with(['{', '[']);
                let kind = if is_json { "application/json" } else { "text/html" };
                let response = Response::new(*code, kind, body.as_str());
                self.out.write_all(&response.bytes()).await?;
                return Ok(Outcome::Finished(None));
            }
            Some(Fault::HangBeforeHeaders) => return pending().await,
            Some(Fault::CutBeforeHeaders) => return Ok(Outcome::Cut),
            _ => {}
        }
        self.generation.run(&request.model, request.prompt_tokens);
        match request.api {
            Api::Completion { .. } => self.complete(request).await,
            Api::Chat if request.stream => self.stream(request).await,
            Api::Chat => self.whole(request).await,
        }
    }

    async fn refuse(&mut self, code: u16, retry_after: Option<u32>) -> io::Result<Outcome> {
        let body = match code {
            401 => shapes::unauthorized(),
            429 => shapes::error(429, "Too many requests: try again later.", None),
            503 => shapes::error(503, "The queue is full. Please try again later.", None),
            _ => shapes::error(code, BROKEN, None),
        };
        let response = Response { retry_after, ..Response::json(code, &body) };
        self.out.write_all(&response.bytes()).await?;
        Ok(Outcome::Finished(None))
    }

    async fn stream(&mut self, request: &GenerationRequest) -> io::Result<Outcome> {
        self.out.write_all(&stream_head()).await?;
        if self.script.fault == Some(Fault::HangAfterHeaders) {
            return pending().await;
        }
        sleep_unless_zero(self.script.first_after).await;
        let chunks = ChunkWriter::new(request);
        self.event(|body| chunks.role(body)).await?;
        let length = length(self.script, request);
        let mut pace = pace(self.script.gap);
        for sent in 0..=length {
            self.wait_at_holds(sent, length, &mut pace).await?;
            if let Some(fault) = fault_at(self.script, sent, length) {
                return self.fail(fault).await;
            }
            if let Some(token) = self.script.tokens[..length].get(sent) {
                if sent > 0
                    && let Some(pace) = &mut pace
                {
                    pace.tick().await;
                }
                self.tokens += 1;
                let with_this = sent as u64 + 1;
                let is_reasoning = sent < self.script.reasoning;
                let field = if is_reasoning { "reasoning" } else { "content" };
                self.event(|body| chunks.token(field, &token.json, with_this, body)).await?;
            }
        }
        self.conclude(request, &chunks).await
    }

    async fn conclude(
        &mut self,
        request: &GenerationRequest,
        chunks: &ChunkWriter,
    ) -> io::Result<Outcome> {
        let sent = length(self.script, request) as u64;
        let finish = finish(self.script, request);
        if let Some(reason) = finish {
            self.event(|body| chunks.finish(reason, sent, body)).await?;
        }
        if request.include_usage
            && let Some(usage) = usage(self.script, request)
        {
            self.event(|body| chunks.usage(usage, body)).await?;
        }
        if self.script.done {
            self.done();
        }
        self.flush(BodyState::Ends).await?;
        Ok(Outcome::Finished(finish))
    }

    async fn fail(&mut self, fault: &Fault) -> io::Result<Outcome> {
        match fault {
            Fault::EndAfter(_) => self.flush(BodyState::Ends).await?,
            Fault::ErrorAfter(_) => {
                let error = shapes::error(500, BROKEN, None).to_string();
                self.event(|body| body.extend_from_slice(error.as_bytes())).await?;
                self.done();
                self.flush(BodyState::Ends).await?;
            }
            Fault::EventAfter(_, event) => {
                let event = event.to_string();
                self.event(|body| body.extend_from_slice(event.as_bytes())).await?;
                self.done();
                self.flush(BodyState::Ends).await?;
            }
            Fault::EndlessLineAfter(_) => {
                self.body.extend_from_slice(br#"data: {"id":""#);
                for _ in 0..ENDLESS_LINE_BYTES / ENDLESS_PIECE_BYTES {
                    self.body.resize(self.body.len() + ENDLESS_PIECE_BYTES, b'x');
                    self.flush(BodyState::Follows).await?;
                }
                return Ok(Outcome::Cut);
            }
            Fault::CutAfter(_) => {
                self.flush(BodyState::Follows).await?;
                return Ok(Outcome::Cut);
            }
            _ => {
                self.flush(BodyState::Follows).await?;
                return pending().await;
            }
        }
        Ok(Outcome::Finished(None))
    }

    /// Plays the script without a stream: it waits for the stream's time and holds, then writes everything.
    async fn whole(&mut self, request: &GenerationRequest) -> io::Result<Outcome> {
        let length = length(self.script, request);
        let gaps = u32::try_from(length.saturating_sub(1)).unwrap_or(u32::MAX);
        sleep_unless_zero(self.script.first_after + self.script.gap * gaps).await;
        for _ in &self.script.holds {
            self.shared.wait_for_release().await;
        }
        let text: String = self.script.tokens[..length].iter().map(|t| t.text.as_str()).collect();
        let finish = finish(self.script, request);
        let body = shapes::completion(request, &text, finish, usage(self.script, request));
        let response = Response::json(200, &body);
        match self.script.fault {
            Some(Fault::StallAfter(_)) => return pending().await,
            Some(Fault::ErrorAfter(_)) => return self.refuse(500, None).await,
            _ => self.out.write_all(&response.head()).await?,
        }
        match self.script.fault {
            None => {}
            Some(Fault::HangAfterHeaders) => return pending().await,
            Some(_) => {
                self.out.write_all(&response.body[..response.body.len() / 2]).await?;
                return Ok(Outcome::Cut);
            }
        }
        self.generation.send(length as u64);
        let piece = self.script.pieces.unwrap_or(response.body.len());
        for piece in response.body.chunks(piece) {
            self.out.write_all(piece).await?;
            sleep_unless_zero(self.script.piece_gap).await;
        }
        Ok(Outcome::Finished(finish))
    }

    async fn wait_at_holds(
        &mut self,
        sent: usize,
        length: usize,
        pace: &mut Option<Interval>,
    ) -> io::Result<()> {
        let script = self.script;
        for _ in script.holds.iter().filter(|hold| (**hold).min(length) == sent) {
            self.flush(BodyState::Follows).await?;
            self.shared.wait_for_release().await;
            if let Some(pace) = pace {
                pace.reset(); // the time at the hold is not caught up
            }
        }
        Ok(())
    }

    /// Adds an event, and writes if the batch is full.
    async fn event(&mut self, data: impl FnOnce(&mut Vec<u8>)) -> io::Result<()> {
        let end = self.line_end();
        if self.script.comments {
            self.body.extend_from_slice(b": keep-alive");
            self.body.extend_from_slice(end);
            self.body.extend_from_slice(end);
        }
        self.body.extend_from_slice(b"data: ");
        data(&mut self.body);
        self.body.extend_from_slice(end);
        self.body.extend_from_slice(end);
        self.events += 1;
        if self.events >= self.script.batch { self.flush(BodyState::Follows).await } else { Ok(()) }
    }

    /// Adds `[DONE]`. It is written together with the end of the body, so that a client that disconnects
    /// after it has the whole answer.
    fn done(&mut self) {
        let end = self.line_end();
        for part in [b"data: [DONE]", end, end] {
            self.body.extend_from_slice(part);
        }
    }

    fn line_end(&self) -> &'static [u8] {
        match self.script.line_end {
            LineEnd::Lf => b"\n",
            LineEnd::CrLf => b"\r\n",
        }
    }

    async fn flush(&mut self, more: BodyState) -> io::Result<()> {
        self.shared.wait_while_frozen().await;
        self.generation.send(std::mem::take(&mut self.tokens));
        self.events = 0;
        let piece = self.script.pieces.unwrap_or(self.body.len()).max(1);
        let mut pieces = self.body.chunks(piece).peekable();
        loop {
            self.wire.clear();
            frame(pieces.next().unwrap_or_default(), &mut self.wire);
            let last = pieces.peek().is_none();
            if last && more == BodyState::Ends {
                self.wire.extend_from_slice(LAST_FRAME);
            }
            self.out.write_all(&self.wire).await?;
            if last {
                break;
            }
            sleep_unless_zero(self.script.piece_gap).await;
        }
        self.body.clear();
        Ok(())
    }
}

/// Sleeps. A zero duration skips the timer, because it rounds up to a millisecond.
async fn sleep_unless_zero(time: Duration) {
    if time > Duration::ZERO {
        tokio::time::sleep(time).await;
    }
}

fn pace(gap: Duration) -> Option<Interval> {
    (gap > Duration::ZERO).then(|| interval_at(Instant::now() + gap, gap))
}

/// The number of tokens: those of the script, unless the request allows fewer.
fn length(script: &Script, request: &GenerationRequest) -> usize {
    script.tokens.len().min(request.max_tokens.unwrap_or(usize::MAX))
}

fn finish(script: &Script, request: &GenerationRequest) -> Option<&'static str> {
    let short = length(script, request) < script.tokens.len();
    if short { script.finish.and(Some("length")) } else { script.finish }
}

fn usage(script: &Script, request: &GenerationRequest) -> Option<Usage> {
    match script.usage {
        UsageReport::Counted => {
            let completion = length(script, request) as u64;
            Some(Usage { prompt: request.prompt_tokens, completion })
        }
        UsageReport::Fixed { prompt, completion } => Some(Usage { prompt, completion }),
        UsageReport::Omitted => None,
    }
}

/// The fault after `sent` of `length` tokens.
fn fault_at(script: &Script, sent: usize, length: usize) -> Option<&Fault> {
    let fault = script.fault.as_ref()?;
    let after = match fault {
        Fault::StallAfter(n)
        | Fault::CutAfter(n)
        | Fault::EndAfter(n)
        | Fault::ErrorAfter(n)
        | Fault::EventAfter(n, _)
        | Fault::EndlessLineAfter(n) => *n,
        _ => return None,
    };
    (after.min(length) == sent).then_some(fault)
}
