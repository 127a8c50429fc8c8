//! One subscriber's view of an answer: its own heartbeats, deadlines, times and end. The items come from the response
//! cache or from a stream that others may read too.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use hapa_core::call::Call;
use hapa_core::call_stats::CallStats;
use hapa_core::rpc_error::RpcError;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::deadlines::{StreamDeadlines, millis};
use super::item::{AnswerEnd, Delta, Failure, StreamItem, Track};
use super::shared::{LogRead, Subscription};
use crate::error::Error;

/// One event of a response. A response is `Started`, deltas and heartbeats, and one of `Finished` and `Failed`.
#[derive(Debug)]
pub(crate) enum ResponseEvent {
    Started {
        is_cached: bool,
    },
    Delta(Delta),
    /// All deltas so far are reasoning, whatever their track.
    Reclassified,
    Heartbeat {
        reasoning_tokens: u32,
    },
    Finished(Box<Finished>),
    Failed(Failed),
}

/// The end of a complete response.
#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) finish: AnswerEnd,
    pub(crate) time_to_first_token_ms: u32,
    pub(crate) time_to_first_answer_token_ms: u32,
    pub(crate) response_time_ms: u32,
}

/// The end of a failed response.
#[derive(Debug)]
pub(crate) struct Failed {
    pub(crate) error_code: String,
    pub(crate) message: String,
    pub(crate) incident_id: String,
    /// Whether deltas were sent before.
    pub(crate) is_partial: bool,
}

/// The context of a subscriber.
pub(crate) struct SubscriberContext {
    deadlines: StreamDeadlines,
    pub(super) stats: CallStats,
    warnings: Vec<String>,
    /// Whether reasoning is sent, and not only counted.
    includes_reasoning: bool,
}

/// See the module.
pub(crate) struct Response {
    /// `None` if nothing more will follow.
    subscription: Option<Subscription>,
    context: SubscriberContext,
    is_cached: bool,
    events: VecDeque<ResponseEvent>,
    /// The status after `Failed`.
    status: Option<Status>,
    has_started: bool,
    /// The last event was read.
    has_ended: bool,
}

impl SubscriberContext {
    pub(crate) fn new(call: &Call, heartbeat: Duration, includes_reasoning: bool) -> Self {
        SubscriberContext {
            deadlines: StreamDeadlines::for_subscriber(call, heartbeat),
            stats: call.stats().clone(),
            warnings: Vec::new(),
            includes_reasoning,
        }
    }

    /// Adds a warning to the end of the response.
    pub(crate) fn warn(&mut self, warning: String) {
        self.warnings.push(warning);
    }
}

impl Response {
    /// A response whose items are known.
    pub(crate) fn known(
        items: impl IntoIterator<Item = StreamItem>,
        context: SubscriberContext,
    ) -> Response {
        let mut response = Response::new(None, context, true);
        for item in items {
            response.push_item(item);
        }
        response
    }

    /// A response whose items come from a stream. Call `begin` before the first `next`.
    pub(super) fn subscribed(
        subscription: Subscription,
        context: SubscriberContext,
        is_cached: bool,
    ) -> Response {
        Response::new(Some(subscription), context, is_cached)
    }

    fn new(
        subscription: Option<Subscription>,
        context: SubscriberContext,
        is_cached: bool,
    ) -> Response {
        Response {
            subscription,
            context,
            is_cached,
            events: VecDeque::new(),
            status: None,
            has_started: false,
            has_ended: false,
        }
    }

    /// Ends the response when the token is cancelled.
    pub(crate) fn supersede_with(&mut self, token: CancellationToken) {
        self.context.deadlines.supersede_with(token);
    }

    /// Waits until the answer has started, so that an engine that refuses at once gives a plain status and no stream.
    pub(crate) async fn begin(mut self) -> Result<Response, Status> {
        poll_fn(|cx| self.poll_begin(cx)).await?;
        Ok(self)
    }

    fn poll_begin(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Status>> {
        while !self.has_started {
            if let Some(status) = self.status.take() {
                return Poll::Ready(Err(status));
            }
            if self.subscription.is_none() {
                let error = RpcError::internal("a generation ended before it started");
                return Poll::Ready(Err(error.into()));
            }
            if let Err(error) = ready!(self.poll_items(cx)) {
                self.leave();
                return Poll::Ready(Err(error.into()));
            }
        }
        Poll::Ready(Ok(()))
    }

    /// The next event; after `Failed`, its status; `None` after the end.
    pub(crate) fn poll_next(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<ResponseEvent, Status>>> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Poll::Ready(Some(Ok(event)));
            }
            if let Some(status) = self.status.take() {
                return Poll::Ready(Some(Err(status)));
            }
            if self.subscription.is_none() {
                return Poll::Ready(None);
            }
            if let Err(error) = ready!(self.poll_items(cx)) {
                self.fail(error);
            }
        }
    }

    /// Reads the items that are new, or else waits for them or for the next limit.
    fn poll_items(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        let Some(subscription) = &self.subscription else { return Poll::Ready(Ok(())) };
        let deadlines = &mut self.context.deadlines;
        // After the end, only the engine's connection is returned, which has a timeout of its own.
        if !self.has_ended
            && let Some(error) = deadlines.poll_ended(cx)
        {
            return Poll::Ready(Err(error));
        }
        let mut items = VecDeque::new();
        match subscription.poll_read(&mut items, cx) {
            Poll::Ready(LogRead::Items) => {
                subscription.record_chunk_time(&self.context.stats);
                let in_time = deadlines.record_read();
                for item in items {
                    self.push_item(item);
                }
                Poll::Ready(if self.has_ended { Ok(()) } else { in_time })
            }
            Poll::Ready(LogRead::Ended) => {
                self.leave();
                Poll::Ready(Ok(()))
            }
            Poll::Ready(LogRead::TooSlow) => Poll::Ready(Err(Error::SlowReader)),
            Poll::Pending if self.has_ended => Poll::Pending,
            Poll::Pending => {
                ready!(deadlines.poll_timer(cx));
                Poll::Ready(self.after_timer())
            }
        }
    }

    fn after_timer(&mut self) -> Result<(), Error> {
        self.context.deadlines.check()?;
        if self.has_started && self.context.deadlines.is_heartbeat_due() {
            let reasoning_tokens =
                self.subscription.as_ref().map_or(0, Subscription::reasoning_tokens);
            self.context.deadlines.record_sent();
            self.events.push_back(ResponseEvent::Heartbeat { reasoning_tokens });
        }
        Ok(())
    }

    /// Adds the event that this subscriber receives for an item.
    fn push_item(&mut self, item: StreamItem) {
        match item {
            StreamItem::Started => {
                self.has_started = true;
                self.push_event(ResponseEvent::Started { is_cached: self.is_cached });
            }
            StreamItem::Delta(delta) => {
                let is_reasoning = delta.track == Track::Reasoning;
                self.context.deadlines.record_token(!is_reasoning);
                if !is_reasoning || self.context.includes_reasoning {
                    self.push_event(ResponseEvent::Delta(delta));
                }
            }
            StreamItem::Reclassified => self.events.push_back(ResponseEvent::Reclassified),
            StreamItem::Finished(finish) => {
                self.settle();
                let finished = self.finished(&finish);
                self.push_event(ResponseEvent::Finished(Box::new(finished)));
            }
            StreamItem::Failed(failure) => {
                self.settle();
                self.push_failure(&failure);
            }
        }
    }

    fn push_event(&mut self, event: ResponseEvent) {
        self.context.deadlines.record_sent();
        self.events.push_back(event);
    }

    fn push_failure(&mut self, failure: &Failure) {
        if self.has_started {
            self.push_event(ResponseEvent::Failed(Failed {
                error_code: failure.error_code.clone(),
                message: failure.message.clone(),
                incident_id: failure.incident_id.clone(),
                is_partial: self.context.deadlines.has_answer(),
            }));
        }
        self.status = Some(failure.status.clone());
    }

    fn finished(&mut self, finish: &AnswerEnd) -> Finished {
        let deadlines = &self.context.deadlines;
        let mut finish = finish.clone();
        finish.warnings.append(&mut self.context.warnings);
        Finished {
            finish,
            time_to_first_token_ms: deadlines.time_to_first_token().map_or(0, millis),
            time_to_first_answer_token_ms: deadlines.time_to_first_answer_token().map_or(0, millis),
            response_time_ms: millis(deadlines.elapsed()),
        }
    }

    /// The end was read.
    fn settle(&mut self) {
        self.has_ended = true;
        let tokens = self.subscription.as_ref().and_then(Subscription::settle);
        self.record_latencies(tokens);
    }

    fn leave(&mut self) {
        let tokens = self.subscription.take().and_then(Subscription::leave);
        self.record_latencies(tokens);
    }

    /// Time between tokens is recorded only for the call that the tokens are billed to.
    fn record_latencies(&self, tokens: Option<u32>) {
        self.context.deadlines.record_latencies(&self.context.stats, tokens.unwrap_or(0));
    }

    /// Ends the response of this subscriber. Others continue.
    fn fail(&mut self, error: Error) {
        self.leave();
        self.has_ended = true;
        let error = error.into_rpc_error(self.context.deadlines.has_answer(), "");
        self.push_failure(&Arc::new(error.into()));
    }
}

impl Drop for Response {
    fn drop(&mut self) {
        self.leave();
    }
}
