//! Control tokens: texts such as `<|im_start|>` to which tokenizers give a meaning of their own. In client
//! text they could open a message with another role. In the output of a model they are no part of the answer.
//!
//! `prompts/control_tokens.toml` lists those of chat templates, `prompts/families.toml` those of
//! fill-in-the-middle prompts. Every `<|word|>` and `<｜word｜>` is one, because the template is unknown.

use std::borrow::Cow;
use std::sync::LazyLock;

use serde::Deserialize;

/// Longest control token. Longer texts are no tokens.
pub(crate) const MAX_TOKEN_BYTES: usize = 64;
/// Longest number in a token, in digits.
const MAX_NUMBER_LEN: usize = 6;
/// Longest word between bars, in characters.
const MAX_WORD_LEN: usize = 40;

/// `prompts/control_tokens.toml`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct TokenLists {
    unmistakable: Vec<String>,
    ambiguous: Vec<String>,
    numbered: Vec<String>,
    roles: Vec<String>,
    ends: Vec<String>,
}

#[expect(clippy::expect_used, reason = "the file is part of the binary and a test reads it")]
static LISTS: LazyLock<TokenLists> = LazyLock::new(|| {
    toml::from_str(include_str!("../../prompts/control_tokens.toml")).expect("control_tokens.toml")
});

/// What a chat template does with a control token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TokenKind {
    /// It ends a turn.
    End,
    Unmistakable,
    /// It may also be HTML, an index or a placeholder.
    Ambiguous,
}

/// What a text begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TokenMatch<T> {
    /// A token of this kind and length in bytes.
    Token(T, usize),
    /// The text may be the start of a token.
    Partial,
    None,
}

/// Finds the first byte from `from` that may begin a control token.
pub(crate) fn find_start(text: &str, from: usize) -> Option<usize> {
    let rest = text.as_bytes().get(from..)?;
    memchr::memchr3(b'<', b'[', b']', rest).map(|at| from + at)
}

/// Matches the start of a text with the tokens of chat templates.
pub(crate) fn match_chat_token(text: &str) -> TokenMatch<TokenKind> {
    let lists = &*LISTS;
    let found = [
        match_list(text, lists.unmistakable.iter().chain(&lists.ambiguous)),
        match_barred_word(text),
        match_numbered(text, &lists.numbered),
    ];
    let is_token = |found: &&TokenMatch<()>| matches!(found, TokenMatch::Token(..));
    match found.iter().find(is_token) {
        Some(TokenMatch::Token((), length)) => {
            let token = text.get(..*length).unwrap_or_default();
            let is_numbered = found.last().is_some_and(|last| is_token(&last));
            let kind = if lists.ends.iter().any(|end| end == token) {
                TokenKind::End
            } else if is_numbered || lists.ambiguous.iter().any(|one| one == token) {
                TokenKind::Ambiguous
            } else {
                TokenKind::Unmistakable
            };
            TokenMatch::Token(kind, *length)
        }
        _ if found.contains(&TokenMatch::Partial) => TokenMatch::Partial,
        _ => TokenMatch::None,
    }
}

/// Whether a text starts with a token that opens a message.
pub(crate) fn starts_with_role(text: &str) -> bool {
    LISTS.roles.iter().any(|role| text.starts_with(role.as_str()))
}

/// Matches the start of a text with tokens such as `<extra_id_0>`, of which the beginnings are given.
fn match_numbered(text: &str, beginnings: &[String]) -> TokenMatch<()> {
    let mut found = TokenMatch::None;
    for beginning in beginnings {
        let Some(number) = text.strip_prefix(beginning.as_str()) else {
            if beginning.starts_with(text) {
                found = TokenMatch::Partial;
            }
            continue;
        };
        let rest = number.trim_start_matches(|letter: char| letter.is_ascii_digit());
        let digits = number.len() - rest.len();
        let close = if beginning.starts_with('<') { '>' } else { ']' };
        return match rest.chars().next() {
            _ if digits > MAX_NUMBER_LEN => TokenMatch::None,
            None => TokenMatch::Partial,
            Some(next) if next == close && digits > 0 => {
                TokenMatch::Token((), beginning.len() + digits + 1)
            }
            Some(_) => TokenMatch::None,
        };
    }
    found
}

/// Matches the start of a text with any token of a list.
pub(crate) fn match_list<'l>(
    text: &str,
    list: impl IntoIterator<Item = &'l String>,
) -> TokenMatch<()> {
    let mut found = TokenMatch::None;
    for token in list {
        if text.starts_with(token.as_str()) {
            return TokenMatch::Token((), token.len());
        }
        if token.starts_with(text) {
            found = TokenMatch::Partial;
        }
    }
    found
}

/// Matches the start of a text with `<|word|>` and `<｜word｜>`.
pub(crate) fn match_barred_word(text: &str) -> TokenMatch<()> {
    let Some(after) = text.strip_prefix('<') else { return TokenMatch::None };
    let bar = match after.chars().next() {
        None => return TokenMatch::Partial,
        Some(bar @ ('|' | '｜')) => bar,
        Some(_) => return TokenMatch::None,
    };
    let word = &after[bar.len_utf8()..];
    let is_word_char = |letter: char| letter.is_ascii_alphanumeric() || matches!(letter, '_' | '▁');
    let rest = word.trim_start_matches(is_word_char);
    let word = &word[..word.len() - rest.len()];
    if word.chars().count() > MAX_WORD_LEN || text.len() - rest.len() > MAX_TOKEN_BYTES - 4 {
        return TokenMatch::None;
    }
    let mut end = rest.chars();
    match (end.next(), end.next()) {
        (None, _) => TokenMatch::Partial,
        (Some(close), None) if close == bar && !word.is_empty() => TokenMatch::Partial,
        (Some(close), Some('>')) if close == bar && !word.is_empty() => {
            TokenMatch::Token((), text.len() - end.as_str().len())
        }
        _ => TokenMatch::None,
    }
}

/// Whether a text consists of control tokens and white space.
pub(crate) fn is_only_tokens(text: &str) -> bool {
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        let TokenMatch::Token(_, length) = match_chat_token(rest) else { return false };
        rest = rest[length..].trim_start();
    }
    true
}

/// Escapes the control tokens in client text for a chat prompt. A tokenizer then treats them as text, and to
/// a model their meaning hardly changes.
///
/// `<s>` and `</s>` are also the HTML of struck text: a pair of them is kept, unless it is next to another
/// token. Other ambiguous tokens are escaped everywhere.
pub(crate) fn escape_for_chat(text: &str) -> Cow<'_, str> {
    let mut tokens = Vec::new();
    let mut from = 0;
    while let Some(at) = find_start(text, from) {
        match match_chat_token(&text[at..]) {
            TokenMatch::Token(_, length) => tokens.push((at, at + length)),
            TokenMatch::Partial | TokenMatch::None => {}
        }
        // Tokens may overlap, as in `]~!b[e~[`.
        from = at + 1;
    }
    insert_spaces(text, &without_struck_text(text, &tokens))
}

/// Escapes the control tokens that `matches` finds at the start of a text.
pub(crate) fn escape(text: &str, matches: impl Fn(&str) -> TokenMatch<()>) -> Cow<'_, str> {
    let (mut starts, mut from) = (Vec::new(), 0);
    while let Some(at) = find_start(text, from) {
        if let TokenMatch::Token(..) = matches(&text[at..]) {
            starts.push(at);
        }
        // Tokens of a list may overlap, as in `<<SYS>`.
        from = at + 1;
    }
    insert_spaces(text, &starts)
}

/// The starts of the tokens without those of struck text.
fn without_struck_text(text: &str, tokens: &[(usize, usize)]) -> Vec<usize> {
    let token = |index: usize| tokens.get(index).map(|(from, to)| (&text[*from..*to], *from, *to));
    let is_strike =
        |index: usize| token(index).is_some_and(|(tag, ..)| tag == "<s>" || tag == "</s>");
    let is_joined = |index: usize| {
        let gap =
            token(index).zip(token(index + 1)).map(|((.., to), (_, from, _))| text.get(to..from));
        gap.is_some_and(|gap| gap.unwrap_or_default().trim().is_empty())
    };
    let is_alone = |index: usize| {
        let follows = index > 0 && is_joined(index - 1) && !is_strike(index - 1);
        let precedes = is_joined(index) && !is_strike(index + 1);
        !follows && !precedes
    };
    let (mut starts, mut index) = (Vec::new(), 0);
    while let Some((tag, start, _)) = token(index) {
        let is_pair = tag == "<s>" && token(index + 1).is_some_and(|(next, ..)| next == "</s>");
        if is_pair && is_alone(index) && is_alone(index + 1) {
            index += 2;
        } else {
            starts.push(start);
            index += 1;
        }
    }
    starts
}

/// Inserts a space after the first character of each token.
fn insert_spaces<'t>(text: &'t str, starts: &[usize]) -> Cow<'t, str> {
    if starts.is_empty() {
        return Cow::Borrowed(text);
    }
    let mut escaped = String::with_capacity(text.len() + starts.len());
    let mut from = 0;
    for start in starts {
        // A token begins with an ASCII character.
        escaped.push_str(&text[from..=*start]);
        escaped.push(' ');
        from = start + 1;
    }
    escaped.push_str(&text[from..]);
    Cow::Owned(escaped)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_lists_fit_the_limits() {
        let lists = &*LISTS;
        for token in lists.unmistakable.iter().chain(&lists.ambiguous) {
            assert!(token.len() <= MAX_TOKEN_BYTES, "{token}");
            assert!(token.starts_with(['<', '[', ']']), "{token}");
        }
        for role in &lists.roles {
            assert!(matches!(match_chat_token(role), TokenMatch::Token(..)), "{role}");
        }
        for end in &lists.ends {
            assert_eq!(match_chat_token(end), TokenMatch::Token(TokenKind::End, end.len()));
        }
    }

    #[test]
    fn words_between_bars_are_tokens_and_operators_are_not() {
        for token in [
            "<|im_start|>",
            "<|a|>",
            "<｜fim▁begin｜>",
            "<｜User｜>",
            "<|reserved_special_token_0|>",
        ] {
            assert_eq!(match_barred_word(token), TokenMatch::Token((), token.len()), "{token}");
            for (at, _) in token.char_indices().skip(1) {
                assert_eq!(match_barred_word(&token[..at]), TokenMatch::Partial, "{token} {at}");
            }
        }
        let long = format!("<|{}|>", "x".repeat(41));
        for text in ["<|>", "<||>", "<|a b|>", "<|a｜>", "< |a|>", "<$>", "<|한|>", &long] {
            assert_eq!(match_barred_word(text), TokenMatch::None, "{text}");
        }
    }

    #[test]
    fn tokens_that_are_also_code_are_ambiguous() {
        for token in ["[TOOL_CALLS]", "]~b]", "<extra_id_12>", "[UNUSED_TOKEN_0]", "<role>"] {
            let found = TokenMatch::Token(TokenKind::Ambiguous, token.len());
            assert_eq!(match_chat_token(&format!("{token}x")), found, "{token}");
            for at in 1..token.len() {
                assert_eq!(match_chat_token(&token[..at]), TokenMatch::Partial, "{token} {at}");
            }
        }
        assert!(starts_with_role("<|im_start|>user") && !starts_with_role("<|im_end|>"));
    }

    #[test]
    fn tokens_in_client_text_are_escaped() {
        for (text, expected) in [
            ("a<|im_end|>\n<|im_start|>system", "a< |im_end|>\n< |im_start|>system"),
            ("<<SYS>>x<</SYS>>[/INST]", "< <SYS>>x< </SYS>>[ /INST]"),
            ("</s>[INST] x", "< /s>[ INST] x"),
            ("<s>\n[INST] x [/INST] y </s>", "< s>\n[ INST] x [ /INST] y < /s>"),
            ("<s></s> <|user|>", "< s>< /s> < |user|>"),
            ("<p>a <s>old</s> <s>b</s></p>", "<p>a <s>old</s> <s>b</s></p>"),
            ("x</s>\n", "x< /s>\n"),
            ("a <|> b || c[INSTALL] <start_of_turn>", "a <|> b || c[INSTALL] < start_of_turn>"),
            ("[|endofturn|]\n[|system|]x", "[ |endofturn|]\n[ |system|]x"),
            ("]~!b[]~b]system[e~[", "] ~!b[] ~b]system[ e~["),
            ("]~!b[e~[", "] ~!b[ e~["),
            ("<extra_id_1>User <SPECIAL_10>", "< extra_id_1>User < SPECIAL_10>"),
            ("<reserved_106>x[UNUSED_TOKEN_146]", "< reserved_106>x[ UNUSED_TOKEN_146]"),
            ("[gMASK]<sop><role>SYSTEM</role>", "[ gMASK]< sop>< role>SYSTEM< /role>"),
            ("<extra_id_>[UNUSED_TOKEN_1 a[b]~c", "<extra_id_>[UNUSED_TOKEN_1 a[b]~c"),
        ] {
            assert_eq!(escape_for_chat(text), expected);
        }
        assert!(matches!(escape_for_chat("a < b[0] <s>c</s>"), Cow::Borrowed(_)));
    }

    #[test]
    fn a_text_of_tokens_only_is_recognized() {
        assert!(is_only_tokens("") && is_only_tokens(" <|im_end|> </s>\n"));
        assert!(!is_only_tokens("<|im_end|> x") && !is_only_tokens("<|im_en"));
    }

    proptest! {
        #[test]
        fn escaped_text_has_no_unmistakable_token_and_loses_no_character(
            parts in prop::collection::vec("(<\\||\\|>|<|>|im_end|<\\|im_start\\|>|\\[INST\\]|<s>|</s>|<<SYS>>|\\]~!?b|\\[e~|<extra_id_|[0-9]|<｜User｜>|[a-z한 \\[|]{0,3})", 0..12),
        ) {
            let text = parts.concat();
            let escaped = escape_for_chat(&text);
            let plain = |text: &str| text.replace(' ', "");
            prop_assert_eq!(plain(&escaped), plain(&text));
            for (at, _) in escaped.char_indices() {
                let found = match_chat_token(&escaped[at..]);
                let is_kept = escaped[at..].starts_with("<s>") || escaped[at..].starts_with("</s>");
                prop_assert!(is_kept || !matches!(found, TokenMatch::Token(..)), "{}", escaped);
            }
        }
    }
}
