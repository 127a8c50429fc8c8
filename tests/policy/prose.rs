//! Prose: no sentence in comments, `.proto` files or documentation has a denied word or more than 30 words.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::LazyLock;

use hapa_policy::{files, read, rust, sources};
use regex::Regex;

/// Words of a sentence. docs/style.md asks for at most 25.
const MAX_SENTENCE_WORDS: usize = 30;

/// Protos of others, which are not checked.
const FOREIGN_PROTOS: &str = "proto/google";

/// A line of prose with its number.
type Line = (usize, String);

fn is_covered(path: &Path) -> bool {
    !path.starts_with(FOREIGN_PROTOS)
}

/// The first column of the table "Words not used" in docs/style.md.
fn denied() -> Vec<(String, Regex)> {
    let page = read("docs/style.md");
    let table = page.split("## Words not used").nth(1).unwrap();
    let rows = table.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next());
    rows.map(|words| {
        let pattern = regex::escape(words).replace(' ', r"\s+");
        (words.to_owned(), Regex::new(&format!(r"(?i)\b{pattern}\b")).unwrap())
    })
    .collect()
}

/// The comments of a Rust source, as Markdown: one line for each comment line, and an empty line between two blocks.
fn rust_prose(source: &str) -> Vec<Line> {
    let mut lines: Vec<Line> = Vec::new();
    let mut previous = (0, "");
    for comment in rust::comments(source) {
        let continues = comment.is_alone && previous == (comment.line - 1, comment.marker);
        if !continues {
            lines.push((comment.line, String::new()));
        }
        lines.push((comment.line, comment.text.trim().to_owned()));
        previous = if comment.is_alone { (comment.line, comment.marker) } else { (0, "") };
    }
    lines
}

fn proto_prose(source: &str) -> Vec<Line> {
    let numbered = (1..).zip(source.lines());
    let comment = |line: &str| line.split_once("//").map_or("", |(_, text)| text.trim()).to_owned();
    numbered.map(|(number, line)| (number, comment(line))).collect()
}

fn markdown_prose(source: &str) -> Vec<Line> {
    (1..).zip(source.lines().map(str::to_owned)).collect()
}

/// The paragraphs of Markdown without code blocks: list items, headings and cells of tables stand alone.
fn paragraphs(lines: &[Line]) -> Vec<Line> {
    static ITEM: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"^(?:[*+-]|\d+\.|#+|>)\s+").unwrap());
    let mut found: Vec<Line> = Vec::new();
    let (mut is_code, mut continues) = (false, false);
    for (number, line) in lines {
        let text = line.trim();
        if text.starts_with("```") || text.starts_with("~~~") {
            is_code = !is_code;
            continues = false;
        } else if is_code || text.is_empty() {
            continues = false;
        } else if text.starts_with('|') {
            found.extend(text.split('|').map(|cell| (*number, cell.trim().to_owned())));
            continues = false;
        } else {
            let item = ITEM.find(text).map(|item| item.end());
            let is_heading = text.starts_with('#');
            match found.last_mut().filter(|_| continues && item.is_none()) {
                Some((_, paragraph)) => {
                    paragraph.push(' ');
                    paragraph.push_str(text);
                }
                None => found.push((*number, text[item.unwrap_or(0)..].to_owned())),
            }
            continues = !is_heading;
        }
    }
    found
}

/// The sentences of a paragraph. A code span is the word CODE, a link its text.
fn sentences(paragraph: &str) -> Vec<String> {
    static CODE: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"``.+?``|`[^`]*`").unwrap());
    static LINK: LazyLock<Regex> = LazyLock::new(|| {
        Regex::new(r"\[([^\]]*)\]\([^)]*\)|<https?://[^>]*>|https?://\S+").unwrap()
    });
    static END: LazyLock<Regex> = LazyLock::new(|| Regex::new(r#"[.!?]["')\]]*\s+"#).unwrap());
    let text = CODE.replace_all(paragraph, "CODE");
    let text = LINK.replace_all(&text, "$1");
    let mut found = Vec::new();
    let mut start = 0;
    for end in END.find_iter(&text) {
        let next = text[end.end()..].chars().next();
        let is_abbreviation =
            ["e.g", "i.e", "vs", "etc"].iter().any(|word| text[..end.start()].ends_with(word));
        if !is_abbreviation && next.is_some_and(|next| !next.is_lowercase()) {
            found.push(text[start..end.end()].trim().to_owned());
            start = end.end();
        }
    }
    found.push(text[start..].trim().to_owned());
    found.retain(|sentence| !sentence.is_empty());
    found
}

fn word_count(sentence: &str) -> usize {
    sentence.split_whitespace().filter(|word| word.contains(char::is_alphanumeric)).count()
}

/// The violations of a sentence.
fn wrong(sentence: &str, denied: &[(String, Regex)]) -> Vec<String> {
    static ALLOWED: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"(?i)\b(?:single|in)[ -]flight\b").unwrap());
    let mut found = Vec::new();
    let count = word_count(sentence);
    if count > MAX_SENTENCE_WORDS {
        found.push(format!("{count} words in a sentence, of at most {MAX_SENTENCE_WORDS}"));
    }
    let text = ALLOWED.replace_all(sentence, "");
    let used = denied.iter().filter(|(_, pattern)| pattern.is_match(&text));
    found.extend(used.map(|(word, _)| format!("\"{word}\" is a word that docs/style.md denies")));
    found
}

/// The crate or the folder that a violation is counted for.
fn area(path: &Path) -> String {
    let parts: Vec<_> = path.iter().map(|part| part.to_str().unwrap()).collect();
    let depth = match parts[..] {
        ["services", "chassis", ..] => 3,
        ["services" | "tests", ..] => 2,
        _ => 1,
    };
    parts[..depth.min(parts.len())].join("/")
}

#[test]
fn every_sentence_is_short_and_uses_no_denied_word() {
    let denied = denied();
    assert!(denied.len() > 30, "docs/style.md has a table of words");
    let mut texts = Vec::new();
    for folder in ["proto", "services", "tests"] {
        let rust = sources(folder).into_iter();
        texts.extend(rust.map(|(path, text)| (path, rust_prose(&text))));
    }
    let protos = files("proto", &["proto"]).into_iter();
    texts.extend(protos.map(|(path, text)| (path, proto_prose(&text))));
    let pages = files(".", &["md"]).into_iter();
    texts.extend(pages.map(|(path, text)| (path, markdown_prose(&text))));
    let mut found = Vec::new();
    let mut counts = BTreeMap::<String, usize>::new();
    for (path, lines) in texts.iter().filter(|(path, _)| is_covered(path)) {
        for (line, paragraph) in paragraphs(lines) {
            for sentence in sentences(&paragraph) {
                for reason in wrong(&sentence, &denied) {
                    let begin: String = sentence.chars().take(70).collect();
                    found.push(format!("{}:{line}: {reason}: {begin}", path.display()));
                    *counts.entry(area(path)).or_default() += 1;
                }
            }
        }
    }
    assert!(found.is_empty(), "{counts:#?}\n{}\n{} in all", found.join("\n"), found.len());
}

#[test]
fn prose_is_read_without_code_links_and_tables() {
    let source = "/// Opens `who`.\n/// Twice.\n\n/// * one\nlet x = \"// who\"; // trailing\n";
    let lines = rust_prose(source);
    let found: Vec<_> = paragraphs(&lines).iter().flat_map(|(_, text)| sentences(text)).collect();
    assert_eq!(found, ["Opens CODE.", "Twice.", "one", "trailing"]);
    let page = "# Title\nText with [a link](who.md).\n```\nwho\n```\n| a | `who` |\n";
    let lines = markdown_prose(page);
    let found: Vec<_> = paragraphs(&lines).iter().flat_map(|(_, text)| sentences(text)).collect();
    assert_eq!(found, ["Title", "Text with a link.", "a", "CODE"]);
}

#[test]
fn denied_words_and_long_sentences_are_found() {
    let denied = denied();
    assert_eq!(wrong("The caller who asks.", &denied).len(), 1);
    assert_eq!(wrong("It hears  the bell.", &denied).len(), 2);
    assert_eq!(wrong("Single flight, calls in flight, whole answers.", &denied).len(), 0);
    assert_eq!(wrong(&"word ".repeat(MAX_SENTENCE_WORDS), &denied).len(), 0);
    assert_eq!(wrong(&"word ".repeat(MAX_SENTENCE_WORDS + 1), &denied).len(), 1);
}
