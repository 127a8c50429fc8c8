//! The growing choices of a completion, and the suggestions made from them.

use hapa_proto::codegen::v1::{Suggestion, Usage};

use crate::complete::completion_tokens::CompletionTokenFilter;
use crate::complete::params::CompletionOptions;
use crate::complete::scope::ScopeDetector;
use crate::complete::trim::trim_suggestion;
use crate::request::unicode::InvisibleCharFilter;
use crate::upstream::engine::{Content, EngineDelta, FinishReason, Piece, UsageCounter};

/// Maximum length of a choice: ten times the typical length of 4,096 tokens.
const MAX_CHOICE_BYTES: usize = 256 * 1024;

#[derive(Debug)]
pub(crate) struct Choices {
    list: Vec<Choice>,
    /// The usage that the engine reported at the end.
    usage: UsageCounter,
}

#[derive(Debug)]
struct Choice {
    text: String,
    /// Removes invisible characters.
    char_filter: InvisibleCharFilter,
    /// Ends the text at control tokens.
    token_filter: CompletionTokenFilter,
    /// Start of each piece in the text, the sum of its log probabilities, and its number of tokens.
    pieces: Vec<(usize, f64, u32)>,
    scope: ScopeDetector,
    /// Where the text ends by itself.
    natural_end: Option<usize>,
    finish_reason: Option<FinishReason>,
    usage: UsageCounter,
    /// Pieces with text: about the number of tokens.
    text_pieces: u32,
}

impl Choices {
    pub(crate) fn new(
        prefix: &str,
        options: &CompletionOptions,
        control_tokens: &'static [String],
    ) -> Choices {
        let choice = || Choice {
            text: String::new(),
            char_filter: InvisibleCharFilter::default(),
            token_filter: CompletionTokenFilter::new(control_tokens),
            pieces: Vec::new(),
            scope: ScopeDetector::new(options.kind, prefix),
            natural_end: None,
            finish_reason: None,
            usage: UsageCounter::default(),
            text_pieces: 0,
        };
        let list = (0..options.max_suggestions).map(|_| choice()).collect();
        Choices { list, usage: UsageCounter::default() }
    }

    pub(crate) fn push(&mut self, delta: EngineDelta) {
        self.usage.merge(delta.usage);
        for piece in delta.pieces {
            // Choices that were not requested are ignored.
            if let Some(choice) = self.list.get_mut(piece.choice) {
                choice.push(&piece);
            }
        }
    }

    /// Every choice has reached its natural end, but the engine continues some, so stopping it saves
    /// tokens. If the engine has ended all choices, only its usage is missing, which is worth waiting for.
    pub(crate) fn can_stop_early(&self) -> bool {
        self.have_ended() && self.list.iter().any(|choice| choice.finish_reason.is_none())
    }

    /// Whether every requested choice has ended.
    pub(crate) fn have_ended(&self) -> bool {
        self.list.iter().all(Choice::has_ended)
    }

    /// Whether every choice that the engine began is complete. Some engines generate only one choice.
    pub(crate) fn is_complete(&self) -> bool {
        let is_broken = |choice: &Choice| match choice.finish_reason {
            Some(reason) => reason.is_failure(),
            None => choice.natural_end.is_none() && !choice.text.is_empty(),
        };
        !self.list.iter().any(is_broken) && self.list.iter().any(Choice::has_ended)
    }

    /// The text of each choice up to its end.
    pub(crate) fn texts(&self) -> impl Iterator<Item = &str> {
        self.list.iter().map(Choice::visible_text)
    }

    /// The finish reason of each ended choice. A choice that was cut at its natural end has stopped.
    pub(crate) fn finish_reasons(&self) -> Vec<&'static str> {
        let ended = self.list.iter().filter(|choice| choice.has_ended());
        ended.map(|choice| choice.finish_reason.map_or("stop", FinishReason::as_str)).collect()
    }

    /// The usage that the engine reported, at the end or on the chunks so far.
    pub(crate) fn usage(&self) -> Option<Usage> {
        if let Some(usage) = self.usage.total() {
            return Some(usage);
        }
        let started =
            || self.list.iter().filter(|choice| choice.text_pieces > 0 || choice.has_ended());
        let prompt_tokens = started().find_map(|choice| choice.usage.total())?.prompt_tokens;
        let counts: Option<Vec<u32>> =
            started().map(|choice| Some(choice.usage.total()?.completion_tokens)).collect();
        let completion_tokens = counts?.into_iter().fold(0_u32, u32::saturating_add);
        let total_tokens = prompt_tokens.saturating_add(completion_tokens);
        Some(Usage { prompt_tokens, completion_tokens, total_tokens, ..Usage::default() })
    }

    /// The approximate number of tokens read.
    pub(crate) fn text_pieces(&self) -> u32 {
        self.list.iter().fold(0, |sum, choice| sum.saturating_add(choice.text_pieces))
    }

    /// The distinct, non-empty suggestions, best first.
    pub(crate) fn suggestions(&self, prefix: &str, options: &CompletionOptions) -> Vec<Suggestion> {
        let mut suggestions: Vec<_> = (0..)
            .zip(&self.list)
            .filter_map(|(index, choice)| choice.suggestion(index, prefix, options))
            .collect();
        suggestions.sort_by(|a, b| b.confidence.total_cmp(&a.confidence));
        let mut distinct: Vec<Suggestion> = Vec::with_capacity(suggestions.len());
        for suggestion in suggestions {
            if !distinct.iter().any(|other| other.text == suggestion.text) {
                distinct.push(suggestion);
            }
        }
        distinct
    }
}

impl Choice {
    fn push(&mut self, piece: &Piece) {
        self.usage.merge(piece.usage);
        self.text_pieces = self.text_pieces.saturating_add(piece.events);
        self.finish_reason = piece.finish_reason.or(self.finish_reason);
        if self.natural_end.is_some() {
            return;
        }
        let text = if let Content::Text(text) = &piece.content { text } else { "" };
        let at = self.text.len();
        let visible = self.char_filter.strip(text);
        self.text.push_str(&self.token_filter.push(&visible));
        if self.finish_reason.is_some() {
            self.text.push_str(&self.token_filter.end());
        }
        if piece.logprob_tokens > 0 {
            self.pieces.push((at, piece.logprob, piece.logprob_tokens));
        }
        self.natural_end = self.scope.find_end(&self.text);
        if self.token_filter.has_ended() {
            self.natural_end = self.natural_end.or(Some(self.text.len()));
        }
        if self.text.len() > MAX_CHOICE_BYTES {
            self.natural_end = self.natural_end.or(Some(at));
        }
    }

    fn has_ended(&self) -> bool {
        self.natural_end.is_some() || self.finish_reason.is_some()
    }

    fn visible_text(&self) -> &str {
        &self.text[..self.natural_end.unwrap_or(self.text.len())]
    }

    fn suggestion(
        &self,
        index: u32,
        prefix: &str,
        options: &CompletionOptions,
    ) -> Option<Suggestion> {
        let text = trim_suggestion(prefix, &options.suffix, self.visible_text());
        // After a cut, the engine's own finish reason does not apply.
        let reason = match self.finish_reason {
            Some(reason)
                if text.len() == self.text.trim_end().len() && !self.token_filter.has_ended() =>
            {
                reason.as_str()
            }
            _ => "stop",
        };
        (!text.is_empty()).then(|| Suggestion {
            text: text.to_owned(),
            confidence: self.confidence(text.len()),
            completion_type: options.kind.as_str().to_owned(),
            finish_reason: reason.to_owned(),
            index,
        })
    }

    /// Geometric mean of the token probabilities within the first `length` bytes; 0 if unknown.
    fn confidence(&self, length: usize) -> f64 {
        let kept = self.pieces.iter().filter(|(at, ..)| *at < length);
        let (sum, tokens) = kept.fold((0.0, 0_u32), |(sum, tokens), (_, logprob, more)| {
            (sum + logprob, tokens.saturating_add(*more))
        });
        if tokens == 0 { 0.0 } else { (sum / f64::from(tokens)).exp().clamp(0.0, 1.0) }
    }
}

#[cfg(test)]
mod tests {
    use hapa_proto::codegen::v1::CompleteCodeRequest;

    use super::*;
    use crate::complete::params::CompletionParams;

    fn params(prefix: &str, kind: &str, most: i32) -> CompletionParams {
        let request = CompleteCodeRequest {
            prefix: prefix.to_owned(),
            completion_type: kind.to_owned(),
            max_suggestions: Some(most),
            ..Default::default()
        };
        CompletionParams::validate(request).unwrap()
    }

    fn piece(index: usize, text: &str, logprob: f64) -> Piece {
        Piece {
            choice: index,
            content: Content::Text(text.to_owned()),
            events: 1,
            logprob,
            logprob_tokens: 1,
            ..Piece::default()
        }
    }

    fn end(index: usize, reason: &str) -> Piece {
        Piece { choice: index, finish_reason: Some(reason.into()), ..Piece::default() }
    }

    fn delta(pieces: Vec<Piece>) -> EngineDelta {
        EngineDelta { pieces, ..EngineDelta::default() }
    }

    #[test]
    fn suggestions_are_distinct_and_sorted_by_confidence() {
        let params = params("x = ", "inline", 4);
        let mut choices = Choices::new(&params.prefix, &params.options, &[]);
        choices.push(delta(vec![
            piece(0, "a", -1.0),
            piece(1, "b", -0.1),
            piece(2, "a ", -0.5),
            piece(0, "\n", -8.0),
            piece(9, "not requested", -0.1),
        ]));
        assert!(!choices.can_stop_early());
        choices.push(delta(vec![end(1, "length"), end(2, "stop"), end(3, "stop")]));
        assert!(choices.can_stop_early() && choices.is_complete());
        choices.push(delta(vec![end(0, "stop")]));
        assert!(!choices.can_stop_early(), "the usage of all choices is still to come");
        assert_eq!(choices.finish_reasons(), ["stop", "length", "stop", "stop"]);
        let suggestions = choices.suggestions(&params.prefix, &params.options);
        let texts: Vec<_> = suggestions.iter().map(|one| (one.text.as_str(), one.index)).collect();
        assert_eq!(texts, [("b", 1), ("a", 2)]);
        assert_eq!(
            (suggestions[0].finish_reason.as_str(), suggestions[1].finish_reason.as_str()),
            ("length", "stop")
        );
        assert!((suggestions[0].confidence - (-0.1_f64).exp()).abs() < 1e-9);
    }

    #[test]
    fn confidence_covers_the_kept_text_and_is_0_if_unknown() {
        let params = params("x = ", "inline", 2);
        let mut choices = Choices::new(&params.prefix, &params.options, &[]);
        let unknown = Piece { logprob_tokens: 0, ..piece(1, "c", 0.0) };
        choices.push(delta(vec![
            piece(0, "a", -0.2),
            piece(0, "b", -0.4),
            piece(0, "\nz", -9.0),
            unknown,
            end(1, "stop"),
        ]));
        let suggestions = choices.suggestions(&params.prefix, &params.options);
        assert!((suggestions[0].confidence - (-0.3_f64).exp()).abs() < 1e-9);
        assert_eq!(suggestions[1].confidence.to_bits(), 0);
    }

    #[test]
    fn usage_is_the_engines_total_or_the_sum_over_the_choices() {
        let params = params("x = ", "block", 2);
        let mut choices = Choices::new(&params.prefix, &params.options, &[]);
        let counted = |completion_tokens| {
            Some(Usage {
                prompt_tokens: 7,
                completion_tokens,
                total_tokens: 7 + completion_tokens,
                ..Usage::default()
            })
        };
        choices.push(delta(vec![
            Piece { usage: counted(1), ..piece(0, "a", -0.2) },
            piece(1, "b", -0.2),
        ]));
        assert!(choices.usage().is_none(), "unknown for one choice");
        choices.push(delta(vec![Piece { usage: counted(3), ..piece(1, "c", -0.2) }]));
        assert_eq!(
            choices.usage(),
            Some(Usage {
                prompt_tokens: 7,
                completion_tokens: 4,
                total_tokens: 11,
                ..Usage::default()
            })
        );
        choices.push(EngineDelta { usage: counted(9), ..EngineDelta::default() });
        assert_eq!(choices.usage(), counted(9));
        assert_eq!(choices.text_pieces(), 3);
    }

    #[test]
    fn a_control_token_that_arrives_as_text_ends_a_choice() {
        static CONTROL: std::sync::LazyLock<Vec<String>> =
            std::sync::LazyLock::new(|| vec!["<PRE>".to_owned()]);
        let params = params("x = ", "block", 3);
        let mut choices = Choices::new(&params.prefix, &params.options, &CONTROL);
        choices.push(delta(vec![piece(0, "1 한<PR", -0.1), piece(1, "f(<|cursor|>", -0.1)]));
        assert_eq!(choices.texts().collect::<Vec<_>>(), ["1 한", "f(", ""]);
        choices.push(delta(vec![piece(0, "E>rest", -0.1), piece(1, ") <", -0.1), end(1, "stop")]));
        choices.push(delta(vec![piece(2, "2<|im_end|>", -0.1)]));
        assert!(choices.can_stop_early());
        assert_eq!(choices.texts().collect::<Vec<_>>(), ["1 한", "f() <", "2"]);
    }

    #[test]
    fn a_choice_without_an_end_makes_the_response_incomplete() {
        let params = params("x = ", "block", 2);
        for (pieces, is_complete) in [
            (vec![piece(0, "a", -0.1), end(0, "stop")], true),
            (vec![piece(0, "a", -0.1), end(0, "stop"), piece(1, "b", -0.1)], false),
            (vec![piece(0, "a", -0.1), end(0, "abort")], false),
            (vec![], false),
        ] {
            let mut choices = Choices::new(&params.prefix, &params.options, &[]);
            choices.push(delta(pieces));
            assert_eq!(choices.is_complete(), is_complete);
        }
    }
}
