//! Control tokens in generated suggestions, which some engines return as text. A suggestion ends at the first one.
//! Tokens that mark the cursor are left out, and the suggestion continues.
//!
//! Only a possible token is held back. The result does not depend on the pieces.

use std::borrow::Cow;

use crate::request::control_tokens::{
    TokenKind, TokenMatch, find_start, match_chat_token, match_list,
};

/// Filters the text of one choice.
#[derive(Debug, Default)]
pub(crate) struct CompletionTokenFilter {
    /// The tokens of the model's family, in addition to those of chat templates.
    tokens: &'static [String],
    /// A possible token.
    pending: String,
    has_ended: bool,
}

impl CompletionTokenFilter {
    pub(crate) fn new(tokens: &'static [String]) -> CompletionTokenFilter {
        CompletionTokenFilter { tokens, ..CompletionTokenFilter::default() }
    }

    /// Filters the next piece.
    pub(crate) fn push<'t>(&mut self, text: &'t str) -> Cow<'t, str> {
        if self.has_ended {
            return Cow::Borrowed("");
        }
        if self.pending.is_empty() {
            return self.filter(text);
        }
        let mut joined = std::mem::take(&mut self.pending);
        joined.push_str(text);
        Cow::Owned(self.filter(&joined).into_owned())
    }

    /// Returns the held-back text at the end of the choice.
    pub(crate) fn end(&mut self) -> String {
        std::mem::take(&mut self.pending)
    }

    /// Whether a token has ended the suggestion. All later text is dropped.
    pub(crate) fn has_ended(&self) -> bool {
        self.has_ended
    }

    fn filter<'t>(&mut self, text: &'t str) -> Cow<'t, str> {
        let (mut kept, mut from) = (Cow::Borrowed(""), 0);
        loop {
            match find_control_token(text, from, self.tokens) {
                Some((start, Some(end))) if is_cursor(&text[start..end]) => {
                    kept += &text[from..start];
                    from = end;
                }
                Some((start, end)) => {
                    self.has_ended = end.is_some();
                    if !self.has_ended {
                        text[start..].clone_into(&mut self.pending);
                    }
                    return kept + &text[from..start];
                }
                None => return kept + &text[from..],
            }
        }
    }
}

/// Finds the first control token from `from`: its start and its end. Without an end, the text may end in the
/// start of a token.
pub(crate) fn find_control_token(
    text: &str,
    mut from: usize,
    tokens: &[String],
) -> Option<(usize, Option<usize>)> {
    while let Some(start) = find_start(text, from) {
        let of_family = match_list(&text[start..], tokens);
        let of_template = match_chat_token(&text[start..]);
        match (of_family, of_template) {
            (TokenMatch::Token((), length), _) => return Some((start, Some(start + length))),
            (_, TokenMatch::Token(kind, length)) if kind != TokenKind::Ambiguous => {
                return Some((start, Some(start + length)));
            }
            (TokenMatch::Partial, _) | (_, TokenMatch::Partial) => return Some((start, None)),
            _ => from = start + 1,
        }
    }
    None
}

/// Whether a control token marks the cursor, as `<|cursor|>` does.
pub(crate) fn is_cursor(token: &str) -> bool {
    token.starts_with("<|") && token.to_ascii_lowercase().contains("cursor")
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use proptest::prelude::*;

    use super::*;

    static FAMILY: LazyLock<Vec<String>> =
        LazyLock::new(|| ["<PRE>", "</s>"].map(str::to_owned).to_vec());

    fn filter<'t>(
        tokens: &'static [String],
        pieces: impl IntoIterator<Item = &'t str>,
    ) -> (String, bool) {
        let (mut filter, mut kept) = (CompletionTokenFilter::new(tokens), String::new());
        for piece in pieces {
            kept.push_str(&filter.push(piece));
        }
        kept.push_str(&filter.end());
        (kept, filter.has_ended())
    }

    #[test]
    fn a_suggestion_ends_at_a_control_token_and_continues_after_the_cursor() {
        for (text, expected, has_ended) in [
            ("1<|fim_pad|>2", "1", true),
            ("f(<|cursor|>)", "f()", false),
            ("f(<|user_cursor_is_here|>)<|im_end|>\n", "f()", true),
            ("2<｜end▁of▁sentence｜>", "2", true),
            ("a<fim_middle>b", "a", true),
            ("a<PRE>b", "a", true),
            ("<p></s></p>", "<p>", true),
            ("a < b <| c[0] <", "a < b <| c[0] <", false),
        ] {
            assert_eq!(filter(&FAMILY, [text]), (expected.to_owned(), has_ended), "{text}");
        }
        assert_eq!(filter(&[], ["<PRE></s><s>[INST]"]).0, "<PRE></s><s>[INST]");
        assert_eq!(filter(&[], ["a<|x|>b"]), ("a".to_owned(), true));
    }

    proptest! {
        #[test]
        fn the_result_does_not_depend_on_the_pieces(
            parts in prop::collection::vec("<\\|cursor\\|>|<\\|a\\|>|<PRE>|</s>|<fim_pad>|[a한<|>\\[P]{1,3}", 0..10),
        ) {
            let text = parts.concat();
            prop_assert_eq!(filter(&FAMILY, text.split_inclusive(|_| true)), filter(&FAMILY, [text.as_str()]));
        }
    }
}
