//! The fold of a generation: removes invisible characters, separates code from explanation, and inspects the code.

use hapa_proto::codegen::v1::Usage;
use hapa_proto::codegen::v1::stream_generate_code_response::Kind;

use crate::generate::fence::FenceSplitter;
use crate::request::unicode::InvisibleCharFilter;
use crate::stream::{AnswerEnd, Delta, Track, push_delta};
use crate::upstream::engine::{Content, EngineDelta, FinishReason, Piece, UsageCounter};
use crate::validate::CodeInspector;

/// See the module.
pub(crate) struct GenerateFold {
    char_filter: InvisibleCharFilter,
    splitter: FenceSplitter,
    inspector: CodeInspector,
    finish_reason: Option<FinishReason>,
    usage: UsageCounter,
    /// Events with content: about the number of tokens.
    token_events: u32,
    reasoning_events: u32,
    has_text: bool,
    has_refusal: bool,
    has_tool_calls: bool,
}

impl GenerateFold {
    pub(crate) fn new(inspector: CodeInspector) -> GenerateFold {
        GenerateFold {
            char_filter: InvisibleCharFilter::default(),
            splitter: FenceSplitter::default(),
            inspector,
            finish_reason: None,
            usage: UsageCounter::default(),
            token_events: 0,
            reasoning_events: 0,
            has_text: false,
            has_refusal: false,
            has_tool_calls: false,
        }
    }

    pub(crate) fn push(&mut self, delta: EngineDelta) -> Vec<Delta> {
        let mut deltas = Vec::new();
        self.usage.merge(delta.usage);
        // One answer was requested.
        for piece in delta.pieces.into_iter().filter(|piece| piece.choice == 0) {
            self.push_piece(piece, &mut deltas);
        }
        deltas
    }

    fn push_piece(&mut self, piece: Piece, deltas: &mut Vec<Delta>) {
        self.usage.merge(piece.usage);
        self.token_events = self.token_events.saturating_add(piece.events);
        match piece.content {
            Content::Text(text) => self.push_text(&text, deltas),
            Content::Reasoning(text) => {
                self.reasoning_events = self.reasoning_events.saturating_add(piece.events);
                push_delta(deltas, Track::Reasoning, &text);
            }
            Content::Refusal(text) => {
                self.has_refusal = true;
                self.push_text(&text, deltas);
            }
            Content::ToolCall(_) => self.has_tool_calls = true,
            Content::None => {}
        }
        self.finish_reason = piece.finish_reason.or(self.finish_reason);
    }

    fn push_text(&mut self, text: &str, deltas: &mut Vec<Delta>) {
        let text = self.char_filter.strip(text);
        self.has_text |= !text.trim().is_empty();
        let inspector = &mut self.inspector;
        self.splitter.push(&text, &mut |segment, text| {
            if segment.kind == Kind::Code {
                inspector.push(segment.block, segment.info_word, text);
            }
            push_delta(deltas, track_of(segment.kind), text);
        });
    }

    pub(crate) fn flush(&mut self) -> Vec<Delta> {
        let mut deltas = Vec::new();
        let inspector = &mut self.inspector;
        self.splitter.end(&mut |segment, text| {
            if segment.kind == Kind::Code {
                inspector.push(segment.block, segment.info_word, text);
            }
            push_delta(&mut deltas, track_of(segment.kind), text);
        });
        deltas
    }

    pub(crate) fn is_complete(&self) -> bool {
        self.finish_reason.is_some_and(|reason| !reason.is_failure())
    }

    pub(crate) fn finish(&mut self) -> AnswerEnd {
        let reason = self.finish_reason.unwrap_or(FinishReason::Other);
        let mut warnings = self.inspector.warnings(reason == FinishReason::Length);
        if self.char_filter.removed_count > 0 {
            warnings.push("invisible characters were removed from the answer".to_owned());
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
            () if self.has_text => None,
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

fn track_of(kind: Kind) -> Track {
    match kind {
        Kind::Code => Track::Code,
        Kind::Reasoning => Track::Reasoning,
        Kind::Explanation | Kind::Unspecified => Track::Explanation,
    }
}
