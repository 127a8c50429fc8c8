//! Syntax errors: where the parser had to skip or to make up something, and the few things that its
//! grammar of Python lets through although Python does not.

use tree_sitter::Node;

use crate::validate::grammar::Language;
use crate::validate::names::text;
use crate::validate::{Finding, SYNTAX_ERROR, Severity};

/// Of what is quoted, in characters.
const LONGEST_QUOTE: usize = 40;

pub(super) fn check(node: Node<'_>, language: Language, code: &str, findings: &mut Vec<Finding>) {
    let error = |words: String, suggestion| {
        Finding::at(node, Severity::Error, SYNTAX_ERROR).says(words, suggestion)
    };
    if node.is_missing() {
        findings.push(error(format!("`{}` is missing", node.kind()), "Add it."));
    } else if node.is_error() {
        // One in another says the same again.
        let inside = findings.last().is_some_and(|last| {
            last.line == node.start_position().row && last.issue == SYNTAX_ERROR
        });
        if !inside {
            let words = match quote(node, code) {
                Some(quote) => format!("syntax error at `{quote}`"),
                None => "syntax error".to_owned(),
            };
            findings.push(error(words, "Check this line and the one before it."));
        }
    } else if language == Language::Python {
        findings.extend(python(node, code).map(|words| error(words.to_owned(), "")));
        let words = "the indentation does not fit the lines around";
        let misplaced = misplaced(node, code);
        findings.extend(misplaced.map(|node| {
            let finding = Finding::at(node, Severity::Error, SYNTAX_ERROR);
            finding.says(words, "Indent statements of one block alike.")
        }));
    }
}

fn quote(node: Node<'_>, code: &str) -> Option<String> {
    let line = text(node, code).lines().find(|line| !line.trim().is_empty())?.trim();
    let plain =
        |letter: char| if letter.is_control() || letter == '`' { '\u{fffd}' } else { letter };
    Some(line.chars().map(plain).take(LONGEST_QUOTE).collect())
}

fn python(node: Node<'_>, code: &str) -> Option<&'static str> {
    match node.kind() {
        "print_statement" | "exec_statement" => {
            Some("this is Python 2: the call needs parentheses")
        }
        "integer" if text(node, code).ends_with(['l', 'L']) => {
            Some("this is Python 2: integers have no L")
        }
        "block" if node.named_child_count() == 0 => Some("an indented block is missing"),
        _ => None,
    }
}

/// The grammar of Python lets statements of one block stand at different depths, and an `else` beside
/// its `if`.
fn misplaced<'t>(node: Node<'t>, code: &str) -> Option<Node<'t>> {
    let is_clause = |one: &Node<'_>| one.kind().ends_with("_clause");
    let mut cursor = node.walk();
    let mut parts = node.named_children(&mut cursor).filter(|one| begins_line(*one, code));
    match node.kind() {
        "module" | "block" => {
            let mut parts = parts.filter(|one| one.kind() != "comment").peekable();
            let first = parts.peek()?.start_position().column;
            let column = if node.kind() == "module" { 0 } else { first };
            parts.find(|one| one.start_position().column != column)
        }
        "if_statement" | "for_statement" | "while_statement" | "try_statement" => {
            parts.find(|one| {
                is_clause(one) && one.start_position().column != node.start_position().column
            })
        }
        _ => None,
    }
}

/// Nothing but white space stands before it.
fn begins_line(node: Node<'_>, code: &str) -> bool {
    let (at, column) = (node.start_byte(), node.start_position().column);
    let before = code.as_bytes().get(at.saturating_sub(column)..at);
    before.is_some_and(|before| before.iter().all(u8::is_ascii_whitespace))
}
