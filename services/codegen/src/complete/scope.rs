//! Detects the natural end of growing code from its lines and their indentation. An inline completion
//! ends with its line. A block or a function ends where its indentation ends, after a closing bracket.

use crate::complete::trim::CompletionKind;

/// A tab counts as this many spaces.
const TAB_WIDTH: usize = 4;
/// Words that continue a block that seemed to end.
const CONTINUATION_WORDS: [&str; 8] =
    ["else", "elif", "elseif", "elsif", "except", "finally", "catch", "rescue"];
/// Words that mark the first line of a function.
const FUNCTION_WORDS: [&str; 8] = ["def", "fn", "func", "fun", "function", "sub", "proc", "method"];

pub(crate) fn last_line(text: &str) -> &str {
    text.rsplit('\n').next().unwrap_or_default()
}

/// Scans a growing text for its natural end.
#[derive(Clone, Debug)]
pub(crate) struct ScopeDetector {
    kind: CompletionKind,
    /// The line of the prefix that the cursor is in.
    current: String,
    base_indent: usize,
    /// A line has opened a body, which is indented deeper than `base_indent`.
    has_body: bool,
    /// A line with content was seen.
    has_content: bool,
    /// The text is scanned up to here; always the start of a line.
    scanned: usize,
    end: Option<usize>,
}

impl ScopeDetector {
    pub(crate) fn new(kind: CompletionKind, prefix: &str) -> ScopeDetector {
        let current = last_line(prefix).to_owned();
        let (mut base_indent, mut has_body) = (indentation(&current), false);
        if kind == CompletionKind::Function
            && let Some(header) = enclosing_function(prefix)
        {
            (base_indent, has_body) = (header, true);
        }
        ScopeDetector {
            kind,
            current,
            base_indent,
            has_body,
            has_content: false,
            scanned: 0,
            end: None,
        }
    }

    /// Scans the new part of `text`, which is the complete text so far. Returns the natural end as soon as
    /// it is certain.
    pub(crate) fn find_end(&mut self, text: &str) -> Option<usize> {
        if self.kind == CompletionKind::Inline {
            self.end = self.end.or_else(|| text.find(['\n', '\r']));
        }
        while self.end.is_none() {
            let rest = text.get(self.scanned..)?;
            let Some(length) = rest.find('\n').map(|at| at + 1) else {
                if self.ends_before_partial_line(rest) {
                    self.end = Some(self.scanned);
                }
                break;
            };
            self.end = self.scan_line(&rest[..length]);
            self.scanned += length;
        }
        self.end
    }

    /// Scans a complete line. Returns the end of the text if this line determines it.
    fn scan_line(&mut self, line: &str) -> Option<usize> {
        if self.scanned == 0 {
            self.scan_first_line(line);
            return None;
        }
        if line.trim().is_empty() {
            // Top-level code has no enclosing block, so a blank line ends it.
            let ends_at_blank = self.kind == CompletionKind::Block
                && self.base_indent == 0
                && !self.has_body
                && self.has_content;
            return ends_at_blank.then_some(self.scanned);
        }
        self.has_content = true;
        let indentation = indentation(line);
        if self.has_body && indentation <= self.base_indent {
            return match LineStart::classify(line) {
                _ if indentation < self.base_indent => Some(self.scanned),
                LineStart::Continues => None,
                LineStart::Closes => Some(self.scanned + line.trim_end().len()),
                LineStart::Other => Some(self.scanned),
            };
        }
        if !self.has_body && indentation < self.base_indent {
            return Some(self.scanned);
        }
        if self.kind == CompletionKind::Function
            && indentation == self.base_indent
            && is_function_header(line)
        {
            self.has_body = true;
        }
        None
    }

    fn scan_first_line(&mut self, line: &str) {
        self.has_content = !line.trim().is_empty();
        let joined = format!("{}{line}", self.current);
        if self.has_body || joined.trim().is_empty() {
            return;
        }
        self.base_indent = indentation(&joined);
        self.has_body = match self.kind {
            CompletionKind::Function => {
                is_function_header(&joined)
                    || opens_body(&joined) && !self.current.trim().is_empty()
            }
            _ => opens_body(&joined),
        };
    }

    /// Whether an incomplete line already shows that the text ends before it.
    fn ends_before_partial_line(&self, line: &str) -> bool {
        if self.scanned == 0 || line.trim().is_empty() {
            return false;
        }
        let indentation = indentation(line);
        if !self.has_body || indentation < self.base_indent {
            return indentation < self.base_indent;
        }
        // A bracket or a word that may continue the block is decided only at the end of the line.
        let begin = line.trim_start();
        let may_be = |word: &str| word.starts_with(begin) || begin.starts_with(word);
        let may_continue = begin.starts_with(['}', ')', ']'])
            || may_be("end")
            || CONTINUATION_WORDS.iter().any(|word| may_be(word));
        indentation == self.base_indent && !may_continue
    }
}

/// The start of a line that is indented like the header of a body.
enum LineStart {
    /// `} else {`, `except ValueError:`, `) -> int:`.
    Continues,
    /// `}`, `});`, `end`.
    Closes,
    Other,
}

impl LineStart {
    fn classify(line: &str) -> LineStart {
        let line = line.trim();
        if line.starts_with(['}', ')', ']']) {
            return if opens_body(line) { LineStart::Continues } else { LineStart::Closes };
        }
        match first_word(line) {
            word if CONTINUATION_WORDS.contains(&word) => LineStart::Continues,
            "end" => LineStart::Closes,
            _ => LineStart::Other,
        }
    }
}

fn first_word(line: &str) -> &str {
    line.split(|letter: char| !letter.is_alphanumeric()).next().unwrap_or_default()
}

/// Whether a body with deeper indentation follows.
fn opens_body(line: &str) -> bool {
    let line = line.trim_end();
    line.ends_with([':', '{', '(', '[']) || line.ends_with(" do") || line.ends_with(" then")
}

fn is_function_header(line: &str) -> bool {
    line.split(|letter: char| !letter.is_alphanumeric()).any(|word| FUNCTION_WORDS.contains(&word))
}

/// Indentation of the function around the cursor, if its first line is in the prefix.
fn enclosing_function(prefix: &str) -> Option<usize> {
    let mut lines = prefix.rsplit('\n');
    let current = lines.next().unwrap_or_default();
    if is_function_header(current) {
        return Some(indentation(current));
    }
    // An empty line has no depth of its own: the cursor may be as deep as the line before, or deeper.
    let mut depth = if current.is_empty() { usize::MAX } else { indentation(current) };
    for line in lines.filter(|line| !line.trim().is_empty()) {
        let indentation = indentation(line);
        if indentation < depth {
            if is_function_header(line) && opens_body(line) {
                return Some(indentation);
            }
            depth = indentation;
        }
    }
    None
}

fn indentation(line: &str) -> usize {
    let space = line.chars().take_while(|letter| matches!(letter, ' ' | '\t'));
    space.map(|letter| if letter == '\t' { TAB_WIDTH } else { 1 }).sum()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The text before its end, scanned one character at a time; all of it if no end is found.
    fn cut<'t>(kind: CompletionKind, prefix: &str, text: &'t str) -> &'t str {
        let mut scope = ScopeDetector::new(kind, prefix);
        let ends = text.char_indices().map(|(at, letter)| at + letter.len_utf8());
        let end = ends.clone().find_map(|to| scope.find_end(&text[..to]));
        let whole = ScopeDetector::new(kind, prefix).find_end(text);
        assert_eq!(end, whole, "independent of the pieces: {text:?}");
        &text[..end.unwrap_or(text.len())]
    }

    #[test]
    fn an_inline_completion_is_the_rest_of_the_line() {
        assert_eq!(cut(CompletionKind::Inline, "x = ", "1  # 하나\ny = 2"), "1  # 하나");
        assert_eq!(cut(CompletionKind::Inline, "x = ", "\ny"), "");
        assert_eq!(cut(CompletionKind::Inline, "x = ", "1\r\n"), "1");
        assert_eq!(cut(CompletionKind::Inline, "x = ", "1"), "1");
    }

    #[test]
    fn a_block_ends_where_its_indentation_does() {
        let python = "\n    a = 1\n\n    return a\n\nprint(2)\n";
        assert_eq!(
            cut(CompletionKind::Block, "def f():", python),
            "\n    a = 1\n\n    return a\n\n"
        );
        let inside = "a = 1\n    b = 2\nc = 3\n";
        assert_eq!(cut(CompletionKind::Block, "def f():\n    ", inside), "a = 1\n    b = 2\n");
        let deeper = "if a:\n        b()\n    c()\nd()";
        assert_eq!(cut(CompletionKind::Block, "    ", deeper), "if a:\n        b()\n");
        let or = "if a:\n    b()\nelse:\n    c()\nd()\n";
        assert_eq!(cut(CompletionKind::Block, "x()\n", or), "if a:\n    b()\nelse:\n    c()\n");
        assert_eq!(cut(CompletionKind::Block, "", "a = 1\nb = 2\n\nc = 3\n"), "a = 1\nb = 2\n");
    }

    #[test]
    fn a_block_in_braces_ends_with_its_brace() {
        let rust = "\n    a();\n}\n\nfn g() {\n";
        assert_eq!(cut(CompletionKind::Block, "fn f() {", rust), "\n    a();\n}");
        let branches = " {\n        a();\n    } else {\n        b();\n    }\n    c();\n";
        let whole = " {\n        a();\n    } else {\n        b();\n    }";
        assert_eq!(cut(CompletionKind::Block, "    if (x)", branches), whole);
        assert_eq!(
            cut(CompletionKind::Block, "foo(", "\n    a,\n    b,\n)\nbar()\n"),
            "\n    a,\n    b,\n)"
        );
    }

    #[test]
    fn a_function_ends_with_its_body() {
        let body = "x = 1\n    if x:\n        return 2\n    return 3\n\n\ndef g():\n    pass\n";
        let whole = "x = 1\n    if x:\n        return 2\n    return 3\n\n\n";
        assert_eq!(cut(CompletionKind::Function, "def f():\n    ", body), whole);
        let nested = "\n            b()\n        c()\n\n    def g(self):\n";
        let prefix = "class A:\n    def f(self):\n        if a:";
        assert_eq!(
            cut(CompletionKind::Function, prefix, nested),
            "\n            b()\n        c()\n\n"
        );
        let whole = "async function f() {\n  a();\n}";
        assert_eq!(cut(CompletionKind::Function, "", &format!("{whole}\n\nf();\n")), whole);
        let header = "# Adds.\ndef add(a, b):\n    return a + b\n\nprint(add(1, 2))\n";
        assert_eq!(
            cut(CompletionKind::Function, "\n", header),
            "# Adds.\ndef add(a, b):\n    return a + b\n\n"
        );
    }

    proptest! {
        #[test]
        fn the_end_does_not_depend_on_the_pieces_and_is_a_character_boundary(
            prefix in "([a-z한]{1,3}|def |fn |[ \t\n:{}()]|\n    ){0,14}",
            text in "([a-z한]{1,3}|def |else|end|[ \t\r\n:{}()]|\n    ){0,20}",
        ) {
            for kind in CompletionKind::ALL {
                let kept = cut(kind, &prefix, &text);
                prop_assert!(text.starts_with(kept));
            }
        }
    }
}
