//! How the deltas of an engine become an answer: one variant for each operation.

use hapa_proto::codegen::v1::Usage;

use super::item::{AnswerEnd, StreamItem};
use crate::complete::answer::CompleteFold;
use crate::generate::answer::GenerateFold;
use crate::upstream::engine::EngineDelta;

/// See the module.
pub(crate) enum Fold {
    Generate(Box<GenerateFold>),
    Complete(Box<CompleteFold>),
}

impl Fold {
    /// Adds what an engine has sent, and appends the items that follow from it.
    pub(super) fn push(&mut self, delta: EngineDelta, items: &mut Vec<StreamItem>) {
        match self {
            Fold::Generate(fold) => fold.push(delta, items),
            Fold::Complete(fold) => fold.push(delta, items),
        }
    }

    /// Whether a finish reason, or the natural end of the text, makes the answer complete.
    pub(super) fn is_complete(&self) -> bool {
        match self {
            Fold::Generate(fold) => fold.is_complete(),
            Fold::Complete(fold) => fold.is_complete(),
        }
    }

    /// Whether the answer is complete if nothing more follows.
    pub(super) fn is_complete_at_end(&self) -> bool {
        match self {
            Fold::Generate(fold) => fold.is_complete_at_end(),
            Fold::Complete(fold) => fold.is_complete(),
        }
    }

    /// Whether the engine would only generate what is not needed.
    pub(super) fn can_stop_early(&self) -> bool {
        match self {
            Fold::Generate(fold) => fold.can_stop_early(),
            Fold::Complete(fold) => fold.can_stop_early(),
        }
    }

    /// Whether the engine has ended every answer that was requested.
    pub(super) fn has_ended(&self) -> bool {
        match self {
            Fold::Generate(fold) => fold.is_complete(),
            Fold::Complete(fold) => fold.has_ended(),
        }
    }

    /// Appends the text that was held back, at the end of the answer.
    pub(super) fn flush(&mut self, is_complete: bool, items: &mut Vec<StreamItem>) {
        match self {
            Fold::Generate(fold) => fold.flush(is_complete, items),
            Fold::Complete(_) => {}
        }
    }

    /// The end of a complete answer.
    pub(super) fn finish(&mut self) -> AnswerEnd {
        match self {
            Fold::Generate(fold) => fold.finish(),
            Fold::Complete(fold) => fold.finish(),
        }
    }

    /// The usage that the engine has reported so far.
    pub(super) fn usage(&self) -> Option<Usage> {
        match self {
            Fold::Generate(fold) => fold.usage(),
            Fold::Complete(fold) => fold.usage(),
        }
    }

    /// Number of events with content: about the number of tokens.
    pub(super) fn token_events(&self) -> u32 {
        match self {
            Fold::Generate(fold) => fold.token_events(),
            Fold::Complete(fold) => fold.token_events(),
        }
    }

    /// Number of reasoning tokens, as far as it is known.
    pub(super) fn reasoning_tokens(&self) -> u32 {
        match self {
            Fold::Generate(fold) => fold.reasoning_tokens(),
            Fold::Complete(_) => 0,
        }
    }

    /// Number of answers that the engine generates at the same time.
    pub(super) fn answer_count(&self) -> u32 {
        match self {
            Fold::Generate(_) => 1,
            Fold::Complete(fold) => fold.answer_count(),
        }
    }

    /// The finish reason of each answer.
    pub(super) fn finish_reasons(&self) -> Vec<&'static str> {
        match self {
            Fold::Generate(fold) => fold.finish_reasons(),
            Fold::Complete(fold) => fold.finish_reasons(),
        }
    }

    /// The request field that holds most of the prompt, for errors about its length.
    pub(super) fn longest_field(&self) -> &'static str {
        match self {
            Fold::Generate(_) => "code_context",
            Fold::Complete(_) => "prefix",
        }
    }
}
