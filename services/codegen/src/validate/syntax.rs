//! Syntax errors: places where the parser skipped or inserted a token, and invalid Python that the
//! grammar accepts.

use tree_sitter::Node;

use crate::validate::grammar::Language;
use crate::validate::symbols::node_text;
use crate::validate::{Finding, SYNTAX_ERROR, Severity};

/// Most quoted characters.
const MAX_QUOTE_LEN: usize = 40;

pub(super) fn check(node: Node<'_>, language: Language, code: &str, findings: &mut Vec<Finding>) {
    let error = |message: String, suggestion| {
        Finding::at(node, Severity::Error, SYNTAX_ERROR).with_message(message, suggestion)
    };
    if node.is_missing() {
        findings.push(error(format!("`{}` is missing", node.kind()), "Add it."));
    } else if node.is_error() {
        // An error node on the line of another one would repeat the finding.
        let is_repeated = findings.last().is_some_and(|last| {
            last.line == node.start_position().row && last.issue == SYNTAX_ERROR
        });
        if !is_repeated {
            let message = match quote(node, code) {
                Some(quote) => format!("syntax error at `{quote}`"),
                None => "syntax error".to_owned(),
            };
            findings.push(error(message, "Check this line and the one before it."));
        }
    } else if language == Language::Python {
        findings.extend(python_error(node, code).map(|message| error(message.to_owned(), "")));
        let message = "the indentation does not match the surrounding lines";
        let misindented = misindented(node, code);
        findings.extend(misindented.map(|node| {
            let finding = Finding::at(node, Severity::Error, SYNTAX_ERROR);
            finding.with_message(message, "Indent all statements of one block alike.")
        }));
    }
}

fn quote(node: Node<'_>, code: &str) -> Option<String> {
    let line = node_text(node, code).lines().find(|line| !line.trim().is_empty())?.trim();
    let escape = |character: char| {
        if character.is_control() || character == '`' { '\u{fffd}' } else { character }
    };
    Some(line.chars().map(escape).take(MAX_QUOTE_LEN).collect())
}

fn python_error(node: Node<'_>, code: &str) -> Option<&'static str> {
    match node.kind() {
        "print_statement" | "exec_statement" => {
            Some("this is Python 2: the call needs parentheses")
        }
        "integer" if node_text(node, code).ends_with(['l', 'L']) => {
            Some("this is Python 2: integers have no L")
        }
        "block" if node.named_child_count() == 0 => Some("an indented block is missing"),
        _ => None,
    }
}

/// The first misindented child. The Python grammar accepts statements of one block at different
/// columns, and an `else` at another column than its `if`.
fn misindented<'t>(node: Node<'t>, code: &str) -> Option<Node<'t>> {
    let is_clause = |child: &Node<'_>| child.kind().ends_with("_clause");
    let mut cursor = node.walk();
    let mut parts = node.named_children(&mut cursor).filter(|child| is_first_on_line(*child, code));
    match node.kind() {
        "module" | "block" => {
            let mut parts = parts.filter(|child| child.kind() != "comment").peekable();
            let first = parts.peek()?.start_position().column;
            let column = if node.kind() == "module" { 0 } else { first };
            parts.find(|child| child.start_position().column != column)
        }
        "if_statement" | "for_statement" | "while_statement" | "try_statement" => {
            parts.find(|child| {
                is_clause(child) && child.start_position().column != node.start_position().column
            })
        }
        _ => None,
    }
}

/// Whether only white space precedes the node on its line.
fn is_first_on_line(node: Node<'_>, code: &str) -> bool {
    let (at, column) = (node.start_byte(), node.start_position().column);
    let before = code.as_bytes().get(at.saturating_sub(column)..at);
    before.is_some_and(|before| before.iter().all(u8::is_ascii_whitespace))
}
