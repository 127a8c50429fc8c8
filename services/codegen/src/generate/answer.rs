//! The fold of a generation. Text passes, in this order: the filter of invisible characters, the splitter of inline
//! reasoning, the filter of control tokens, and the splitter of code and explanation. Code is inspected.

use std::sync::Arc;

use hapa_proto::codegen::v1::Usage;
use hapa_proto::codegen::v1::stream_generate_code_response::Kind;

use crate::generate::control_token_filter::ControlTokenFilter;
use crate::generate::fence::{FenceSplitter, Segment};
use crate::generate::inline_reasoning::{InlineReasoning, OwnerAndModel};
use crate::generate::think_tags::{Expect, OutputPart, ThinkTagSplitter};
use crate::request::unicode::InvisibleCharFilter;
use crate::stream::{AnswerEnd, StreamItem, Track, push_delta};
use crate::upstream::engine::{Content, EngineDelta, FinishReason, Piece, UsageCounter};
use crate::validate::CodeInspector;

/// Maximum size of the text that is kept in case it is the answer, in bytes. Far more than the tokens of any answer.
const MAX_ASSUMED_BYTES: usize = 1024 * 1024;

/// See the module.
pub(crate) struct GenerateFold {
    char_filter: InvisibleCharFilter,
    think_tags: ThinkTagSplitter,
    answer: AnswerSplitter,
    inline_reasoning: Arc<InlineReasoning>,
    model: OwnerAndModel,
    expected: Expect,
    /// The text that counts as reasoning only because that is expected.
    assumed_reasoning: String,
    /// The answer whose text is used.
    choice: Option<usize>,
    language: String,
    finish_reason: Option<FinishReason>,
    usage: UsageCounter,
    /// Events with content: about the number of tokens.
    token_events: u32,
    reasoning_events: u32,
    is_reclassified: bool,
    has_refusal: bool,
    has_tool_calls: bool,
}

/// Splits the text after the reasoning.
struct AnswerSplitter {
    control_tokens: ControlTokenFilter,
    fences: FenceSplitter,
    inspector: CodeInspector,
    has_text: bool,
}

impl AnswerSplitter {
    fn new(language: &str) -> AnswerSplitter {
        AnswerSplitter {
            control_tokens: ControlTokenFilter::default(),
            fences: FenceSplitter::default(),
            inspector: CodeInspector::new(language),
            has_text: false,
        }
    }

    fn push(&mut self, text: &str, items: &mut Vec<StreamItem>) {
        let AnswerSplitter { control_tokens, fences, inspector, has_text } = self;
        let text = control_tokens.push(text);
        *has_text |= !text.trim().is_empty();
        fences.push(&text, &mut |segment, text| push_segment(inspector, segment, text, items));
    }

    fn end(&mut self, items: &mut Vec<StreamItem>) {
        let AnswerSplitter { control_tokens, fences, inspector, has_text } = self;
        let text = control_tokens.end();
        *has_text |= !text.trim().is_empty();
        fences.push(&text, &mut |segment, text| push_segment(inspector, segment, text, items));
        fences.end(&mut |segment, text| push_segment(inspector, segment, text, items));
    }
}

fn push_segment(
    inspector: &mut CodeInspector,
    segment: Segment<'_>,
    text: &str,
    items: &mut Vec<StreamItem>,
) {
    let track = if segment.kind == Kind::Code {
        inspector.push(segment.block, segment.info_word, text);
        Track::Code
    } else {
        Track::Explanation
    };
    push_delta(items, track, text);
}

impl GenerateFold {
    pub(crate) fn new(
        model: OwnerAndModel,
        language: &str,
        inline_reasoning: Arc<InlineReasoning>,
    ) -> GenerateFold {
        let expected = inline_reasoning.expected(&model);
        GenerateFold {
            char_filter: InvisibleCharFilter::default(),
            think_tags: ThinkTagSplitter::new(expected),
            answer: AnswerSplitter::new(language),
            inline_reasoning,
            model,
            expected,
            assumed_reasoning: String::new(),
            choice: None,
            language: language.to_owned(),
            finish_reason: None,
            usage: UsageCounter::default(),
            token_events: 0,
            reasoning_events: 0,
            is_reclassified: false,
            has_refusal: false,
            has_tool_calls: false,
        }
    }

    pub(crate) fn push(&mut self, delta: EngineDelta, items: &mut Vec<StreamItem>) {
        self.usage.merge(delta.usage);
        for piece in delta.pieces {
            self.push_piece(piece, items);
        }
    }

    fn push_piece(&mut self, piece: Piece, items: &mut Vec<StreamItem>) {
        // One answer was requested. Some proxies send its reasoning and its text with different indices.
        let is_text = matches!(piece.content, Content::Text(_) | Content::Refusal(_));
        self.usage.merge(piece.usage);
        if is_text && *self.choice.get_or_insert(piece.choice) != piece.choice {
            return;
        }
        self.token_events = self.token_events.saturating_add(piece.events);
        match piece.content {
            Content::Text(text) => {
                self.push_text(&text, items);
                if self.think_tags.is_in_reasoning() {
                    self.reasoning_events = self.reasoning_events.saturating_add(piece.events);
                }
            }
            Content::Reasoning(text) => {
                self.think_tags.set_answer_only();
                self.reasoning_events = self.reasoning_events.saturating_add(piece.events);
                push_delta(items, Track::Reasoning, &self.char_filter.strip(&text));
            }
            Content::Refusal(text) => {
                self.has_refusal = true;
                self.push_text(&text, items);
            }
            Content::ToolCall(_) => self.has_tool_calls = true,
            Content::None => {}
        }
        self.finish_reason = piece.finish_reason.or(self.finish_reason);
    }

    fn push_text(&mut self, text: &str, items: &mut Vec<StreamItem>) {
        let text = self.char_filter.strip(text);
        self.split(Some(&text), items);
    }

    /// Separates the reasoning from a piece of text, or at the end (`None`) from the text that was held back.
    fn split(&mut self, text: Option<&str>, items: &mut Vec<StreamItem>) {
        let GenerateFold { think_tags, answer, language, assumed_reasoning, .. } = self;
        let is_assumed = self.expected == Expect::Open;
        let mut is_reclassified = false;
        let mut emit = |part, text: &str| match part {
            OutputPart::Reasoning => {
                if is_assumed && assumed_reasoning.len() + text.len() <= MAX_ASSUMED_BYTES {
                    assumed_reasoning.push_str(text);
                }
                push_delta(items, Track::Reasoning, text);
            }
            OutputPart::Answer => answer.push(text, items),
            OutputPart::Reclassified => {
                is_reclassified = true;
                *answer = AnswerSplitter::new(language);
                items.push(StreamItem::Reclassified);
            }
        };
        match text {
            Some(text) => think_tags.push(text, &mut emit),
            None => think_tags.end(&mut emit),
        }
        if is_reclassified {
            self.is_reclassified = true;
            self.reasoning_events = self.token_events;
            self.inline_reasoning.learn(&self.model, true);
        }
    }

    /// `is_complete`: the engine has ended the answer.
    pub(crate) fn flush(&mut self, is_complete: bool, items: &mut Vec<StreamItem>) {
        self.split(None, items);
        let GenerateFold { think_tags, answer, assumed_reasoning, .. } = self;
        let is_unclosed = self.expected == Expect::Open && !think_tags.has_closed();
        if is_unclosed && is_complete && self.finish_reason == Some(FinishReason::Stop) {
            // The model has not reasoned, so its text is the answer.
            self.inline_reasoning.learn(&self.model, false);
            self.reasoning_events = 0;
            answer.push(&std::mem::take(assumed_reasoning), items);
        }
        answer.end(items);
    }

    pub(crate) fn is_complete(&self) -> bool {
        match self.finish_reason {
            Some(reason) => !reason.is_failure(),
            None => self.answer.control_tokens.has_ended(),
        }
    }

    /// Whether the answer is complete if nothing more follows: also without a finish reason, after the end of a turn.
    pub(crate) fn is_complete_at_end(&self) -> bool {
        let is_at_end = || self.answer.control_tokens.is_at_end_of_turn();
        self.is_complete() || (self.finish_reason.is_none() && is_at_end())
    }

    /// The model continues after the end of its turn.
    pub(crate) fn can_stop_early(&self) -> bool {
        self.finish_reason.is_none() && self.answer.control_tokens.has_ended()
    }

    pub(crate) fn finish(&mut self) -> AnswerEnd {
        let reason = self.finish_reason.unwrap_or(FinishReason::Stop);
        let mut warnings = self.answer.inspector.warnings(reason == FinishReason::Length);
        if self.char_filter.removed_count > 0 {
            warnings.push("invisible characters were removed from the answer".to_owned());
        }
        if self.answer.control_tokens.removed_count() > 0 {
            warnings.push("control tokens of the model were removed from the answer".to_owned());
        }
        if self.is_reclassified {
            let warning = "the text before the end of the reasoning is reasoning, though it was sent \
                           as answer; further answers of this model are separated";
            warnings.push(warning.to_owned());
        }
        let problem = self.problem(reason);
        let is_reusable = problem.is_none();
        warnings.extend(problem.map(str::to_owned));
        AnswerEnd {
            finish_reason: reason.as_str().to_owned(),
            usage: self.usage(),
            warnings,
            suggestions: Vec::new(),
            is_reusable,
        }
    }

    /// Why a complete answer answers nothing.
    fn problem(&self, reason: FinishReason) -> Option<&'static str> {
        match () {
            () if self.has_refusal => Some("the model refused to answer"),
            () if self.has_tool_calls => {
                Some("the model requested a tool call, though no tools were offered")
            }
            () if self.answer.has_text => None,
            () if self.reasoning_events > 0 && reason == FinishReason::Length => Some(
                "the answer is empty: the model used all tokens for its reasoning; raise max_tokens",
            ),
            () if self.reasoning_events > 0 => {
                Some("the answer is empty: the model ended after its reasoning")
            }
            () if reason == FinishReason::ContentFilter => {
                Some("the answer is empty: the content filter of the engine blocked it")
            }
            () => Some("the answer is empty: the model ended without any text"),
        }
    }

    pub(crate) fn usage(&self) -> Option<Usage> {
        let mut usage = self.usage.total()?;
        if usage.reasoning_tokens == 0 {
            usage.reasoning_tokens = self.reasoning_events.min(usage.completion_tokens);
        }
        Some(usage)
    }

    pub(crate) fn token_events(&self) -> u32 {
        self.token_events
    }

    pub(crate) fn reasoning_tokens(&self) -> u32 {
        let reported = self.usage.total().map_or(0, |usage| usage.reasoning_tokens);
        if reported > 0 { reported } else { self.reasoning_events }
    }

    pub(crate) fn finish_reasons(&self) -> Vec<&'static str> {
        self.finish_reason.map(FinishReason::as_str).into_iter().collect()
    }
}

#[cfg(test)]
mod tests;
