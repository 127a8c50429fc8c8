//! What the events of an engine's response stream say, for chat and text completions alike.

use hapa_proto::codegen::v1::Usage;

use crate::upstream::engine::FinishReason;

/// The content of one or more events of a response stream.
#[derive(Debug, Default)]
pub(crate) struct EngineDelta {
    /// Parts of the answers, in their order of arrival.
    pub(crate) pieces: Vec<Piece>,
    /// Usage of all answers together.
    pub(crate) usage: Option<Usage>,
    /// Name of the model, as the engine reports it. Untrusted text.
    pub(crate) model: Option<String>,
    /// `[DONE]` has arrived.
    pub(crate) is_done: bool,
}

/// A part of one answer.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Piece {
    /// Index of the answer, from 0. Proxies may number the reasoning and the text of one answer, so it has a meaning only
    /// if several answers were requested.
    pub(crate) choice: usize,
    pub(crate) content: Content,
    /// Number of events joined in `content`: about the number of tokens. 0 without content.
    pub(crate) events: u32,
    /// Sum of the log probabilities of its tokens, as far as they are known.
    pub(crate) logprob: f64,
    /// Number of tokens in `logprob`.
    pub(crate) logprob_tokens: u32,
    pub(crate) finish_reason: Option<FinishReason>,
    /// Usage of this answer so far.
    pub(crate) usage: Option<Usage>,
}

/// The content of a piece. Texts are never empty.
#[derive(Debug, Default, PartialEq)]
pub(crate) enum Content {
    #[default]
    None,
    Text(String),
    Reasoning(String),
    Refusal(String),
    ToolCall(ToolCallDelta),
}

/// A part of a tool call. Parts with the same index belong to one call; their arguments are concatenated.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct ToolCallDelta {
    /// Index of the tool call within the answer.
    pub(crate) index: usize,
    pub(crate) id: Option<String>,
    pub(crate) name: Option<String>,
    pub(crate) arguments: String,
}

impl EngineDelta {
    /// Whether any content has arrived: text, reasoning, a refusal or a tool call.
    pub(crate) fn has_content(&self) -> bool {
        self.pieces.iter().any(|piece| piece.content != Content::None)
    }

    /// Whether content or the end of an answer has arrived.
    pub(crate) fn has_begun(&self) -> bool {
        self.has_content() || self.pieces.iter().any(|piece| piece.finish_reason.is_some())
    }
}

/// Adds a later usage of the same stream. Each count keeps its maximum, because some engines repeat the
/// usage with zeros.
pub(crate) fn merge_usage(known: &mut Option<Usage>, later: Option<Usage>) {
    let Some(later) = later else { return };
    let usage = known.get_or_insert_default();
    let maximum = |count: &mut u32, later: u32| *count = later.max(*count);
    maximum(&mut usage.prompt_tokens, later.prompt_tokens);
    maximum(&mut usage.completion_tokens, later.completion_tokens);
    maximum(&mut usage.reasoning_tokens, later.reasoning_tokens);
    maximum(&mut usage.cached_tokens, later.cached_tokens);
    let sum = usage.prompt_tokens.saturating_add(usage.completion_tokens);
    usage.total_tokens = usage.total_tokens.max(later.total_tokens).max(sum);
}

/// The usage that an engine has reported so far, once or in every event.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct UsageCounter(Option<Usage>);

impl UsageCounter {
    /// Adds a report.
    pub(crate) fn merge(&mut self, usage: Option<Usage>) {
        merge_usage(&mut self.0, usage);
    }

    /// `None` if the engine has reported nothing.
    pub(crate) fn total(&self) -> Option<Usage> {
        self.0
    }
}
