//! What is a matter of style, for those who ask.

use tree_sitter::Node;

use crate::validate::grammar::Language;
use crate::validate::names::text;
use crate::validate::{Finding, Severity};

const LONGEST_LINE: usize = 120;

pub(super) fn check(node: Node<'_>, language: Language, code: &str) -> Option<Finding> {
    if language != Language::Python {
        return None;
    }
    let (words, suggestion) = match node.kind() {
        "except_clause" if node.child_by_field_name("value").is_none() => {
            ("this catches everything, also what should end the program", "Name the exceptions.")
        }
        "wildcard_import" => ("nobody can tell which names this imports", "Name what is imported."),
        "default_parameter" | "typed_default_parameter" if is_mutable(node) => (
            "this default value is shared by all calls",
            "Use None and make the value in the function.",
        ),
        "comparison_operator" if compares_none(node, code) => {
            ("None is compared by its value", "Use `is None` or `is not None`.")
        }
        _ => return None,
    };
    Some(Finding::at(node, Severity::Info, "style").says(words, suggestion))
}

/// Lines that are too long.
pub(super) fn lines(code: &str) -> impl Iterator<Item = Finding> {
    let long =
        code.lines().enumerate().filter(|(_, text)| text.chars().nth(LONGEST_LINE).is_some());
    long.map(|(line, text)| Finding {
        line,
        column: text.char_indices().nth(LONGEST_LINE).map_or(0, |(at, _)| at),
        severity: Severity::Info,
        issue: "style",
        message: format!("the line is longer than {LONGEST_LINE} characters"),
        suggestion: "Break it.",
    })
}

fn is_mutable(node: Node<'_>) -> bool {
    let value = node.child_by_field_name("value");
    value.is_some_and(|value| matches!(value.kind(), "list" | "dictionary" | "set"))
}

fn compares_none(node: Node<'_>, code: &str) -> bool {
    let mut cursor = node.walk();
    let parts: Vec<_> = node.children(&mut cursor).take(4).collect();
    parts
        .windows(2)
        .any(|pair| matches!(text(pair[0], code), "==" | "!=") && pair[1].kind() == "none")
}
