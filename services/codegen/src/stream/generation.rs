//! One answer of an engine, for all its subscribers. A generation waits for its permits, sends the request to an engine,
//! folds the deltas into the answer, and ends in exactly one of two ways, `Finished` or `Failed`.
//!
//! A generation is pulled: it advances only while it is polled. Dropping it closes the engine's connection, which aborts
//! the engine, and records what was used.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use hapa_core::call::Call;
use hapa_core::call_stats::CallStats;
use hapa_core::rpc_error::RpcError;
use tokio::time::{Instant, Sleep, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

use super::accounting::{Accounting, EndOfGeneration};
use super::deadlines::{StreamDeadlines, Timeouts};
use super::fold::Fold;
use super::item::{Failure, StreamItem, Track};
use crate::error::Error;
use crate::request::task::Sampling;
use crate::schedule::budget::Estimate;
use crate::schedule::fair_queue::WorkKind;
use crate::schedule::{Permits, Scheduler};
use crate::upstream::engine::{EngineDelta, EngineError, Operation, ReadOutcome};
use crate::upstream::pool::{DispatchError, EnginePool, EngineRequest, StartedStream};
use crate::upstream::span;

/// Wait for the rest of the stream after a finish reason. It can contain only the usage.
const USAGE_TIMEOUT: Duration = Duration::from_secs(1);

/// What an engine is asked, and how its answer is folded.
pub(crate) struct GenerationJob {
    pub(crate) operation: Operation,
    pub(crate) work: WorkKind,
    pub(crate) model: String,
    /// The body of the request to the engine.
    pub(crate) body: Vec<u8>,
    /// Requests with the same value prefer the same engine.
    pub(crate) affinity: Option<u64>,
    pub(crate) estimate: Estimate,
    pub(crate) sampling: Sampling,
    /// Maximum number of reasoning tokens.
    pub(crate) max_reasoning_tokens: Option<u32>,
    /// The sampling parameters that the caller has set.
    pub(crate) caller_fields: Vec<&'static str>,
    pub(crate) fold: Fold,
}

/// What all generations use.
#[derive(Clone)]
pub(crate) struct Engines {
    pub(crate) pool: EnginePool,
    pub(crate) scheduler: Scheduler,
    pub(crate) timeouts: Timeouts,
    /// Cancelled when the server ends its streams.
    pub(crate) shutdown: CancellationToken,
}

type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;

enum Stage {
    /// Waits for a permit and a token lease.
    Scheduling(BoxFuture<Result<Permits, Error>>),
    /// Waits for the first token of an engine.
    Opening(BoxFuture<Result<StartedStream, DispatchError>>),
    Reading(Box<StartedStream>),
    /// The answer is complete. The rest of the stream is read, so that its connection can be reused.
    Closing(Box<StartedStream>),
    Ended,
}

/// See the module.
pub(super) struct Generation {
    stage: Stage,
    engines: Engines,
    model: String,
    body: Vec<u8>,
    affinity: Option<u64>,
    sampling: Sampling,
    max_reasoning_tokens: Option<u32>,
    caller_fields: Vec<&'static str>,
    warnings: Vec<String>,
    fold: Fold,
    deadlines: StreamDeadlines,
    /// Ends the wait for the usage after the finish reason.
    usage_timer: Option<Pin<Box<Sleep>>>,
    accounting: Accounting,
    operation: Operation,
    has_started: bool,
    /// Read, and not folded yet.
    delta: EngineDelta,
}

impl Generation {
    /// Nothing happens before the first poll. The generation does not depend on the deadline of the call, because other
    /// calls may join it.
    pub(super) fn new(job: GenerationJob, call: &Call, engines: Engines) -> Generation {
        let call = call.detached();
        let deadlines =
            StreamDeadlines::for_engine(&call, engines.timeouts, engines.shutdown.clone());
        let accounting = Accounting::new(job.operation, call.stats().clone(), &job.body);
        let scheduler = engines.scheduler.clone();
        let (work, estimate) = (job.work, job.estimate);
        let acquire = async move { scheduler.acquire(&call, work, estimate).await };
        Generation {
            // In the span of the call that started it, independent of the subscriber that polls it.
            stage: Stage::Scheduling(Box::pin(acquire.in_current_span())),
            engines,
            model: job.model,
            body: job.body,
            affinity: job.affinity,
            sampling: job.sampling,
            max_reasoning_tokens: job.max_reasoning_tokens,
            caller_fields: job.caller_fields,
            warnings: Vec::new(),
            fold: job.fold,
            deadlines,
            usage_timer: None,
            accounting,
            operation: job.operation,
            has_started: false,
            delta: EngineDelta::default(),
        }
    }

    /// The statistics of the generation, which are billed to one subscriber.
    pub(super) fn stats(&self) -> CallStats {
        self.accounting.stats.clone()
    }

    /// Approximate number of reasoning tokens so far.
    pub(super) fn reasoning_tokens(&self) -> u32 {
        self.fold.reasoning_tokens()
    }

    /// Adds the next items. Ready with `false` if nothing more will follow.
    pub(super) fn poll_items(
        &mut self,
        cx: &mut Context<'_>,
        items: &mut Vec<StreamItem>,
    ) -> Poll<bool> {
        while items.is_empty() {
            match &mut self.stage {
                Stage::Ended => return Poll::Ready(false),
                Stage::Closing(started) => {
                    std::task::ready!(started.stream.poll_close(cx));
                    self.stage = Stage::Ended;
                    continue;
                }
                Stage::Scheduling(_) | Stage::Opening(_) | Stage::Reading(_) => {}
            }
            let progress = match self.deadlines.poll_ended(cx) {
                Some(error) => Poll::Ready(Err(error)),
                None => match self.poll_stage(cx, items) {
                    Poll::Pending => self.poll_timers(cx, items),
                    ready @ Poll::Ready(_) => ready,
                },
            };
            if let Err(error) = std::task::ready!(progress) {
                self.fail(error, items);
            }
        }
        Poll::Ready(true)
    }

    fn poll_stage(
        &mut self,
        cx: &mut Context<'_>,
        items: &mut Vec<StreamItem>,
    ) -> Poll<Result<(), Error>> {
        match &mut self.stage {
            Stage::Scheduling(acquire) => {
                let permits = std::task::ready!(acquire.as_mut().poll(cx));
                Poll::Ready(permits.map(|permits| self.open(permits)))
            }
            Stage::Opening(opening) => match opening.as_mut().poll(cx) {
                Poll::Ready(started) => {
                    let result = started.map_err(Error::from);
                    Poll::Ready(result.and_then(|started| self.take_started(started, items)))
                }
                // The engine has answered, though its first token is not there yet.
                Poll::Pending if self.accounting.answered.is_cancelled() && !self.has_started => {
                    self.start(items);
                    Poll::Ready(Ok(()))
                }
                Poll::Pending => Poll::Pending,
            },
            Stage::Reading(started) => {
                let read = std::task::ready!(started.stream.poll_read(&mut self.delta, cx));
                Poll::Ready(self.take_read(read, items))
            }
            Stage::Closing(_) | Stage::Ended => Poll::Ready(Ok(())),
        }
    }

    fn poll_timers(
        &mut self,
        cx: &mut Context<'_>,
        items: &mut Vec<StreamItem>,
    ) -> Poll<Result<(), Error>> {
        if let Some(timer) = &mut self.usage_timer
            && timer.as_mut().poll(cx).is_ready()
        {
            self.finish(false, items);
            return Poll::Ready(Ok(()));
        }
        std::task::ready!(self.deadlines.poll_timer(cx));
        // The timer may have fired between two chunks that are read together.
        self.fold_delta(items);
        match self.deadlines.check() {
            // The engine has begun fewer answers than requested, and ended all of them.
            Err(Error::Stalled) if self.fold.is_complete() => self.finish(false, items),
            result => result?,
        }
        // The engine is slow to answer: the stream starts, so that its subscribers can receive heartbeats.
        if self.deadlines.is_heartbeat_due() && matches!(self.stage, Stage::Opening(_)) {
            self.start(items);
        }
        Poll::Ready(Ok(()))
    }

    fn open(&mut self, permits: Permits) {
        let span = span::start(self.operation, &self.model, self.sampling);
        let request = EngineRequest {
            operation: self.operation,
            body: std::mem::take(&mut self.body).into(),
            model: self.model.clone(),
            affinity: self.affinity,
            report: self.accounting.stats.clone(),
            answered: self.accounting.answered.clone(),
            span: span.span().clone(),
        };
        self.accounting.start(permits, span);
        let pool = self.engines.pool.clone();
        let opening = async move { pool.start_stream(request).await };
        self.stage = Stage::Opening(Box::pin(opening.in_current_span()));
    }

    fn start(&mut self, items: &mut Vec<StreamItem>) {
        if !std::mem::replace(&mut self.has_started, true) {
            self.deadlines.disable_heartbeat();
            items.push(StreamItem::Started);
        }
    }

    /// Takes what arrived with the first token, and the error if the stream broke in the same read.
    fn take_started(
        &mut self,
        mut started: StartedStream,
        items: &mut Vec<StreamItem>,
    ) -> Result<(), Error> {
        self.start(items);
        self.delta = std::mem::take(&mut started.delta);
        self.accounting.span.set_server(started.endpoint_name());
        if let Some(model) = self.delta.model.take().filter(|model| started.is_served_model(model))
        {
            span::set_response_model(&self.accounting.span, model);
        }
        for field in started.left_out.iter().filter(|field| self.caller_fields.contains(field)) {
            self.warnings.push(format!("the engine does not support {field}; its default applied"));
        }
        let read = match started.error.take() {
            Some(error) => Err(error),
            None => Ok(ReadOutcome::Data),
        };
        self.stage = Stage::Reading(Box::new(started));
        self.take_read(read, items)
    }

    fn take_read(
        &mut self,
        read: Result<ReadOutcome, EngineError>,
        items: &mut Vec<StreamItem>,
    ) -> Result<(), Error> {
        let in_time = self.deadlines.record_read();
        let is_done = self.delta.is_done;
        self.fold_delta(items);
        in_time?;
        self.check_reasoning()?;
        let has_ended = is_done || !matches!(read, Ok(ReadOutcome::Data));
        let is_complete =
            if has_ended { self.fold.is_complete_at_end() } else { self.fold.is_complete() };
        // Restarted by every read, because some engines repeat the finish reason in each event.
        self.usage_timer = (is_complete && self.fold.has_ended())
            .then(|| Box::pin(sleep_until(Instant::now() + USAGE_TIMEOUT)));
        match read {
            Ok(ReadOutcome::Data) if is_complete && (is_done || self.fold.can_stop_early()) => {
                self.finish(is_done, items);
            }
            // An engine also sends [DONE] after an error, so only a finish reason makes an answer complete.
            Ok(ReadOutcome::Data) if is_done => return Err(EngineError::Truncated.into()),
            Ok(ReadOutcome::Data) => {}
            // Some engines send no [DONE]. After the finish reason, a broken connection loses nothing but the usage.
            Ok(ReadOutcome::End) | Err(_) if is_complete => self.finish(false, items),
            Ok(ReadOutcome::End) => return Err(EngineError::Truncated.into()),
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    fn check_reasoning(&self) -> Result<(), Error> {
        let is_exceeded = |max: u32| self.fold.reasoning_tokens() > max;
        if self.max_reasoning_tokens.is_some_and(is_exceeded) && !self.deadlines.has_answer() {
            return Err(Error::ReasoningLimit);
        }
        Ok(())
    }

    /// Folds what was read into items.
    fn fold_delta(&mut self, items: &mut Vec<StreamItem>) {
        let first = items.len();
        self.fold.push(std::mem::take(&mut self.delta), items);
        self.record_items(&items[first..]);
        self.accounting.update_lease(&self.fold);
    }

    /// Appends the text that was held back.
    fn flush(&mut self, is_complete: bool, items: &mut Vec<StreamItem>) {
        let first = items.len();
        self.fold.flush(is_complete, items);
        self.record_items(&items[first..]);
    }

    fn record_items(&mut self, items: &[StreamItem]) {
        let tracks = items.iter().filter_map(StreamItem::track);
        let Some(is_answer) = tracks.map(|track| track != Track::Reasoning).max() else { return };
        if self.deadlines.record_token(is_answer) {
            span::record_first_token(&self.accounting.span);
        }
        self.accounting.stats.upstream_chunk_at(self.deadlines.last_read());
    }

    /// Ends a complete answer. The engine's connection is closed, unless it can be reused.
    fn finish(&mut self, is_reusable: bool, items: &mut Vec<StreamItem>) {
        self.flush(true, items);
        let mut finish = self.fold.finish();
        finish.warnings.append(&mut self.warnings);
        self.record(EndOfGeneration::Finished);
        items.push(StreamItem::Finished(Arc::new(finish)));
        self.stage = match std::mem::replace(&mut self.stage, Stage::Ended) {
            Stage::Reading(started) if is_reusable => Stage::Closing(started),
            _ => Stage::Ended,
        };
    }

    fn fail(&mut self, error: Error, items: &mut Vec<StreamItem>) {
        self.stage = Stage::Ended;
        if !self.has_started {
            self.record(EndOfGeneration::Refused(error.kind()));
            let failure = Failure::from(error.into_status(self.fold.longest_field()));
            items.push(StreamItem::Failed(Arc::new(failure)));
            return;
        }
        self.flush(false, items);
        let error: RpcError =
            error.into_rpc_error(self.deadlines.has_answer(), self.fold.longest_field());
        self.record(EndOfGeneration::Failed(&error));
        items.push(StreamItem::Failed(Arc::new(error.into())));
    }

    fn record(&mut self, end: EndOfGeneration<'_>) {
        if let Some(tokens) = self.accounting.record(&self.fold, end) {
            self.deadlines.record_metrics(tokens / self.fold.answer_count().max(1));
        }
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        self.record(EndOfGeneration::Abandoned);
    }
}
