//! Style checks, which a request may enable.

use tree_sitter::Node;

use crate::validate::grammar::Language;
use crate::validate::symbols::node_text;
use crate::validate::{Finding, Severity};

const MAX_LINE_LEN: usize = 120;

pub(super) fn check(node: Node<'_>, language: Language, code: &str) -> Option<Finding> {
    if language != Language::Python {
        return None;
    }
    let (message, suggestion) = match node.kind() {
        "except_clause" if node.child_by_field_name("value").is_none() => {
            ("this catches all exceptions, also those that should end the program", "Name them.")
        }
        "wildcard_import" => ("this imports all names of a module", "List the imported names."),
        "default_parameter" | "typed_default_parameter" if is_mutable(node) => {
            ("all calls share this default value", "Use None and create the value in the function.")
        }
        "comparison_operator" if compares_with_none(node, code) => {
            ("this compares with None by value", "Use `is None` or `is not None`.")
        }
        _ => return None,
    };
    Some(Finding::at(node, Severity::Info, "style").with_message(message, suggestion))
}

/// Findings for lines that are too long.
pub(super) fn check_lines(code: &str) -> impl Iterator<Item = Finding> {
    let long =
        code.lines().enumerate().filter(|(_, text)| text.chars().nth(MAX_LINE_LEN).is_some());
    long.map(|(line, text)| Finding {
        line,
        column: text.char_indices().nth(MAX_LINE_LEN).map_or(0, |(at, _)| at),
        severity: Severity::Info,
        issue: "style",
        message: format!("the line is longer than {MAX_LINE_LEN} characters"),
        suggestion: "Break it.",
    })
}

fn is_mutable(node: Node<'_>) -> bool {
    let value = node.child_by_field_name("value");
    value.is_some_and(|value| matches!(value.kind(), "list" | "dictionary" | "set"))
}

fn compares_with_none(node: Node<'_>, code: &str) -> bool {
    let mut cursor = node.walk();
    let parts: Vec<_> = node.children(&mut cursor).take(4).collect();
    parts
        .windows(2)
        .any(|pair| matches!(node_text(pair[0], code), "==" | "!=") && pair[1].kind() == "none")
}
