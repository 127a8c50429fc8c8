//! Trims suggestions. The result is always a prefix of the generated text, so an editor that shows a
//! growing suggestion never has to change a character of it.

use crate::complete::scope::last_line;

/// The extent of a suggestion.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum CompletionKind {
    Inline,
    Block,
    Function,
}

/// Maximum number of bytes of the suffix that are compared.
const MAX_OVERLAP_BYTES: usize = 400;
/// Shorter lines may be repeated by chance. In characters.
const MIN_REPEATED_LINE_LEN: usize = 6;
/// The same for a line of the suffix.
const MIN_SUFFIX_LINE_LEN: usize = 3;

impl CompletionKind {
    pub(crate) const ALL: [CompletionKind; 3] =
        [CompletionKind::Inline, CompletionKind::Block, CompletionKind::Function];

    /// Value in the API.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            CompletionKind::Inline => "inline",
            CompletionKind::Block => "block",
            CompletionKind::Function => "function",
        }
    }
}

/// Trims a text that ends at its natural end for insertion between prefix and suffix. Removes what the
/// suffix repeats, a repetition of the current line, and trailing white space.
pub(crate) fn trim_suggestion<'t>(prefix: &str, suffix: &str, text: &'t str) -> &'t str {
    let mut kept = before_repeated_line(last_line(prefix), text).trim_end();
    // One cut may expose another. The loop ends because each cut shortens the text.
    loop {
        let cut = before_line_of(suffix, kept);
        let cut = before_overlap(suffix, cut).trim_end();
        if cut.len() == kept.len() {
            return kept;
        }
        kept = cut;
    }
}

/// Cuts before a repetition of the cursor's line, which models generate if nothing is left to complete.
fn before_repeated_line<'t>(current: &str, text: &'t str) -> &'t str {
    let current = current.trim();
    if current.chars().count() < MIN_REPEATED_LINE_LEN {
        return text;
    }
    let mut at = 0;
    for line in text.split_inclusive('\n') {
        let again =
            if at == 0 { line.trim_start().starts_with(current) } else { line.trim() == current };
        if again {
            return &text[..at];
        }
        at += line.len();
    }
    text
}

/// Cuts where the text repeats the first meaningful line of the suffix.
fn before_line_of<'t>(suffix: &str, text: &'t str) -> &'t str {
    let Some((line, whole)) = first_meaningful_line(suffix) else { return text };
    let mut at = 0;
    for generated in text.split_inclusive('\n') {
        if whole {
            // The first line of the text is the rest of the cursor's line.
            if at > 0 && generated.trim() == line {
                return &text[..at];
            }
        } else if let Some(begin) = generated.trim_end().strip_suffix(line) {
            return &text[..at + begin.len()];
        }
        at += generated.len();
    }
    text
}

/// The first meaningful line of the suffix, and whether it is a complete line. The rest of the cursor's
/// line is not.
fn first_meaningful_line(suffix: &str) -> Option<(&str, bool)> {
    let lines = suffix.split('\n').map(str::trim).enumerate().take(8);
    let mut meaningful = lines.filter(|(_, line)| is_meaningful(line));
    meaningful.next().map(|(number, line)| (line, number > 0))
}

fn is_meaningful(line: &str) -> bool {
    line.chars().count() >= MIN_SUFFIX_LINE_LEN && line.chars().any(char::is_alphanumeric)
}

fn is_word_char(letter: char) -> bool {
    letter.is_alphanumeric() || letter == '_'
}

/// Cuts an end of the text with which the suffix begins.
fn before_overlap<'t>(suffix: &str, text: &'t str) -> &'t str {
    let suffix = suffix.trim_start_matches([' ', '\t']);
    let mut length = suffix.len().min(text.len()).min(MAX_OVERLAP_BYTES);
    while length > 0 {
        if suffix.is_char_boundary(length)
            && let Some(before) = text.strip_suffix(&suffix[..length])
            && is_repeated(before, &suffix[..length])
        {
            return before;
        }
        length -= 1;
    }
    text
}

/// Whether an end of the text that equals the start of the suffix repeats it. Within a word, equal letters
/// may be chance. A bracket or quote repeats the suffix only if it closes nothing in the text.
fn is_repeated(before: &str, overlap: &str) -> bool {
    let generated = overlap.trim();
    if generated.is_empty() {
        return true;
    }
    if is_meaningful(generated) {
        let cuts_word = before.ends_with(is_word_char) && overlap.starts_with(is_word_char);
        return !cuts_word;
    }
    if generated.chars().any(char::is_alphanumeric) {
        return false;
    }
    let open = |from: char, to: char| {
        before.chars().fold(0_i32, |open, letter| match letter {
            letter if letter == from => open + 1,
            letter if letter == to => open - 1,
            _ => open,
        })
    };
    generated.chars().all(|letter| match letter {
        ')' => open('(', ')') <= 0,
        ']' => open('[', ']') <= 0,
        '}' => open('{', '}') <= 0,
        quote @ ('"' | '\'' | '`') => before.matches(quote).count() % 2 == 0,
        _ => true,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn text_that_repeats_the_suffix_is_removed() {
        for (prefix, suffix, generated, expected) in [
            ("print(", ")\n", "x)", "x"),
            ("print(", ")\n", "f(x))", "f(x)"),
            ("print(", ")\n", "f(x)", "f(x)"),
            ("print(\"", "\")\n", "hello\")", "hello"),
            ("a = ", "\nreturn a\n", "1\nreturn a\n", "1"),
            ("a = ", "\n    return a\n", "1\n    return", "1"),
            ("a = ", "\n    return a\n", "1\n    return a\n\nb = 2", "1"),
            ("a = ", " + total\n", "first + total", "first"),
            ("x = [", "]\ny = 1\n", "1, 2]\ny = 1", "1, 2"),
            ("let s = ", ";\n", "f();", "f()"),
            ("    ", "\n", "    한글 = \"값\"\n\n", "    한글 = \"값\""),
            ("a", "bcd_efg()", "xbcd", "xbcd"),
        ] {
            assert_eq!(
                trim_suggestion(prefix, suffix, generated),
                expected,
                "{prefix:?} {suffix:?} {generated:?}"
            );
        }
    }

    #[test]
    fn a_repetition_of_the_cursors_line_is_removed() {
        assert_eq!(trim_suggestion("def add(a, b):", "", "def add(a, b):\n    return a"), "");
        assert_eq!(trim_suggestion("total = ", "", "a\ntotal =\nb"), "a");
        assert_eq!(trim_suggestion("f(", "", "f(x)"), "f(x)");
    }

    proptest! {
        #[test]
        fn the_trimmed_text_is_a_prefix_of_the_text_and_does_not_end_with_a_suffix_line(
            prefix in "([a-z한]{0,4}|[ \n(){}=\"':;,]){0,12}",
            suffix in "([a-z한]{0,4}|[ \n(){}=\"':;,]){0,12}",
            generated in "([a-z한]{0,4}|[ \n(){}=\"':;,]){0,12}",
            again in any::<bool>(), tail in "[a-z \n)]{0,3}",
        ) {
            let text = if again { format!("{generated}{suffix}{tail}") } else { generated };
            let kept = trim_suggestion(&prefix, &suffix, &text);
            prop_assert!(text.starts_with(kept));
            prop_assert_eq!(kept, kept.trim_end());
            let line = suffix.split('\n').next().unwrap_or_default().trim();
            let Some(before) = kept.strip_suffix(line).filter(|_| is_meaningful(line)) else { return Ok(()) };
            // A word of the text that only ends like the suffix's line is a different word.
            let own_word = before.ends_with(is_word_char) && line.starts_with(is_word_char);
            prop_assert!(own_word, "{:?} {:?}", suffix, kept);
        }
    }
}
