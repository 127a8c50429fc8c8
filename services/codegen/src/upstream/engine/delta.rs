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

/// The usage that an engine has reported so far. Engines report it once, or in every event, and some report zeros at
/// the end.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct UsageCounter(Option<Usage>);

impl UsageCounter {
    /// Adds a report. Each field keeps its highest value.
    pub(crate) fn merge(&mut self, usage: Option<Usage>) {
        let Some(new) = usage else { return };
        let old = self.0.unwrap_or_default();
        let prompt_tokens = old.prompt_tokens.max(new.prompt_tokens);
        let completion_tokens = old.completion_tokens.max(new.completion_tokens);
        let sum = prompt_tokens.saturating_add(completion_tokens);
        self.0 = Some(Usage {
            prompt_tokens,
            completion_tokens,
            total_tokens: old.total_tokens.max(new.total_tokens).max(sum),
            reasoning_tokens: old.reasoning_tokens.max(new.reasoning_tokens),
            cached_tokens: old.cached_tokens.max(new.cached_tokens),
        });
    }

    /// `None` if the engine has reported nothing.
    pub(crate) fn total(&self) -> Option<Usage> {
        self.0
    }
}

impl EngineDelta {
    /// Whether a token or the end of an answer has arrived.
    pub(crate) fn has_begun(&self) -> bool {
        let begins =
            |piece: &Piece| piece.content != Content::None || piece.finish_reason.is_some();
        self.pieces.iter().any(begins)
    }
}

impl EngineDelta {
    pub(crate) fn push_event(
        &mut self,
        data: &[u8],
    ) -> Result<(), crate::upstream::engine::EngineError> {
        use crate::upstream::engine::wire::{ChatChunk, JsonText, Logprobs, TextChunk};
        if self.is_done || data == b"[DONE]" {
            self.is_done = true;
            return Ok(());
        }
        let chunk: TextChunk<'_> = serde_json::from_slice(data)
            .map_err(|error| crate::upstream::engine::EngineError::from(&error))?;
        if let Some(error) = &chunk.error {
            return Err(crate::upstream::engine::stream_error(error));
        }
        let chat: ChatChunk<'_> = serde_json::from_slice(data)
            .map_err(|error| crate::upstream::engine::EngineError::from(&error))?;
        if let (None, Some(JsonText(model))) = (&self.model, chunk.model) {
            self.model = Some(model.into_owned());
        }
        let usage = chunk.usage.map(Usage::from);
        if chunk.choices.is_empty() {
            self.usage = usage.or(self.usage);
        }
        for (choice, chat) in chunk.choices.into_iter().zip(chat.choices) {
            let text = choice
                .text
                .or(chat.delta.content)
                .map(|JsonText(text)| text.into_owned())
                .filter(|t| !t.is_empty());
            let mut piece = Piece {
                choice: choice.index,
                usage,
                finish_reason: choice.finish_reason,
                ..Piece::default()
            };
            for one in choice.logprobs.iter().flat_map(Logprobs::values) {
                piece.logprob += one;
                piece.logprob_tokens += 1;
            }
            if let Some(text) = text {
                piece.content = Content::Text(text);
                piece.events = 1;
            }
            self.pieces.push(piece);
        }
        Ok(())
    }
}
