//! Where code ends by itself, told from its lines and their indentation while it grows: an inline
//! completion at the end of its line, a block or a function where its indentation ends, with the
//! closing bracket where it has one.

use crate::completion::trim::Kind;

/// A tab is worth as many spaces.
const TAB: usize = 4;
/// Words that go on with a block that seemed to end.
const CONTINUES: [&str; 8] =
    ["else", "elif", "elseif", "elsif", "except", "finally", "catch", "rescue"];
/// Words by which lines that begin functions are known.
const FUNCTIONS: [&str; 8] = ["def", "fn", "func", "fun", "function", "sub", "proc", "method"];

pub(crate) fn last_line(text: &str) -> &str {
    text.rsplit('\n').next().unwrap_or_default()
}

/// What is known of a growing text.
#[derive(Clone, Debug)]
pub(crate) struct Scope {
    kind: Kind,
    /// The line of the prefix that the cursor is in.
    current: String,
    base: usize,
    /// A line has opened a body, which is deeper than `base`.
    opened: bool,
    /// Something was said.
    said: bool,
    /// Up to here the text has been looked at; always the begin of a line.
    at: usize,
    end: Option<usize>,
}

impl Scope {
    pub(crate) fn new(kind: Kind, prefix: &str) -> Scope {
        let current = last_line(prefix).to_owned();
        let (mut base, mut opened) = (indentation(&current), false);
        if kind == Kind::Function
            && let Some(header) = enclosing_function(prefix)
        {
            (base, opened) = (header, true);
        }
        Scope { kind, current, base, opened, said: false, at: 0, end: None }
    }

    /// Looks at what has come since the last time; `text` is all of it. Where it ends by itself, once
    /// that is certain.
    pub(crate) fn end(&mut self, text: &str) -> Option<usize> {
        if self.kind == Kind::Inline {
            self.end = self.end.or_else(|| text.find(['\n', '\r']));
        }
        while self.end.is_none() {
            let rest = text.get(self.at..)?;
            let Some(length) = rest.find('\n').map(|at| at + 1) else {
                if self.ends_before(rest) {
                    self.end = Some(self.at);
                }
                break;
            };
            self.end = self.take(&rest[..length]);
            self.at += length;
        }
        self.end
    }

    /// A whole line; where the text ends, if it does by this one.
    fn take(&mut self, line: &str) -> Option<usize> {
        if self.at == 0 {
            self.take_first(line);
            return None;
        }
        if line.trim().is_empty() {
            // Nothing encloses what stands at the margin: a blank line ends it.
            let loose = self.kind == Kind::Block && self.base == 0 && !self.opened && self.said;
            return loose.then_some(self.at);
        }
        self.said = true;
        let indentation = indentation(line);
        if self.opened && indentation <= self.base {
            return match Begin::of(line) {
                _ if indentation < self.base => Some(self.at),
                Begin::GoesOn => None,
                Begin::Closes => Some(self.at + line.trim_end().len()),
                Begin::Another => Some(self.at),
            };
        }
        if !self.opened && indentation < self.base {
            return Some(self.at);
        }
        if self.kind == Kind::Function && indentation == self.base && is_function(line) {
            self.opened = true;
        }
        None
    }

    fn take_first(&mut self, line: &str) {
        self.said = !line.trim().is_empty();
        let joined = format!("{}{line}", self.current);
        if self.opened || joined.trim().is_empty() {
            return;
        }
        self.base = indentation(&joined);
        self.opened = match self.kind {
            Kind::Function => {
                is_function(&joined) || opens(&joined) && !self.current.trim().is_empty()
            }
            _ => opens(&joined),
        };
    }

    /// Whether a begun line tells that the text ends before it.
    fn ends_before(&self, line: &str) -> bool {
        if self.at == 0 || line.trim().is_empty() {
            return false;
        }
        let indentation = indentation(line);
        if !self.opened || indentation < self.base {
            return indentation < self.base;
        }
        // A bracket or a word that goes on with the block is certain at the line's end.
        let begin = line.trim_start();
        let may_be = |word: &str| word.starts_with(begin) || begin.starts_with(word);
        let may_go_on = begin.starts_with(['}', ')', ']'])
            || may_be("end")
            || CONTINUES.iter().any(|word| may_be(word));
        indentation == self.base && !may_go_on
    }
}

/// How a line at the margin of a body begins.
enum Begin {
    /// `} else {`, `except ValueError:`, `) -> int:`.
    GoesOn,
    /// `}`, `});`, `end`.
    Closes,
    Another,
}

impl Begin {
    fn of(line: &str) -> Begin {
        let line = line.trim();
        if line.starts_with(['}', ')', ']']) {
            return if opens(line) { Begin::GoesOn } else { Begin::Closes };
        }
        match first_word(line) {
            word if CONTINUES.contains(&word) => Begin::GoesOn,
            "end" => Begin::Closes,
            _ => Begin::Another,
        }
    }
}

fn first_word(line: &str) -> &str {
    line.split(|letter: char| !letter.is_alphanumeric()).next().unwrap_or_default()
}

/// Whether a deeper body follows.
fn opens(line: &str) -> bool {
    let line = line.trim_end();
    line.ends_with([':', '{', '(', '[']) || line.ends_with(" do") || line.ends_with(" then")
}

fn is_function(line: &str) -> bool {
    line.split(|letter: char| !letter.is_alphanumeric()).any(|word| FUNCTIONS.contains(&word))
}

/// The indentation of the function that the cursor is in, if its first line is in the prefix.
fn enclosing_function(prefix: &str) -> Option<usize> {
    let mut lines = prefix.rsplit('\n');
    let current = lines.next().unwrap_or_default();
    if is_function(current) {
        return Some(indentation(current));
    }
    // An empty line tells nothing of its depth: it is where the line before it is, or deeper.
    let mut depth = if current.is_empty() { usize::MAX } else { indentation(current) };
    for line in lines.filter(|line| !line.trim().is_empty()) {
        let indentation = indentation(line);
        if indentation < depth {
            if is_function(line) && opens(line) {
                return Some(indentation);
            }
            depth = indentation;
        }
    }
    None
}

fn indentation(line: &str) -> usize {
    let space = line.chars().take_while(|letter| matches!(letter, ' ' | '\t'));
    space.map(|letter| if letter == '\t' { TAB } else { 1 }).sum()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What is before the end, told letter by letter; all of it where none was found.
    fn cut<'t>(kind: Kind, prefix: &str, text: &'t str) -> &'t str {
        let mut scope = Scope::new(kind, prefix);
        let ends = text.char_indices().map(|(at, letter)| at + letter.len_utf8());
        let end = ends.clone().find_map(|to| scope.end(&text[..to]));
        let whole = Scope::new(kind, prefix).end(text);
        assert_eq!(end, whole, "however it comes: {text:?}");
        &text[..end.unwrap_or(text.len())]
    }

    #[test]
    fn an_inline_completion_is_the_rest_of_the_line() {
        assert_eq!(cut(Kind::Inline, "x = ", "1  # 하나\ny = 2"), "1  # 하나");
        assert_eq!(cut(Kind::Inline, "x = ", "\ny"), "");
        assert_eq!(cut(Kind::Inline, "x = ", "1\r\n"), "1");
        assert_eq!(cut(Kind::Inline, "x = ", "1"), "1");
    }

    #[test]
    fn a_block_ends_where_its_indentation_does() {
        let python = "\n    a = 1\n\n    return a\n\nprint(2)\n";
        assert_eq!(cut(Kind::Block, "def f():", python), "\n    a = 1\n\n    return a\n\n");
        let inside = "a = 1\n    b = 2\nc = 3\n";
        assert_eq!(cut(Kind::Block, "def f():\n    ", inside), "a = 1\n    b = 2\n");
        let deeper = "if a:\n        b()\n    c()\nd()";
        assert_eq!(cut(Kind::Block, "    ", deeper), "if a:\n        b()\n");
        let or = "if a:\n    b()\nelse:\n    c()\nd()\n";
        assert_eq!(cut(Kind::Block, "x()\n", or), "if a:\n    b()\nelse:\n    c()\n");
        assert_eq!(cut(Kind::Block, "", "a = 1\nb = 2\n\nc = 3\n"), "a = 1\nb = 2\n");
    }

    #[test]
    fn a_block_in_braces_ends_with_its_brace() {
        let rust = "\n    a();\n}\n\nfn g() {\n";
        assert_eq!(cut(Kind::Block, "fn f() {", rust), "\n    a();\n}");
        let branches = " {\n        a();\n    } else {\n        b();\n    }\n    c();\n";
        let whole = " {\n        a();\n    } else {\n        b();\n    }";
        assert_eq!(cut(Kind::Block, "    if (x)", branches), whole);
        assert_eq!(cut(Kind::Block, "foo(", "\n    a,\n    b,\n)\nbar()\n"), "\n    a,\n    b,\n)");
    }

    #[test]
    fn a_function_ends_with_its_body() {
        let body = "x = 1\n    if x:\n        return 2\n    return 3\n\n\ndef g():\n    pass\n";
        let whole = "x = 1\n    if x:\n        return 2\n    return 3\n\n\n";
        assert_eq!(cut(Kind::Function, "def f():\n    ", body), whole);
        let nested = "\n            b()\n        c()\n\n    def g(self):\n";
        let prefix = "class A:\n    def f(self):\n        if a:";
        assert_eq!(cut(Kind::Function, prefix, nested), "\n            b()\n        c()\n\n");
        let whole = "async function f() {\n  a();\n}";
        assert_eq!(cut(Kind::Function, "", &format!("{whole}\n\nf();\n")), whole);
        let header = "# Adds.\ndef add(a, b):\n    return a + b\n\nprint(add(1, 2))\n";
        assert_eq!(
            cut(Kind::Function, "\n", header),
            "# Adds.\ndef add(a, b):\n    return a + b\n\n"
        );
    }

    proptest! {
        #[test]
        fn the_end_is_the_same_however_the_text_comes_and_stands_between_letters(
            prefix in "([a-z한]{1,3}|def |fn |[ \t\n:{}()]|\n    ){0,14}",
            text in "([a-z한]{1,3}|def |else|end|[ \t\r\n:{}()]|\n    ){0,20}",
        ) {
            for kind in Kind::ALL {
                let kept = cut(kind, &prefix, &text);
                prop_assert!(text.starts_with(kept));
            }
        }
    }
}
