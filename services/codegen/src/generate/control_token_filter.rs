//! Removes control tokens from a streamed answer. Some engines return them as text, and some models continue
//! after the end of their turn. Answers may also explain chat templates, or contain code that builds them.
//!
//! A token is removed:
//! * at the start of the answer,
//! * directly after a fence that closes a block,
//! * at the end of the answer, if only white space and tokens follow. In a code block, only the end of a turn.
//!
//! At the end of a turn before the role of another message, the answer ends, except in a code block. All other
//! tokens are kept, and so is a token before a quotation mark, a backtick or a backslash, and the end of struck text.
//!
//! A possible token and at most 64 bytes after it are held back. The result does not depend on the pieces.

use std::borrow::Cow;

use crate::generate::code_block_tracker::CodeBlockTracker;
use crate::request::control_tokens::{
    TokenKind, TokenMatch, find_start, match_chat_token, starts_with_role,
};

/// Most bytes after a token that decide what happens to it.
const MAX_LOOKAHEAD_BYTES: usize = 64;
/// The words for roles in chat templates without the tokens around them.
const ROLES: [&str; 7] = ["user", "assistant", "system", "model", "tool", "human", "developer"];

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
    /// The role of another message, after white space and tokens.
    Role,
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

    /// Whether the text so far ends in a token that ends a turn. More text could still show that it is text.
    pub(crate) fn is_at_end_of_turn(&self) -> bool {
        match match_chat_token(&self.pending) {
            TokenMatch::Token(TokenKind::End, length) => {
                following(&self.pending, length, true) != Following::Text
            }
            _ => self.has_ended,
        }
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
        match text[length..].chars().next() {
            None if !is_last => return Decision::Hold,
            Some(next) if is_quote(next) => return Decision::Keep(length),
            _ => {}
        }
        if !self.has_text {
            return Decision::Remove(length);
        }
        let is_after_fence = self.blocks.is_after_closing_fence();
        if self.blocks.is_in_block() && !is_after_fence {
            return match following(text, length, is_last) {
                _ if kind != TokenKind::End => Decision::Keep(length),
                Following::End => Decision::EndAnswer,
                Following::Undecided => Decision::Hold,
                Following::Role | Following::Text => Decision::Keep(length),
            };
        }
        let token = &text[..length];
        if token == "</s>" && self.open_strikes > 0 {
            self.open_strikes -= 1;
            return Decision::Keep(length);
        }
        let is_end = kind == TokenKind::End || matches!(token, "</s>" | "<eos>");
        match following(text, length, is_last) {
            Following::Undecided => Decision::Hold,
            Following::End if kind == TokenKind::End => Decision::EndAnswer,
            Following::Role if is_end => Decision::EndAnswer,
            Following::End => Decision::Remove(length),
            _ if is_after_fence => Decision::Remove(length),
            Following::Role | Following::Text => {
                self.open_strikes += u32::from(token == "<s>");
                Decision::Keep(length)
            }
        }
    }
}

/// Whether a token before this character is quoted text.
fn is_quote(next: char) -> bool {
    matches!(next, '"' | '\'' | '`' | '\\')
}

/// What follows the token of this length.
fn following(text: &str, length: usize, is_last: bool) -> Following {
    let window = &text[..text.floor_char_boundary(length + MAX_LOOKAHEAD_BYTES)];
    let at_end = match (window.len() < text.len(), is_last) {
        (true, _) => Following::Text,
        (false, true) => Following::End,
        (false, false) => Following::Undecided,
    };
    let mut rest = &window[length..];
    loop {
        match match_role(rest, at_end) {
            Following::Text => {}
            found => return found,
        }
        rest = rest.trim_start();
        if rest.is_empty() {
            return at_end;
        }
        let length = match match_chat_token(rest) {
            TokenMatch::Token(_, length) => length,
            TokenMatch::Partial if at_end == Following::Undecided => return Following::Undecided,
            TokenMatch::Partial | TokenMatch::None => return Following::Text,
        };
        rest = &rest[length..];
        match rest.chars().next() {
            None => return at_end,
            Some(next) if is_quote(next) => return Following::Text,
            Some(_) => {}
        }
    }
}

/// Whether a text begins with a role, after white space: `Role`, or else `Text`. A word is a role on a line of its own,
/// or before a colon.
fn match_role(text: &str, at_end: Following) -> Following {
    let body = text.trim_start();
    if starts_with_role(body) {
        return Following::Role;
    }
    let rest = body.trim_start_matches(|letter: char| letter.is_ascii_alphabetic());
    let word = &body[..body.len() - rest.len()];
    let is_role = ROLES.iter().any(|role| role.eq_ignore_ascii_case(word));
    let has_break = text[..text.len() - body.len()].contains('\n');
    match rest.chars().next() {
        Some(':' | '\r' | '\n') if is_role && has_break => Following::Role,
        None if has_break && at_end == Following::Undecided => Following::Undecided,
        None if is_role && has_break && at_end == Following::End => Following::Role,
        _ => Following::Text,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::generate::pieces::cut;
    use crate::request::control_tokens::MAX_TOKEN_BYTES;

    fn filter<'t>(pieces: impl IntoIterator<Item = &'t str>) -> (String, bool, usize) {
        let mut filter = ControlTokenFilter::default();
        let mut kept = String::new();
        for piece in pieces {
            kept.push_str(&filter.push(piece));
            assert!(
                filter.pending.len() <= MAX_TOKEN_BYTES + MAX_LOOKAHEAD_BYTES + 8,
                "{}",
                filter.pending
            );
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
    fn tokens_are_removed_at_the_edges_and_a_new_message_ends_the_answer() {
        check("<|im_start|>a", "a", false);
        check("<|assistant|>\n```py\nx\n```\n<|im_end|>", "\n```py\nx\n```\n", true);
        check("<|begin_of_box|>42<|end_of_box|>", "42", false);
        check("a\n<|im_end|>\n<|im_start|>user\nb", "a\n", true);
        check("한<｜end▁of▁sentence｜><｜User｜>글", "한", true);
        check("a<|im_end|>\nuser\nb", "a", true);
        check("a<|endoftext|>\n\nHuman: b", "a", true);
        check("a<|eot_id|><|start_header_id|>user", "a", true);
        check("a</s>\n<|user|>\nb", "a", true);
        check("a [|endofturn|]", "a ", true);
        check("a<|im_end|>\n<|endoftext|>\n", "a", true);
    }

    #[test]
    fn a_code_block_loses_only_the_end_of_the_turn_after_it() {
        check("```py\nx = 1\n```<|im_end|>", "```py\nx = 1\n```", true);
        check("```py\nx = 1\n```<|im_end|>\nand", "```py\nx = 1\n```\nand", false);
        check("```py\nx = 1```<|im_end|>", "```py\nx = 1```", true);
        check("```py\nx = 1<end_of_turn>\n", "```py\nx = 1", true);
        check("```\nx\n```</s>\nand then", "```\nx\n```\nand then", false);
        for kept in [
            "```py\nT = \"\"\"<|im_start|>system\n{s}<|im_end|>\n<|im_start|>user\n\"\"\"\n```\nDone.",
            "```py\na = x[INST]\nb = T[SYSTEM_PROMPT]\nc = [TOOL_CALLS]\n```\n",
            "```py\np = f'<fim_prefix>{a}<fim_suffix>{b}<fim_middle>'\n```\n",
            "```jinja\n<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\n```\nDone\n",
            "```haskell\nf <|x|> g\n```\n",
            "```py\nEND = \"<|im_end|>\\n\" + '<|im_start|>'\n```\n",
        ] {
            check(kept, kept, false);
        }
    }

    #[test]
    fn tokens_in_text_and_operators_are_kept() {
        for kept in [
            "the token `<|im_end|>` ends a turn",
            "It ends each turn with <|im_end|> and starts it with <|im_start|>.\n",
            "| token | use |\n|---|---|\n| <|endoftext|> | end |\n",
            "a <|im_end|>\nusers are",
            "a<|fim_pad|>b<start_of_turn>c",
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
        check("a [e~[", "a ", false);
        check("<s> [/INST] a", "  a", false);
        for kept in [
            "a </s> b",
            "a </s> <|im_end|>b",
            "b = T[SYSTEM_PROMPT] + x",
            "<p>a <s>old</s>",
            "```html\n<s>a</s>\n```\n",
            "```html\na</s>",
            "a[INST] = b",
        ] {
            check(kept, kept, false);
        }
        let far = format!("a</s>{}", " ".repeat(MAX_LOOKAHEAD_BYTES + 1));
        check(&far, &far, false);
    }

    #[test]
    fn a_held_back_end_of_the_turn_is_reported() {
        let mut filter = ControlTokenFilter::default();
        filter.push("a<|im_end|>\n");
        assert!(filter.is_at_end_of_turn() && !filter.has_ended());
        assert_eq!(filter.push("is a token"), "<|im_end|>\nis a token");
        assert!(!filter.is_at_end_of_turn());
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
            parts in prop::collection::vec("<\\|im_end\\|>|<\\|a\\|>|</?s>|\\[INST\\]|<｜U｜>|<\\|im_start\\|>|user|User:|a:```py|[<|>\\[\"`]|```\n?|[a한 ]{1,4}|\n| {60}", 0..16),
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
