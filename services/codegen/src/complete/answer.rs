//! The fold of a completion: the growing choices, and at the end the suggestions made from them.

use hapa_proto::codegen::v1::Usage;

use crate::complete::choices::Choices;
use crate::complete::params::CompletionOptions;
use crate::stream::{AnswerEnd, Delta, StreamItem, Track};
use crate::upstream::engine::EngineDelta;

/// See the module.
pub(crate) struct CompleteFold {
    prefix: String,
    options: CompletionOptions,
    choices: Choices,
    /// Number of bytes of each choice that were emitted.
    emitted: Vec<usize>,
}

impl CompleteFold {
    pub(crate) fn new(
        prefix: &str,
        options: &CompletionOptions,
        end_tokens: &'static [String],
    ) -> CompleteFold {
        CompleteFold {
            choices: Choices::new(prefix, options, end_tokens),
            emitted: vec![0; options.max_suggestions],
            prefix: prefix.to_owned(),
            options: options.clone(),
        }
    }

    pub(crate) fn push(&mut self, delta: EngineDelta, items: &mut Vec<StreamItem>) {
        self.choices.push(delta);
        let grown = (0..).zip(self.choices.texts()).zip(&mut self.emitted);
        items.extend(grown.filter_map(|((index, text), emitted)| {
            // The end of a text can turn out to be before what was emitted.
            let new = text.get(*emitted..).filter(|new| !new.is_empty())?;
            *emitted = text.len();
            Some(StreamItem::Delta(Delta::new(Track::Suggestion(index), new)))
        }));
    }

    pub(crate) fn is_complete(&self) -> bool {
        self.choices.is_complete()
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.choices.have_ended()
    }

    pub(crate) fn can_stop_early(&self) -> bool {
        self.choices.can_stop_early()
    }

    pub(crate) fn finish(&self) -> AnswerEnd {
        let suggestions = self.choices.suggestions(&self.prefix, &self.options);
        AnswerEnd { suggestions, usage: self.usage(), ..AnswerEnd::default() }
    }

    pub(crate) fn usage(&self) -> Option<Usage> {
        self.choices.usage()
    }

    pub(crate) fn token_events(&self) -> u32 {
        self.choices.text_pieces()
    }

    pub(crate) fn answer_count(&self) -> u32 {
        u32::try_from(self.options.max_suggestions).unwrap_or(1)
    }

    pub(crate) fn finish_reasons(&self) -> Vec<&'static str> {
        self.choices.finish_reasons()
    }
}
