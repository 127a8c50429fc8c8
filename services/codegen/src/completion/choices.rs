//! The engine's choices while they grow, and the suggestions that are made of them.

use hapa_proto::codegen::v1::{Suggestion, Usage};

use crate::completion::question::Terms;
use crate::completion::reader::{Piece, Said};
use crate::completion::scope::Scope;
use crate::completion::trim::kept;
use crate::engine::FinishReason;
use crate::unicode::InvisibleCharFilter;

/// No choice grows beyond this, in bytes: 4,096 tokens of what models write are a tenth of it.
const LONGEST: usize = 256 * 1024;

#[derive(Debug)]
pub(crate) struct Choices {
    list: Vec<Choice>,
    /// Tokens of the model that end an answer, where they come as text.
    ends: &'static [String],
    /// As the engine counted at its end.
    usage: Option<Usage>,
}

#[derive(Debug)]
struct Choice {
    text: String,
    /// What nobody sees is left out.
    char_filter: InvisibleCharFilter,
    /// Where each piece begins in the text, and how likely it was.
    pieces: Vec<(usize, f64, u32)>,
    scope: Scope,
    /// Where the text ends by itself.
    natural: Option<usize>,
    finish_reason: Option<FinishReason>,
    usage: Option<Usage>,
    /// Pieces that had text: about as many tokens.
    counted: u32,
}

impl Choices {
    pub(crate) fn new(prefix: &str, terms: &Terms, ends: &'static [String]) -> Choices {
        let choice = || Choice {
            text: String::new(),
            char_filter: InvisibleCharFilter::default(),
            pieces: Vec::new(),
            scope: Scope::new(terms.kind, prefix),
            natural: None,
            finish_reason: None,
            usage: None,
            counted: 0,
        };
        Choices { list: (0..terms.most).map(|_| choice()).collect(), ends, usage: None }
    }

    pub(crate) fn take(&mut self, said: Said) {
        self.usage = said.usage.or(self.usage);
        for piece in said.pieces {
            // What was not asked for is not held.
            if let Some(choice) = self.list.get_mut(piece.index) {
                choice.take(&piece, self.ends);
            }
        }
    }

    /// Every choice has reached its end and the engine goes on with some: more would only cost. Where
    /// it has come to its own end of all, only its count of them is left, which is waited for.
    pub(crate) fn is_enough(&self) -> bool {
        self.list.iter().all(Choice::has_ended)
            && self.list.iter().any(|choice| choice.finish_reason.is_none())
    }

    /// Whether the engine said all that it had to say of what it began. Some engines make one choice,
    /// whatever they are asked for.
    pub(crate) fn is_whole(&self) -> bool {
        let broken = |choice: &Choice| match choice.finish_reason {
            Some(reason) => reason.is_failure(),
            None => choice.natural.is_none() && !choice.text.is_empty(),
        };
        !self.list.iter().any(broken) && self.list.iter().any(Choice::has_ended)
    }

    /// What there is of each choice, up to its end.
    pub(crate) fn texts(&self) -> impl Iterator<Item = &str> {
        self.list.iter().map(Choice::shown)
    }

    /// Why each that has ended did: what was cut where it is whole has stopped.
    pub(crate) fn reasons(&self) -> Vec<&'static str> {
        let ended = self.list.iter().filter(|choice| choice.has_ended());
        ended.map(|choice| choice.finish_reason.map_or("stop", FinishReason::as_str)).collect()
    }

    /// As the engine counted, at its end or along the way.
    pub(crate) fn usage(&self) -> Option<Usage> {
        if self.usage.is_some() {
            return self.usage;
        }
        let begun = || self.list.iter().filter(|choice| choice.counted > 0 || choice.has_ended());
        let prompt_tokens = begun().find_map(|choice| choice.usage)?.prompt_tokens;
        let counts: Option<Vec<u32>> =
            begun().map(|choice| Some(choice.usage?.completion_tokens)).collect();
        let completion_tokens = counts?.into_iter().fold(0_u32, u32::saturating_add);
        let total_tokens = prompt_tokens.saturating_add(completion_tokens);
        Some(Usage { prompt_tokens, completion_tokens, total_tokens })
    }

    /// Tokens that were read, as far as events tell.
    pub(crate) fn counted(&self) -> u32 {
        self.list.iter().fold(0, |sum, choice| sum.saturating_add(choice.counted))
    }

    /// The distinct texts that are worth inserting, best first.
    pub(crate) fn suggestions(&self, prefix: &str, terms: &Terms) -> Vec<Suggestion> {
        let mut suggestions: Vec<_> = (0..)
            .zip(&self.list)
            .filter_map(|(index, choice)| choice.suggestion(index, prefix, terms))
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
    fn take(&mut self, piece: &Piece, ends: &[String]) {
        self.usage = piece.usage.or(self.usage);
        self.counted = self.counted.saturating_add(u32::from(!piece.text.is_empty()));
        self.finish_reason = piece.finish_reason.or(self.finish_reason);
        if self.natural.is_some() {
            return;
        }
        let at = self.text.len();
        self.text.push_str(&self.char_filter.strip(&piece.text));
        if piece.tokens > 0 {
            self.pieces.push((at, piece.logprob, piece.tokens));
        }
        self.natural = self.scope.end(&self.text);
        let mut from = at.saturating_sub(ends.iter().map(String::len).max().unwrap_or(0));
        while !self.text.is_char_boundary(from) {
            from -= 1;
        }
        let token = ends.iter().filter_map(|end| self.text[from..].find(end)).min();
        if let Some(token) = token {
            self.natural = Some(self.natural.unwrap_or(usize::MAX).min(from + token));
        }
        if self.text.len() > LONGEST {
            self.natural = self.natural.or(Some(at));
        }
    }

    fn has_ended(&self) -> bool {
        self.natural.is_some() || self.finish_reason.is_some()
    }

    fn shown(&self) -> &str {
        &self.text[..self.natural.unwrap_or(self.text.len())]
    }

    fn suggestion(&self, index: u32, prefix: &str, terms: &Terms) -> Option<Suggestion> {
        let text = kept(prefix, &terms.suffix, self.shown());
        // What was cut does not depend on how the engine came to its end.
        let reason = match self.finish_reason {
            Some(reason) if text.len() == self.text.trim_end().len() => reason.as_str(),
            _ => "stop",
        };
        (!text.is_empty()).then(|| Suggestion {
            text: text.to_owned(),
            confidence: self.confidence(text.len()),
            completion_type: terms.kind.word().to_owned(),
            finish_reason: reason.to_owned(),
            index,
        })
    }

    /// Of the tokens that begin within so many bytes; 0 where the engine says nothing of them.
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
    use crate::completion::question::Question;

    fn asked(prefix: &str, kind: &str, most: i32) -> Question {
        let request = CompleteCodeRequest {
            prefix: prefix.to_owned(),
            completion_type: kind.to_owned(),
            max_suggestions: Some(most),
            ..Default::default()
        };
        Question::check(request).unwrap()
    }

    fn piece(index: usize, text: &str, logprob: f64) -> Piece {
        Piece { index, text: text.to_owned(), logprob, tokens: 1, ..Piece::default() }
    }

    fn end(index: usize, reason: &str) -> Piece {
        Piece {
            index,
            finish_reason: Some(std::borrow::Cow::from(reason).into()),
            ..Piece::default()
        }
    }

    fn said(pieces: Vec<Piece>) -> Said {
        Said { pieces, ..Said::default() }
    }

    #[test]
    fn suggestions_are_distinct_and_the_likeliest_come_first() {
        let question = asked("x = ", "inline", 4);
        let mut choices = Choices::new(&question.prefix, &question.terms, &[]);
        choices.take(said(vec![
            piece(0, "a", -1.0),
            piece(1, "b", -0.1),
            piece(2, "a ", -0.5),
            piece(0, "\n", -8.0),
            piece(9, "nobody asked", -0.1),
        ]));
        assert!(!choices.is_enough());
        choices.take(said(vec![end(1, "length"), end(2, "stop"), end(3, "stop")]));
        assert!(choices.is_enough() && choices.is_whole());
        choices.take(said(vec![end(0, "stop")]));
        assert!(!choices.is_enough(), "the engine's count of all is on its way");
        assert_eq!(choices.reasons(), ["stop", "length", "stop", "stop"]);
        let made = choices.suggestions(&question.prefix, &question.terms);
        let shown: Vec<_> = made.iter().map(|one| (one.text.as_str(), one.index)).collect();
        assert_eq!(shown, [("b", 1), ("a", 2)]);
        assert_eq!(
            (made[0].finish_reason.as_str(), made[1].finish_reason.as_str()),
            ("length", "stop")
        );
        assert!((made[0].confidence - (-0.1_f64).exp()).abs() < 1e-9);
    }

    #[test]
    fn confidence_is_of_what_is_kept_and_0_where_nothing_is_known() {
        let question = asked("x = ", "inline", 2);
        let mut choices = Choices::new(&question.prefix, &question.terms, &[]);
        let unknown = Piece { tokens: 0, ..piece(1, "c", 0.0) };
        choices.take(said(vec![
            piece(0, "a", -0.2),
            piece(0, "b", -0.4),
            piece(0, "\nz", -9.0),
            unknown,
            end(1, "stop"),
        ]));
        let made = choices.suggestions(&question.prefix, &question.terms);
        assert!((made[0].confidence - (-0.3_f64).exp()).abs() < 1e-9);
        assert_eq!(made[1].confidence.to_bits(), 0);
    }

    #[test]
    fn usage_is_the_engines_or_the_sum_of_what_it_counted_along_the_way() {
        let question = asked("x = ", "block", 2);
        let mut choices = Choices::new(&question.prefix, &question.terms, &[]);
        let counted = |completion_tokens| {
            Some(Usage { prompt_tokens: 7, completion_tokens, total_tokens: 7 + completion_tokens })
        };
        choices.take(said(vec![
            Piece { usage: counted(1), ..piece(0, "a", -0.2) },
            piece(1, "b", -0.2),
        ]));
        assert!(choices.usage().is_none(), "not known of both");
        choices.take(said(vec![Piece { usage: counted(3), ..piece(1, "c", -0.2) }]));
        assert_eq!(
            choices.usage(),
            Some(Usage { prompt_tokens: 7, completion_tokens: 4, total_tokens: 11 })
        );
        choices.take(Said { usage: counted(9), ..Said::default() });
        assert_eq!(choices.usage(), counted(9));
        assert_eq!(choices.counted(), 3);
    }

    #[test]
    fn a_models_end_that_comes_as_text_ends_a_choice() {
        static ENDS: std::sync::LazyLock<Vec<String>> =
            std::sync::LazyLock::new(|| vec!["<EOT>".to_owned()]);
        let question = asked("x = ", "block", 1);
        let mut choices = Choices::new(&question.prefix, &question.terms, &ENDS);
        choices.take(said(vec![piece(0, "1 한<EO", -0.1), piece(0, "T>rest", -0.1)]));
        assert!(choices.is_enough());
        assert_eq!(choices.texts().collect::<Vec<_>>(), ["1 한"]);
    }

    #[test]
    fn a_choice_that_broke_off_makes_the_answer_broken() {
        let question = asked("x = ", "block", 2);
        for (pieces, whole) in [
            (vec![piece(0, "a", -0.1), end(0, "stop")], true),
            (vec![piece(0, "a", -0.1), end(0, "stop"), piece(1, "b", -0.1)], false),
            (vec![piece(0, "a", -0.1), end(0, "abort")], false),
            (vec![], false),
        ] {
            let mut choices = Choices::new(&question.prefix, &question.terms, &[]);
            choices.take(said(pieces));
            assert_eq!(choices.is_whole(), whole);
        }
    }
}
