//! Where a suggestion ends. Whatever is cut, what is kept is a beginning of what the engine said, so
//! that an editor which shows it while it grows never has to change a letter of it.

use crate::completion::scope::last_line;

/// How far a suggestion goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Kind {
    Inline,
    Block,
    Function,
}

/// Of the suffix as much as this is compared, in bytes.
const LONGEST_OVERLAP: usize = 400;
/// Fewer letters than this come again by chance.
const SHORTEST_REPEAT: usize = 6;
/// The same for a line of the suffix.
const SHORTEST_LINE: usize = 3;

impl Kind {
    pub(crate) const ALL: [Kind; 3] = [Kind::Inline, Kind::Block, Kind::Function];

    /// The word of the API.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Kind::Inline => "inline",
            Kind::Block => "block",
            Kind::Function => "function",
        }
    }
}

/// What of a text is worth inserting between prefix and suffix, once it has been cut at its natural
/// end: without what the suffix goes on with, without the prefix's current line again, and without
/// white space at its end.
pub(crate) fn kept<'t>(prefix: &str, suffix: &str, text: &'t str) -> &'t str {
    let mut kept = before_repeated_line(last_line(prefix), text).trim_end();
    // Each cut may bare another; each makes it shorter.
    loop {
        let cut = before_line_of(suffix, kept);
        let cut = before_overlap(suffix, cut).trim_end();
        if cut.len() == kept.len() {
            return kept;
        }
        kept = cut;
    }
}

/// A model that has nothing to say begins the line that the cursor is in again.
fn before_repeated_line<'t>(current: &str, text: &'t str) -> &'t str {
    let current = current.trim();
    if current.chars().count() < SHORTEST_REPEAT {
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

/// Cuts where the first line of the suffix that says something stands in the text.
fn before_line_of<'t>(suffix: &str, text: &'t str) -> &'t str {
    let Some((line, whole)) = telling_line(suffix) else { return text };
    let mut at = 0;
    for said in text.split_inclusive('\n') {
        if whole {
            // The first is the rest of the cursor's line.
            if at > 0 && said.trim() == line {
                return &text[..at];
            }
        } else if let Some(begin) = said.trim_end().strip_suffix(line) {
            return &text[..at + begin.len()];
        }
        at += said.len();
    }
    text
}

/// The first line of the suffix with letters, and whether it is a line of its own. The rest of the
/// cursor's line is not.
fn telling_line(suffix: &str) -> Option<(&str, bool)> {
    let lines = suffix.split('\n').map(str::trim).enumerate().take(8);
    let mut telling = lines.filter(|(_, line)| says_something(line));
    telling.next().map(|(number, line)| (line, number > 0))
}

fn says_something(line: &str) -> bool {
    line.chars().count() >= SHORTEST_LINE && line.chars().any(char::is_alphanumeric)
}

fn is_word(letter: char) -> bool {
    letter.is_alphanumeric() || letter == '_'
}

/// Cuts an end of the text that the suffix begins with.
fn before_overlap<'t>(suffix: &str, text: &'t str) -> &'t str {
    let suffix = suffix.trim_start_matches([' ', '\t']);
    let mut most = suffix.len().min(text.len()).min(LONGEST_OVERLAP);
    while most > 0 {
        if suffix.is_char_boundary(most)
            && let Some(before) = text.strip_suffix(&suffix[..most])
            && is_repeated(before, &suffix[..most])
        {
            return before;
        }
        most -= 1;
    }
    text
}

/// Whether an end that equals the suffix's begin came instead of it. Letters may be equal by chance
/// where a word is cut; a bracket or a quote is the suffix's only where nothing in the text needs it.
fn is_repeated(before: &str, overlap: &str) -> bool {
    let said = overlap.trim();
    if said.is_empty() {
        return true;
    }
    if says_something(said) {
        let cuts_word = before.ends_with(is_word) && overlap.starts_with(is_word);
        return !cuts_word;
    }
    if said.chars().any(char::is_alphanumeric) {
        return false;
    }
    let open = |from: char, to: char| {
        before.chars().fold(0_i32, |open, letter| match letter {
            letter if letter == from => open + 1,
            letter if letter == to => open - 1,
            _ => open,
        })
    };
    said.chars().all(|letter| match letter {
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
    fn what_the_suffix_goes_on_with_is_left_out() {
        for (prefix, suffix, said, expected) in [
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
            assert_eq!(kept(prefix, suffix, said), expected, "{prefix:?} {suffix:?} {said:?}");
        }
    }

    #[test]
    fn the_line_that_the_cursor_is_in_is_not_said_again() {
        assert_eq!(kept("def add(a, b):", "", "def add(a, b):\n    return a"), "");
        assert_eq!(kept("total = ", "", "a\ntotal =\nb"), "a");
        assert_eq!(kept("f(", "", "f(x)"), "f(x)");
    }

    proptest! {
        #[test]
        fn what_is_kept_is_a_beginning_without_a_line_of_the_suffix(
            prefix in "([a-z한]{0,4}|[ \n(){}=\"':;,]){0,12}",
            suffix in "([a-z한]{0,4}|[ \n(){}=\"':;,]){0,12}",
            said in "([a-z한]{0,4}|[ \n(){}=\"':;,]){0,12}",
            again in any::<bool>(), tail in "[a-z \n)]{0,3}",
        ) {
            let text = if again { format!("{said}{suffix}{tail}") } else { said };
            let kept = kept(&prefix, &suffix, &text);
            prop_assert!(text.starts_with(kept));
            prop_assert_eq!(kept, kept.trim_end());
            let line = suffix.split('\n').next().unwrap_or_default().trim();
            let Some(before) = kept.strip_suffix(line).filter(|_| says_something(line)) else { return Ok(()) };
            // A word of the text that only ends like the suffix's line is a word of its own.
            let own_word = before.ends_with(is_word) && line.starts_with(is_word);
            prop_assert!(own_word, "{:?} {:?}", suffix, kept);
        }
    }
}
