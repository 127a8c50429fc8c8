//! Decodes the events of response streams of chat and text completions. What can be read is used, and
//! what cannot be read is skipped and counted; only an error that the engine reports fails a stream.
//!
//! An event that repeats the pattern of an earlier one is not parsed. One in the usual form is parsed into borrowed
//! structs. Any other event is read field by field.

mod content;
mod counts;
mod event_error;
mod lenient;
mod oddity;
mod pattern;
mod repair;
mod tool_call;
mod usual;

use std::borrow::Cow;

use bytes::Bytes;
use hapa_proto::codegen::v1::Usage;

use crate::upstream::engine::decode::counts::LogprobSum;
use crate::upstream::engine::decode::oddity::Oddity;
use crate::upstream::engine::decode::pattern::EventPattern;
use crate::upstream::engine::decode::usual::UsualEvent;
use crate::upstream::engine::delta::{Content, EngineDelta, Piece, ToolCallDelta, merge_usage};
use crate::upstream::engine::{EngineError, FinishReason};

/// Maximum number of answers, of choices in one event, and of tool calls in one answer.
pub(super) const MAX_ENTRIES: usize = 128;
/// Maximum number of lines of one event that are not JSON. Bounds the time for an event.
const MAX_UNREADABLE_LINES: usize = 16;
/// Maximum number of patterns that one stream learns, so that events without a pattern cost little more.
const MAX_PATTERNS: u32 = 8;
const DONE: &[u8] = b"[DONE]";

/// What one event contains about one answer. Empty texts count as absent.
#[derive(Debug, Default)]
struct ChoiceEvent<'a> {
    choice: usize,
    reasoning: Cow<'a, str>,
    text: Cow<'a, str>,
    refusal: Cow<'a, str>,
    tool_calls: Vec<ToolCallDelta>,
    logprobs: LogprobSum,
    finish_reason: Option<FinishReason>,
    usage: Option<Usage>,
}

/// Decodes the events of one response stream.
#[derive(Debug, Default)]
pub(crate) struct StreamDecoder {
    streamed: StreamedChoices,
    /// The pattern of the latest event that has one.
    pattern: Option<EventPattern>,
    learned_patterns: u32,
    /// The request, so that an error that repeats its words is not classified by them. Empty after the
    /// first content.
    request: Bytes,
}

/// The answers of which deltas have arrived, by their index. A message that follows repeats them.
#[derive(Debug, Default, PartialEq)]
struct StreamedChoices {
    any: u128,
    /// More than reasoning.
    answer: u128,
}

impl StreamDecoder {
    /// For the response to this request.
    pub(crate) fn new(request: Bytes) -> StreamDecoder {
        StreamDecoder { request, ..StreamDecoder::default() }
    }

    /// Adds the data of one event. Fails only if the engine reports an error; what the event contains
    /// besides is added before.
    pub(crate) fn push_event(
        &mut self,
        data: &[u8],
        delta: &mut EngineDelta,
    ) -> Result<(), EngineError> {
        let mut rest = data.trim_ascii();
        let mut unreadable_lines = 0;
        // Some engines send several values in one event.
        while !delta.is_done && !rest.is_empty() {
            if let Some(len) = self.push_value(rest, delta)? {
                rest = rest[len..].trim_ascii_start();
                continue;
            }
            unreadable_lines += 1;
            if unreadable_lines == 1 {
                Oddity::NotJson.count();
            }
            if unreadable_lines == MAX_UNREADABLE_LINES {
                break;
            }
            rest = next_value(rest);
        }
        Ok(())
    }

    /// Adds the value at the start and returns its length. `None` if it is no JSON.
    fn push_value(
        &mut self,
        data: &[u8],
        delta: &mut EngineDelta,
    ) -> Result<Option<usize>, EngineError> {
        if data.starts_with(DONE) || data.starts_with(b"\"[DONE]\"") {
            delta.is_done = true;
            return Ok(Some(data.len()));
        }
        if let Some(pattern) = &self.pattern
            && pattern.push(data, delta, &mut self.streamed)
        {
            return Ok(Some(data.len()));
        }
        let len = if let Some((event, len)) = UsualEvent::parse(data) {
            if len == data.len() && self.learned_patterns < MAX_PATTERNS {
                let learned = EventPattern::learn(data, &event);
                self.learned_patterns += u32::from(learned.is_some());
                self.pattern = learned.or_else(|| self.pattern.take());
            }
            delta.push_usual(event, &mut self.streamed);
            len
        } else {
            let Some((value, len)) = repair::parse(data) else { return Ok(None) };
            self.push_lenient(&value, delta)?;
            len
        };
        if self.streamed.any != 0 && !self.request.is_empty() {
            self.request = Bytes::new();
        }
        Ok(Some(len))
    }
}

impl StreamedChoices {
    /// Records the content of a delta.
    fn record(&mut self, event: &ChoiceEvent<'_>) {
        let bit = 1 << event.choice;
        if event.has_answer() {
            self.answer |= bit;
        }
        if event.has_answer() || !event.reasoning.is_empty() {
            self.any |= bit;
        }
    }

    /// Removes from a message what deltas have brought before.
    fn remove_repeated(&self, message: &mut ChoiceEvent<'_>) {
        let bit = 1 << message.choice;
        if self.any & bit != 0 {
            message.reasoning = Cow::default();
        }
        if self.answer & bit != 0 {
            (message.text, message.refusal) = (Cow::default(), Cow::default());
            message.tool_calls.clear();
        }
    }
}

impl ChoiceEvent<'_> {
    /// Whether it contains anything but reasoning.
    fn has_answer(&self) -> bool {
        !self.text.is_empty() || !self.refusal.is_empty() || !self.tool_calls.is_empty()
    }
}

impl EngineDelta {
    fn push_model(&mut self, model: &str) {
        if self.model.is_none() && !model.is_empty() {
            self.model = Some(model.to_owned());
        }
    }

    fn push_choice(&mut self, event: ChoiceEvent<'_>) {
        let is_plain = event.logprobs.tokens == 0 && event.finish_reason.is_none();
        let choice = event.choice;
        let mut has_piece = false;
        for (kind, text) in [
            (Content::Reasoning as fn(String) -> Content, event.reasoning),
            (Content::Text, event.text),
            (Content::Refusal, event.refusal),
        ] {
            if !text.is_empty() {
                has_piece = true;
                let is_joined = is_plain
                    && self.pieces.last_mut().is_some_and(|last| last.join(choice, kind, &text));
                if !is_joined {
                    self.pieces.push(Piece::of(choice, kind(text.into_owned())));
                }
            }
        }
        for call in event.tool_calls {
            has_piece = true;
            self.pieces.push(Piece::of(choice, Content::ToolCall(call)));
        }
        if is_plain && event.usage.is_none() {
            return;
        }
        if !has_piece {
            self.pieces.push(Piece { choice, ..Piece::default() });
        }
        if let Some(last) = self.pieces.last_mut() {
            last.logprob = event.logprobs.sum;
            last.logprob_tokens = event.logprobs.tokens;
            last.finish_reason = event.finish_reason;
            merge_usage(&mut last.usage, event.usage);
        }
    }
}

impl Piece {
    fn of(choice: usize, content: Content) -> Piece {
        Piece { choice, content, events: 1, ..Piece::default() }
    }

    /// Appends a text of the same kind, if the piece can be continued.
    fn join(&mut self, choice: usize, kind: fn(String) -> Content, text: &str) -> bool {
        let is_open = self.logprob_tokens == 0 && self.finish_reason.is_none();
        let is_same =
            std::mem::discriminant(&self.content) == std::mem::discriminant(&kind(String::new()));
        if self.choice != choice || !is_open || !is_same {
            return false;
        }
        let (Content::Text(known) | Content::Reasoning(known) | Content::Refusal(known)) =
            &mut self.content
        else {
            return false;
        };
        known.push_str(text);
        self.events = self.events.saturating_add(1);
        true
    }
}

/// Skips a line that is no JSON. Continues at the next line that can begin a value: inner values of
/// broken JSON are indented or follow other text.
fn next_value(data: &[u8]) -> &[u8] {
    if let Some(inner) = data.strip_prefix(b"data:") {
        // Some proxies add the field name again.
        return inner.trim_ascii_start();
    }
    let mut rest = data;
    while let Some(end) = memchr::memchr(b'\n', rest) {
        rest = &rest[end + 1..];
        if rest.starts_with(b"{") || rest.starts_with(DONE) || rest.starts_with(b"data:") {
            return rest;
        }
    }
    &[]
}

#[cfg(test)]
impl EngineDelta {
    /// Adds the only event of a stream.
    fn push_event(&mut self, data: &[u8]) -> Result<(), EngineError> {
        StreamDecoder::default().push_event(data, self)
    }
}

/// Engines also send the words for "none".
fn finish_reason(text: &str) -> Option<FinishReason> {
    let is_none =
        text.is_empty() || ["null", "none"].iter().any(|no| text.eq_ignore_ascii_case(no));
    (!is_none).then(|| FinishReason::from(text))
}

#[cfg(test)]
mod tests;
