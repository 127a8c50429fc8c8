//! One answer on its way, whoever reads it: opened, read, split into code and explanation, and ended in exactly one of
//! two ways, `finished` or `failed`.
//!
//! It is pulled: nothing runs unless the caller's side asks for the next event, so there is no task
//! and no channel to leak, and dropping it at any await closes the engine's connection.

use std::collections::VecDeque;
use std::pin::Pin;

use hapa_core::call::Call;
use hapa_core::call_stats::CallStats;
use hapa_core::rpc_error::{ErrorCode, RpcError};
use hapa_proto::codegen::v1::Usage;
use hapa_proto::codegen::v1::stream_generate_code_response::{
    Delta, Event, Failed, Finished, Kind, Started,
};
use hapa_telemetry::trace::SpanHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::error::Error;
use crate::generate::fence::{FenceSplitter, Segment};
use crate::order::Order;
use crate::request::unicode::InvisibleCharFilter;
use crate::upstream::engine::{EngineError, Operation, StreamDelta};
use crate::upstream::pool::{DispatchError, EnginePool, StartedStream};
use crate::upstream::span;
use crate::validate::CodeInspector;
use crate::watch::{Patience, Watch, account, prompt_tokens};

type Opening =
    Pin<Box<dyn Future<Output = Result<StartedStream<StreamDelta>, DispatchError>> + Send>>;

enum Source {
    /// No token has come yet.
    Opening(Opening),
    Open(Box<StartedStream<StreamDelta>>),
    /// All was said; the connection can be kept for the next call once its end was read.
    Closing(Box<StartedStream<StreamDelta>>),
    /// Nothing more will be read: the connection is closed or done.
    Ended,
}

/// What happened while waiting.
enum Happened {
    Opened(Box<StartedStream<StreamDelta>>),
    Read,
    Alarm,
}

pub(crate) struct Generation {
    source: Source,
    /// Fires when an engine has answered.
    answered: CancellationToken,
    order: Order,
    watch: Watch,
    /// Where it says once what it used.
    report: Option<CallStats>,
    /// Its span, and since when an engine is waited for.
    part: SpanHandle,
    asked: Instant,
    /// About as many tokens as the prompt has, until the engine says.
    prompt_tokens: u32,
    char_filter: InvisibleCharFilter,
    splitter: FenceSplitter,
    batch: StreamDelta,
    events: VecDeque<Event>,
    failure: Option<Status>,
}

impl Generation {
    /// Asks the engine, and waits for its answer to begin as long as nothing need be sent: so that
    /// an engine that refuses at once gives a plain status and no stream.
    pub(crate) async fn begin(
        pool: &EnginePool,
        mut order: Order,
        call: &Call,
        patience: Patience,
        streams_end: CancellationToken,
    ) -> Result<Generation, Error> {
        let (pool, answered) = (pool.clone(), CancellationToken::new());
        let prompt_tokens = prompt_tokens(&order.body);
        let part = span::start(Operation::Chat, &order.model, order.sampling);
        let request = order.request(call.stats(), &answered, part.span());
        let mut generation = Generation {
            source: Source::Opening(Box::pin(async move { pool.start_stream(request).await })),
            answered,
            order,
            watch: Watch::of_engine(call, patience, streams_end),
            report: Some(call.stats().clone()),
            part,
            asked: Instant::now(),
            prompt_tokens,
            char_filter: InvisibleCharFilter::default(),
            splitter: FenceSplitter::default(),
            batch: StreamDelta::default(),
            events: VecDeque::new(),
            failure: None,
        };
        let happened = generation.wait_for_answer().await.inspect_err(|error| {
            let part = std::mem::take(&mut generation.part);
            part.fail(error.kind(), "no answer has begun");
        })?;
        generation.events.push_back(Event::Started(Started::default()));
        if let Some(Happened::Opened(opened)) = happened
            && let Err(error) = generation.open(opened)
        {
            generation.fail(error);
        }
        Ok(generation)
    }

    /// Waits until an engine answers, also where its first token takes longer.
    async fn wait_for_answer(&mut self) -> Result<Option<Happened>, Error> {
        let answered = self.answered.clone();
        tokio::select! {
            biased;
            happened = self.wait() => match happened? {
                Happened::Opened(opened) => return Ok(Some(Happened::Opened(opened))),
                Happened::Read | Happened::Alarm => self.watch.check()?,
            },
            () = answered.cancelled() => {}
        }
        Ok(None)
    }

    /// The next event; after `failed`, its status; none after the end.
    pub(crate) async fn next(&mut self) -> Option<Result<Event, Status>> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Some(Ok(event));
            }
            if let Some(status) = self.failure.take() {
                return Some(Err(status));
            }
            match &mut self.source {
                Source::Ended => return None,
                Source::Closing(opened) => {
                    opened.stream.close().await;
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
                self.watch.check()?;
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
    fn open(&mut self, mut opened: Box<StartedStream<StreamDelta>>) -> Result<(), Error> {
        self.batch = std::mem::take(&mut opened.events);
        self.part.set_server(opened.endpoint_name());
        if let Some(model) = self.batch.model.take().filter(|model| opened.is_served_model(model)) {
            span::set_response_model(&self.part, model);
        }
        let broke = opened.error.take();
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
        lease.record_usage(match &self.batch.usage {
            Some(usage) => usage.total_tokens.into(),
            None => i64::from(self.prompt_tokens) + i64::from(self.batch.text_events),
        });
    }

    /// Waits for the engine, the earliest time that means something, or the end of the server.
    async fn wait(&mut self) -> Result<Happened, Error> {
        let (source, batch) = (&mut self.source, &mut self.batch);
        let heard = async {
            match source {
                Source::Opening(opening) => {
                    Ok::<_, Error>(Happened::Opened(Box::new(opening.await?)))
                }
                Source::Open(opened) => {
                    opened.stream.read(batch).await?;
                    Ok(Happened::Read)
                }
                Source::Closing(_) | Source::Ended => std::future::pending().await,
            }
        };
        let happened = self.watch.on(heard).await?.unwrap_or(Happened::Alarm);
        if !matches!(happened, Happened::Alarm) {
            self.watch.heard()?;
        }
        Ok(happened)
    }

    /// Turns what was read into events.
    fn take_batch(&mut self) -> Result<(), Error> {
        self.take_text();
        self.count();
        if !self.batch.done {
            return Ok(());
        }
        // [DONE] follows errors too: only a reason says that the answer is whole.
        let reason = self.batch.finish_reason.take();
        let Some(reason) = reason.filter(|reason| !reason.is_failure()) else {
            return Err(EngineError::Truncated.into());
        };
        self.end_text();
        let finish_reason = reason.as_str().to_owned();
        span::set_finish_reasons(&self.part, &[&finish_reason]);
        let usage = self.batch.usage.take();
        self.tell(usage.as_ref());
        let warnings = self.warnings(finish_reason == "length");
        let finished = Finished { finish_reason, usage, warnings, ..Finished::default() };
        self.events.push_back(Event::Finished(finished));
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
        if self.watch.text() {
            span::record_first_token(&self.part);
        }
        if let Some(report) = &self.report {
            report.upstream_chunk_at(self.watch.last_heard());
        }
        let text = std::mem::take(&mut self.batch.text);
        let text = self.char_filter.strip(&text);
        let (events, inspector) = (&mut self.events, &mut self.order.inspector);
        self.splitter
            .push(&text, &mut |segment, text| read_along(events, inspector, segment, text));
    }

    /// Says once what was used: as the engine counted, else as far as it is known.
    fn tell(&mut self, usage: Option<&Usage>) {
        let Some(report) = self.report.take() else { return };
        account(usage, Operation::Chat);
        let (prompt, tokens) = match usage {
            Some(usage) => (usage.prompt_tokens, usage.completion_tokens),
            // An engine that never answered has read nothing.
            None if !self.answered.is_cancelled() => (0, 0),
            None => (self.prompt_tokens, self.batch.text_events),
        };
        report.set_tokens(prompt, tokens);
        report.set_engine_time(self.asked.elapsed());
        self.watch.count_times(tokens);
        span::set_usage(&self.part, prompt, tokens);
        // Dropped here: what follows is on no engine's time.
        drop(std::mem::take(&mut self.part));
    }

    fn end_text(&mut self) {
        let (events, inspector) = (&mut self.events, &mut self.order.inspector);
        self.splitter.end(&mut |segment, text| read_along(events, inspector, segment, text));
    }

    /// Of a whole answer.
    fn warnings(&self, is_cut: bool) -> Vec<String> {
        let mut warnings = self.order.inspector.warnings(is_cut);
        if self.char_filter.removed_count > 0 {
            warnings.push("characters that can't be seen were removed from the answer".to_owned());
        }
        warnings
    }

    fn fail(&mut self, error: Error) {
        self.end_text();
        self.count();
        let partial = self.watch.has_text();
        let fault: RpcError = error.into_rpc_error(partial);
        span::record_error(&self.part, &fault);
        let usage = self.batch.usage.take();
        self.tell(usage.as_ref());
        self.events.push_back(failed(&fault, partial));
        self.failure = Some(fault.into());
        // Dropping the source is what stops the engine.
        self.source = Source::Ended;
        self.order.turn.take();
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        if self.report.is_none() {
            return;
        }
        // A caller who left: what was read until then was used.
        self.part.set("error.type", ErrorCode::StreamGivenUp.to_string());
        self.count();
        let usage = self.batch.usage.take();
        self.tell(usage.as_ref());
    }
}

/// The last event of an answer that failed.
pub(crate) fn failed(fault: &RpcError, partial: bool) -> Event {
    Event::Failed(Failed {
        error_code: fault.code().to_string(),
        message: fault.message().to_owned(),
        incident_id: fault.incident_id().to_owned(),
        partial,
    })
}

fn read_along(
    events: &mut VecDeque<Event>,
    inspector: &mut CodeInspector,
    segment: Segment<'_>,
    text: &str,
) {
    if segment.kind == Kind::Code {
        inspector.push(segment.block, segment.info_word, text);
    }
    add_delta(events, segment.kind, text);
}

/// Neighbours of one kind become one event.
pub(crate) fn add_delta(events: &mut VecDeque<Event>, kind: Kind, text: &str) {
    match events.back_mut() {
        Some(Event::Delta(last)) if last.kind == kind as i32 => last.text.push_str(text),
        _ => events.push_back(Event::Delta(Delta { text: text.to_owned(), kind: kind.into() })),
    }
}
