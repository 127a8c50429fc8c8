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
    /// Index of the answer, from 0.
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
