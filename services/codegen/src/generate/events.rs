//! The messages of a generation: the events of a stream, and the reply that collects them.

use std::sync::Arc;
use std::task::{Context, Poll, ready};

use hapa_proto::codegen::v1::GenerateCodeResponse;
use hapa_proto::codegen::v1::stream_generate_code_response::{
    Delta, Event, Failed, Finished, Heartbeat, Kind, Started,
};
use tonic::Status;

use crate::generate::unfenced::looks_like_code;
use crate::stream::{self, Response, ResponseEvent, Track};

/// A response with the names that its messages contain.
pub(crate) struct GenerateResponse {
    pub(crate) response: Response,
    pub(crate) request_id: Arc<str>,
    pub(crate) model: String,
    pub(crate) task: String,
    pub(crate) language: String,
    pub(crate) include_reasoning: bool,
}

impl GenerateResponse {
    /// The next event; after `failed`, its status; `None` after the end.
    pub(crate) fn poll_next(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Event, Status>>> {
        loop {
            let Some(event) = ready!(self.response.poll_next(cx)) else { return Poll::Ready(None) };
            // The messages of a stream cannot be recalled. A warning at its end reports it.
            if let Some(event) = event.map(|event| self.message(event)).transpose() {
                return Poll::Ready(Some(event));
            }
        }
    }

    /// Collects the events into one reply.
    pub(crate) async fn collect(mut self) -> Result<GenerateCodeResponse, Status> {
        let mut builder = ReplyBuilder::default();
        while let Some(event) = std::future::poll_fn(|cx| self.response.poll_next(cx)).await {
            let event = event?;
            if matches!(event, ResponseEvent::Reclassified) {
                builder.reclassify();
            }
            if let Some(event) = self.message(event) {
                builder.push(event);
            }
        }
        Ok(builder.build(&self.language, self.include_reasoning))
    }

    fn message(&self, event: ResponseEvent) -> Option<Event> {
        Some(match event {
            ResponseEvent::Started { is_cached } => Event::Started(Started {
                request_id: self.request_id.to_string(),
                model: self.model.clone(),
                task: self.task.clone(),
                cached: is_cached,
            }),
            ResponseEvent::Delta(stream::Delta { track, text }) => {
                Event::Delta(Delta { text, kind: kind_of(track).into() })
            }
            ResponseEvent::Reclassified => return None,
            ResponseEvent::Heartbeat { reasoning_tokens } => {
                Event::Heartbeat(Heartbeat { reasoning_tokens })
            }
            ResponseEvent::Finished(finished) => Event::Finished(finished_message(*finished)),
            ResponseEvent::Failed(failed) => Event::Failed(Failed {
                error_code: failed.error_code,
                message: failed.message,
                incident_id: failed.incident_id,
                partial: failed.is_partial,
            }),
        })
    }
}

fn kind_of(track: Track) -> Kind {
    match track {
        Track::Code => Kind::Code,
        Track::Reasoning => Kind::Reasoning,
        Track::Explanation | Track::Suggestion(_) => Kind::Explanation,
    }
}

fn finished_message(finished: stream::Finished) -> Finished {
    Finished {
        finish_reason: finished.finish.finish_reason,
        usage: finished.finish.usage,
        warnings: finished.finish.warnings,
        time_to_first_token_ms: finished.time_to_first_token_ms,
        response_time_ms: finished.response_time_ms,
        time_to_first_answer_token_ms: finished.time_to_first_answer_token_ms,
    }
}

/// Tasks whose answers are prose.
const PROSE_TASKS: [&str; 2] = ["explain", "review"];

/// Collects the events of a stream into one reply.
#[derive(Default)]
struct ReplyBuilder {
    reply: GenerateCodeResponse,
    /// All text so far, in its order.
    text: String,
    has_code: bool,
}

impl ReplyBuilder {
    /// The text so far is reasoning.
    fn reclassify(&mut self) {
        self.reply.generated_code.clear();
        self.reply.explanation.clear();
        self.reply.reasoning = std::mem::take(&mut self.text);
        self.has_code = false;
    }

    fn push(&mut self, event: Event) {
        match event {
            Event::Started(started) => {
                self.reply.request_id = started.request_id;
                self.reply.model = started.model;
                self.reply.task = started.task;
                self.reply.cached = started.cached;
            }
            Event::Delta(delta) => {
                self.text.push_str(&delta.text);
                self.push_delta(&delta);
            }
            Event::Finished(finished) => {
                self.reply.finish_reason = finished.finish_reason;
                self.reply.usage = finished.usage;
                self.reply.warnings = finished.warnings;
                self.reply.response_time_ms = finished.response_time_ms;
            }
            Event::Heartbeat(_) | Event::Failed(_) => {}
        }
    }

    fn push_delta(&mut self, delta: &Delta) {
        match delta.kind() {
            Kind::Code => {
                self.has_code = true;
                self.reply.generated_code.push_str(&delta.text);
            }
            Kind::Reasoning => self.reply.reasoning.push_str(&delta.text),
            Kind::Explanation | Kind::Unspecified => self.reply.explanation.push_str(&delta.text),
        }
    }

    /// The reply. An answer without a code block is returned as code, unless the task asks for prose and it is no code.
    fn build(mut self, language: &str, include_reasoning: bool) -> GenerateCodeResponse {
        let reply = &mut self.reply;
        if !include_reasoning {
            reply.reasoning.clear();
        }
        let is_prose_task = PROSE_TASKS.contains(&reply.task.as_str());
        if !self.has_code && (!is_prose_task || looks_like_code(&reply.explanation, language)) {
            reply.generated_code = std::mem::take(&mut reply.explanation);
        }
        "success".clone_into(&mut reply.status);
        self.reply
    }
}
