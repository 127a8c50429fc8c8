//! Plays a script on a connection: the only place where pace, framing and faults meet.
//!
//! Kept true: whatever was said so far is on the wire before a hold, a silence or an end, and a
//! stream has one timer. A `pending` here is ended by the client or by `Engine::stop`, both outside.

mod choices;

use std::future::pending;
use std::io;
use std::time::Duration;

use tokio::io::AsyncWriteExt as _;
use tokio::net::tcp::WriteHalf;
use tokio::time::{Instant, Interval, interval_at};

use super::Shared;
use super::http::{LAST_FRAME, Response, frame, stream_head};
use super::ledger::{End, Flight};
use super::request::{Api, Ask};
use super::script::{Fault, LineEnd, Report, Script};
use super::shapes::{self, Chunks, Usage};

const BROKEN: &str = "EngineCore encountered an issue. See stack trace (above) for the root cause.";
const ENDLESS: usize = 64 * 1024 * 1024;
const ENDLESS_PIECE: usize = 64 * 1024;

pub(super) struct Player<'a, 'w, 'f> {
    shared: &'a Shared,
    script: &'a Script,
    out: &'a mut WriteHalf<'w>,
    flight: &'a mut Flight<'f>,
    /// Events that wait for their write, and how many tokens are among them.
    body: Vec<u8>,
    events: usize,
    tokens: u64,
    /// What a write sends, kept for its allocation.
    wire: Vec<u8>,
}

/// Whether the body goes on after a write.
#[derive(Clone, Copy, PartialEq, Eq)]
enum More {
    Follows,
    Ends,
}

impl<'a, 'w, 'f> Player<'a, 'w, 'f> {
    pub(super) fn new(
        shared: &'a Shared,
        script: &'a Script,
        out: &'a mut WriteHalf<'w>,
        flight: &'a mut Flight<'f>,
    ) -> Self {
        Self {
            shared,
            script,
            out,
            flight,
            body: Vec::new(),
            events: 0,
            tokens: 0,
            wire: Vec::new(),
        }
    }

    pub(super) async fn answer(mut self, ask: &Ask) -> io::Result<End> {
        self.shared.pass_frost().await;
        match self.script.fault {
            Some(Fault::Status { code, retry_after }) => {
                return self.refuse(code, retry_after).await;
            }
            Some(Fault::HangBeforeHeaders) => return pending().await,
            Some(Fault::CutBeforeHeaders) => return Ok(End::Cut),
            _ => {}
        }
        self.flight.run(&ask.model, ask.prompt_tokens);
        match ask.api {
            Api::Completion { .. } => self.complete(ask).await,
            Api::Chat if ask.stream => self.stream(ask).await,
            Api::Chat => self.whole(ask).await,
        }
    }

    async fn refuse(&mut self, code: u16, retry_after: Option<u32>) -> io::Result<End> {
        let body = match code {
            401 => shapes::unauthorized(),
            429 => shapes::error(429, "Too many requests: try again later.", None),
            503 => shapes::error(503, "The queue is full. Please try again later.", None),
            _ => shapes::error(code, BROKEN, None),
        };
        let response = Response { retry_after, ..Response::json(code, &body) };
        self.out.write_all(&response.bytes()).await?;
        Ok(End::Finished(None))
    }

    async fn stream(&mut self, ask: &Ask) -> io::Result<End> {
        self.out.write_all(&stream_head()).await?;
        if self.script.fault == Some(Fault::HangAfterHeaders) {
            return pending().await;
        }
        rest(self.script.first_after).await;
        let chunks = Chunks::new(ask);
        self.event(|body| chunks.role(body)).await?;
        let length = length(self.script, ask);
        let mut pace = pace(self.script.gap);
        for sent in 0..=length {
            self.pass_holds(sent, length, &mut pace).await?;
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
                self.event(|body| chunks.token(&token.json, with_this, body)).await?;
            }
        }
        self.conclude(ask, &chunks).await
    }

    async fn conclude(&mut self, ask: &Ask, chunks: &Chunks) -> io::Result<End> {
        let sent = length(self.script, ask) as u64;
        let finish = finish(self.script, ask);
        if let Some(reason) = finish {
            self.event(|body| chunks.finish(reason, sent, body)).await?;
        }
        if ask.include_usage
            && let Some(usage) = usage(self.script, ask)
        {
            self.event(|body| chunks.usage(usage, body)).await?;
        }
        if self.script.done {
            self.done();
        }
        self.flush(More::Ends).await?;
        Ok(End::Finished(finish))
    }

    async fn fail(&mut self, fault: &Fault) -> io::Result<End> {
        match fault {
            Fault::EndAfter(_) => self.flush(More::Ends).await?,
            Fault::ErrorAfter(_) => {
                let error = shapes::error(500, BROKEN, None).to_string();
                self.event(|body| body.extend_from_slice(error.as_bytes())).await?;
                self.done();
                self.flush(More::Ends).await?;
            }
            Fault::EndlessLineAfter(_) => {
                self.body.extend_from_slice(br#"data: {"id":""#);
                for _ in 0..ENDLESS / ENDLESS_PIECE {
                    self.body.resize(self.body.len() + ENDLESS_PIECE, b'x');
                    self.flush(More::Follows).await?;
                }
                return Ok(End::Cut);
            }
            Fault::CutAfter(_) => {
                self.flush(More::Follows).await?;
                return Ok(End::Cut);
            }
            _ => {
                self.flush(More::Follows).await?;
                return pending().await;
            }
        }
        Ok(End::Finished(None))
    }

    /// The same script without a stream: the time it takes, the holds, then all of it at once.
    async fn whole(&mut self, ask: &Ask) -> io::Result<End> {
        let length = length(self.script, ask);
        let gaps = u32::try_from(length.saturating_sub(1)).unwrap_or(u32::MAX);
        rest(self.script.first_after + self.script.gap * gaps).await;
        for _ in &self.script.holds {
            self.shared.pass_gate().await;
        }
        let text: String = self.script.tokens[..length].iter().map(|t| t.text.as_str()).collect();
        let finish = finish(self.script, ask);
        let body = shapes::completion(ask, &text, finish, usage(self.script, ask));
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
                return Ok(End::Cut);
            }
        }
        self.flight.send(length as u64);
        let piece = self.script.pieces.unwrap_or(response.body.len());
        for piece in response.body.chunks(piece) {
            self.out.write_all(piece).await?;
            rest(self.script.piece_gap).await;
        }
        Ok(End::Finished(finish))
    }

    async fn pass_holds(
        &mut self,
        sent: usize,
        length: usize,
        pace: &mut Option<Interval>,
    ) -> io::Result<()> {
        let script = self.script;
        for _ in script.holds.iter().filter(|hold| (**hold).min(length) == sent) {
            self.flush(More::Follows).await?;
            self.shared.pass_gate().await;
            if let Some(pace) = pace {
                pace.reset(); // the time at the gate is not to be caught up
            }
        }
        Ok(())
    }

    /// Adds an event, and writes when the batch is full.
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
        if self.events >= self.script.batch { self.flush(More::Follows).await } else { Ok(()) }
    }

    /// Adds `[DONE]`; it leaves together with the end of the body, so that a client that hangs up
    /// on it has always had the whole answer.
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

    async fn flush(&mut self, more: More) -> io::Result<()> {
        self.shared.pass_frost().await;
        self.flight.send(std::mem::take(&mut self.tokens));
        self.events = 0;
        let piece = self.script.pieces.unwrap_or(self.body.len()).max(1);
        let mut pieces = self.body.chunks(piece).peekable();
        loop {
            self.wire.clear();
            frame(pieces.next().unwrap_or_default(), &mut self.wire);
            let last = pieces.peek().is_none();
            if last && more == More::Ends {
                self.wire.extend_from_slice(LAST_FRAME);
            }
            self.out.write_all(&self.wire).await?;
            if last {
                break;
            }
            rest(self.script.piece_gap).await;
        }
        self.body.clear();
        Ok(())
    }
}

/// Sleeps, but not for nothing: the timer rounds up to a millisecond, which a first token would pay.
async fn rest(time: Duration) {
    if time > Duration::ZERO {
        tokio::time::sleep(time).await;
    }
}

fn pace(gap: Duration) -> Option<Interval> {
    (gap > Duration::ZERO).then(|| interval_at(Instant::now() + gap, gap))
}

/// How many tokens there will be: the script's, unless the request allows fewer.
fn length(script: &Script, ask: &Ask) -> usize {
    script.tokens.len().min(ask.max_tokens.unwrap_or(usize::MAX))
}

fn finish(script: &Script, ask: &Ask) -> Option<&'static str> {
    let short = length(script, ask) < script.tokens.len();
    if short { script.finish.and(Some("length")) } else { script.finish }
}

fn usage(script: &Script, ask: &Ask) -> Option<Usage> {
    match script.usage {
        Report::Counted => {
            let completion = length(script, ask) as u64;
            Some(Usage { prompt: ask.prompt_tokens, completion })
        }
        Report::Fixed { prompt, completion } => Some(Usage { prompt, completion }),
        Report::Omitted => None,
    }
}

/// The fault that is due when `sent` of `length` tokens are out.
fn fault_at(script: &Script, sent: usize, length: usize) -> Option<&Fault> {
    let fault = script.fault.as_ref()?;
    let after = match fault {
        Fault::StallAfter(n)
        | Fault::CutAfter(n)
        | Fault::EndAfter(n)
        | Fault::ErrorAfter(n)
        | Fault::EndlessLineAfter(n) => *n,
        _ => return None,
    };
    (after.min(length) == sent).then_some(fault)
}
