//! Rust sources as policy tests read them: code without texts, comments with their lines, modules without tests.

use std::path::Path;
use std::sync::LazyLock;

use regex::Regex;

/// Comments, raw strings, strings and characters, in this order of precedence.
static TOKENS: LazyLock<Regex> = LazyLock::new(|| {
    let raw = (0..4).map(|count| {
        let hashes = "#".repeat(count);
        format!(r#"\bb?r{hashes}"(?s:.*?)"{hashes}"#)
    });
    let raw = raw.collect::<Vec<_>>().join("|");
    let string = r#"\bb"(?:\\(?s:.)|[^"\\])*"|"(?:\\(?s:.)|[^"\\])*""#;
    let character = r"b?'(?:\\u\{[0-9a-fA-F]+\}|\\x[0-9a-fA-F]{2}|\\.|[^'\\\n])'";
    Regex::new(&format!(r"(?P<comment>//[^\n]*)|(?P<text>{raw}|{string}|{character})")).unwrap()
});

/// A comment line: its number, its marker (`//`, `///` or `//!`), and its text.
#[derive(Debug)]
pub struct Comment {
    /// The line number, from 1.
    pub line: usize,
    /// `//`, `///` or `//!`.
    pub marker: &'static str,
    /// The text after the marker.
    pub text: String,
    /// Whether nothing stands before it on its line.
    pub is_alone: bool,
}

/// The comments of a source.
pub fn comments(source: &str) -> Vec<Comment> {
    let found = TOKENS.captures_iter(source).filter_map(|found| found.name("comment"));
    let mut lines = LineNumbers::new(source);
    found
        .map(|found| {
            let text = found.as_str();
            let marker = ["//!", "///"].into_iter().find(|marker| text.starts_with(marker));
            let marker = marker.unwrap_or("//");
            let start = source[..found.start()].rfind('\n').map_or(0, |at| at + 1);
            Comment {
                line: lines.at(found.start()),
                marker,
                text: text[marker.len()..].to_owned(),
                is_alone: source[start..found.start()].trim().is_empty(),
            }
        })
        .collect()
}

/// A source with the same lines, without comments, and with every text replaced by `""`.
pub fn code(source: &str) -> String {
    let replaced = TOKENS.replace_all(source, |found: &regex::Captures<'_>| {
        let lines = found[0].matches('\n').count();
        let text = if found.name("comment").is_some() { "" } else { "\"\"" };
        format!("{text}{}", "\n".repeat(lines))
    });
    replaced.into_owned()
}

/// Code (see [`code`]) without its `#[cfg(test)]` items. They become empty lines.
pub fn without_tests(code: &str) -> String {
    let mut kept = String::with_capacity(code.len());
    let mut lines = code.lines();
    while let Some(line) = lines.next() {
        if line.trim() != "#[cfg(test)]" {
            kept += line;
            kept.push('\n');
            continue;
        }
        let indent = line.len() - line.trim_start().len();
        kept.push('\n');
        for line in lines.by_ref() {
            kept.push('\n');
            let is_at_item = line.len() - line.trim_start().len() == indent;
            let is_end = line.trim_end().ends_with([';', '}']) || line.trim() == "}";
            if is_at_item && is_end {
                break;
            }
        }
    }
    kept
}

/// Whether a file contains only tests.
pub fn is_test(path: &Path) -> bool {
    path.starts_with("tests")
        || path.ends_with("tests.rs")
        || path.components().any(|part| part.as_os_str() == "tests")
}

/// Line numbers of ascending positions.
struct LineNumbers<'a> {
    source: &'a str,
    position: usize,
    line: usize,
}

impl<'a> LineNumbers<'a> {
    fn new(source: &'a str) -> LineNumbers<'a> {
        LineNumbers { source, position: 0, line: 1 }
    }

    fn at(&mut self, position: usize) -> usize {
        self.line += self.source[self.position..position].matches('\n').count();
        self.position = position;
        self.line
    }
}
