//! Removes control tokens from a streamed answer. Some engines return them as text, and some models continue
//! after the end of their turn.
//!
//! * Unmistakable tokens are removed everywhere. At a token that ends a turn, the answer ends.
//! * Ambiguous tokens, such as `</s>`, are removed at the start of the answer, directly after a fence, and at
//!   the end of the answer. In code and as the end of struck text they are kept.
//! * A token before a quotation mark, a backtick or a backslash is quoted text, and kept: answers may
//!   explain chat templates, or contain code that builds them.
//!
//! Only a possible token is held back, at most 64 bytes of it. The result does not depend on the pieces.

use std::borrow::Cow;

use crate::generate::code_block_tracker::CodeBlockTracker;
use crate::request::control_tokens::{TokenKind, TokenMatch, find_start, match_chat_token};

/// Most bytes that are held back.
const MAX_PENDING_BYTES: usize = 64;

/// The state of the filter between two pieces of the answer.
#[derive(Debug, Default)]
pub(crate) struct ControlTokenFilter {
    /// A possible token, and what follows it.
    pending: String,
    blocks: CodeBlockTracker,
    /// More than white space was kept.
    has_text: bool,
    /// Struck text `<s>…` without its `</s>`.
    open_strikes: u32,
    has_ended: bool,
    removed_count: usize,
}

/// What happens to the text at a possible token.
enum Decision {
    /// This many bytes are text.
    Keep(usize),
    /// This many bytes are a token.
    Remove(usize),
    EndAnswer,
    /// More text is needed.
    Hold,
}

/// What follows a token.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Following {
    /// Only white space and tokens until the end of the answer.
    End,
    Text,
    Undecided,
}

impl ControlTokenFilter {
    /// Filters the next piece.
    pub(crate) fn push<'t>(&mut self, text: &'t str) -> Cow<'t, str> {
        if self.has_ended {
            return Cow::Borrowed("");
        }
        if !self.pending.is_empty() {
            let mut joined = std::mem::take(&mut self.pending);
            joined.push_str(text);
            return Cow::Owned(self.filter(&joined, false).into_owned());
        }
        self.filter(text, false)
    }

    /// Returns the held-back text at the end of the answer.
    pub(crate) fn end(&mut self) -> String {
        let pending = std::mem::take(&mut self.pending);
        self.filter(&pending, true).into_owned()
    }

    /// Whether a token has ended the answer. All later text is dropped.
    pub(crate) fn has_ended(&self) -> bool {
        self.has_ended
    }

    /// The number of removed tokens.
    pub(crate) fn removed_count(&self) -> usize {
        self.removed_count
    }

    fn filter<'t>(&mut self, text: &'t str, is_last: bool) -> Cow<'t, str> {
        let mut kept = Cow::Borrowed("");
        // The text from `begin` to `at` is kept, and not yet added.
        let (mut begin, mut at) = (0, 0);
        while let Some(start) = find_start(text, at) {
            self.track(&text[at..start]);
            at = start;
            match self.decide(&text[start..], is_last) {
                Decision::Keep(length) => {
                    at += length;
                    self.track(&text[start..at]);
                }
                Decision::Remove(length) => {
                    self.removed_count += 1;
                    kept += &text[begin..start];
                    at += length;
                    begin = at;
                }
                Decision::EndAnswer => {
                    self.removed_count += 1;
                    self.has_ended = true;
                    return kept + &text[begin..start];
                }
                Decision::Hold => {
                    text[start..].clone_into(&mut self.pending);
                    return kept + &text[begin..start];
                }
            }
        }
        self.track(&text[at..]);
        kept + &text[begin..]
    }

    fn track(&mut self, text: &str) {
        self.has_text = self.has_text || !text.trim_start().is_empty();
        self.blocks.push(text);
    }

    fn decide(&mut self, text: &str, is_last: bool) -> Decision {
        let (kind, length) = match match_chat_token(text) {
            TokenMatch::Token(kind, length) => (kind, length),
            TokenMatch::Partial if !is_last => return Decision::Hold,
            TokenMatch::Partial | TokenMatch::None => return Decision::Keep(1),
        };
        if kind == TokenKind::Ambiguous {
            return self.decide_ambiguous(text, length, is_last);
        }
        match text[length..].chars().next() {
            None if !is_last => Decision::Hold,
            Some(next) if is_quote(next) => Decision::Keep(length),
            _ if kind == TokenKind::End => Decision::EndAnswer,
            _ => Decision::Remove(length),
        }
    }

    fn decide_ambiguous(&mut self, text: &str, length: usize, is_last: bool) -> Decision {
        if !self.has_text || self.blocks.is_after_fence() {
            return Decision::Remove(length);
        }
        if self.blocks.is_in_block() {
            return Decision::Keep(length);
        }
        if &text[..length] == "</s>" && self.open_strikes > 0 {
            self.open_strikes -= 1;
            return Decision::Keep(length);
        }
        match following(text, length, is_last) {
            Following::End => Decision::Remove(length),
            Following::Undecided => Decision::Hold,
            Following::Text => {
                self.open_strikes += u32::from(&text[..length] == "<s>");
                Decision::Keep(length)
            }
        }
    }
}

/// Whether a token before this character is quoted text.
fn is_quote(next: char) -> bool {
    matches!(next, '"' | '\'' | '`' | '\\')
}

/// What follows the token of this length. Only the first bytes are read, so that few are held back.
fn following(text: &str, length: usize, is_last: bool) -> Following {
    let window = &text[..text.floor_char_boundary(MAX_PENDING_BYTES)];
    let at_end = match (window.len() < text.len(), is_last) {
        (true, _) => Following::Text,
        (false, true) => Following::End,
        (false, false) => Following::Undecided,
    };
    let mut rest = window[length..].trim_start();
    while !rest.is_empty() {
        let (kind, length) = match match_chat_token(rest) {
            TokenMatch::Token(kind, length) => (kind, length),
            TokenMatch::Partial if at_end == Following::Undecided => return Following::Undecided,
            TokenMatch::Partial | TokenMatch::None => return Following::Text,
        };
        match rest[length..].chars().next() {
            _ if kind == TokenKind::Ambiguous => {}
            None if at_end != Following::End => return at_end,
            Some(next) if is_quote(next) => return Following::Text,
            _ if kind == TokenKind::End => return Following::End,
            _ => {}
        }
        rest = rest[length..].trim_start();
    }
    at_end
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::generate::pieces::cut;

    fn filter<'t>(pieces: impl IntoIterator<Item = &'t str>) -> (String, bool, usize) {
        let mut filter = ControlTokenFilter::default();
        let mut kept = String::new();
        for piece in pieces {
            kept.push_str(&filter.push(piece));
            assert!(filter.pending.len() <= MAX_PENDING_BYTES, "{}", filter.pending);
        }
        kept.push_str(&filter.end());
        (kept, filter.has_ended(), filter.removed_count())
    }

    fn check(answer: &str, expected: &str, has_ended: bool) {
        let (kept, ended, removed_count) = filter([answer]);
        assert_eq!((kept.as_str(), ended), (expected, has_ended), "{answer:?}");
        assert_eq!(removed_count == 0, answer == expected, "{answer:?}");
        let letters = filter(answer.split_inclusive(|_| true));
        assert_eq!(letters, (kept, ended, removed_count), "by letters: {answer:?}");
    }

    #[test]
    fn unmistakable_tokens_are_removed_and_ends_end_the_answer() {
        check("a<|fim_pad|>b<start_of_turn>c", "abc", false);
        check("a\n<|im_end|>\n<|im_start|>user\nb", "a\n", true);
        check("한<｜end▁of▁sentence｜>글", "한", true);
        check("```py\nx = 1\n```<|im_end|>", "```py\nx = 1\n```", true);
        check("```py\nx = 1<end_of_turn>\n", "```py\nx = 1", true);
        check("<|im_start|>a", "a", false);
        check("a [|endofturn|]", "a ", true);
    }

    #[test]
    fn quoted_tokens_and_operators_are_kept() {
        for kept in [
            "the token `<|im_end|>` ends a turn",
            "```py\nEND = \"<|im_end|>\\n\" + '<|im_start|>'\n```\n",
            "a <|> b <$> c <| d |> e <|",
            "x < y and z[0] <= w[INSTALL]",
            "a <|im_end",
        ] {
            check(kept, kept, false);
        }
    }

    #[test]
    fn ambiguous_tokens_are_removed_only_at_the_edges() {
        check("x = 1\n</s>", "x = 1\n", false);
        check("x = 1</s> \n</s>\n", "x = 1 \n\n", false);
        check("a </s> <|im_end|>b", "a  ", true);
        check("<s> [/INST] a", "  a", false);
        check("```\nx\n```</s>\nand then", "```\nx\n```\nand then", false);
        for kept in [
            "a </s> b",
            "<p>a <s>old</s>",
            "```html\n<s>a</s>\n```\n",
            "```html\na</s>",
            "a[INST] = b",
        ] {
            check(kept, kept, false);
        }
        let far = format!("a</s>{}", " ".repeat(MAX_PENDING_BYTES));
        check(&far, &far, false);
    }

    #[test]
    fn a_piece_without_tokens_is_not_copied() {
        let mut filter = ControlTokenFilter::default();
        for piece in ["a b\n", "x < y", "  한글\n", "v[0]\n"] {
            assert!(matches!(filter.push(piece), Cow::Borrowed(kept) if kept == piece));
        }
        assert!(matches!(filter.push("a <|im"), Cow::Borrowed("a ")));
    }

    proptest! {
        #[test]
        fn the_result_does_not_depend_on_the_pieces(
            parts in prop::collection::vec("<\\|im_end\\|>|<\\|a\\|>|</?s>|\\[INST\\]|<｜U｜>|[<|>\\[\"`]|```\n?|[a한 ]{1,4}|\n| {60}", 0..16),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..8),
        ) {
            let answer = parts.concat();
            let whole = filter([answer.as_str()]);
            prop_assert_eq!(&filter(answer.split_inclusive(|_| true)), &whole);
            let pieces = cut(&answer, &cuts);
            prop_assert_eq!(&filter(pieces), &whole);
        }
    }
}
