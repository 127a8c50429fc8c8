//! Decides whether a text is a program, by its syntax tree. Short prose parses in many languages: a word is an
//! expression, `Note: this` is a label or an annotation. Therefore a program has at least one statement that
//! prose does not form by chance.

use std::time::Duration;

use tree_sitter::Node;

use crate::validate::deadline::Deadline;
use crate::validate::grammar::Language;
use crate::validate::symbols::node_text;
use crate::validate::{syntax, tree};

/// Beginnings and endings of the kinds of nodes that make a program.
const DECLARATION_BEGINNINGS: [&str; 3] = ["preproc_", "import_", "using_"];
const DECLARATION_ENDINGS: [&str; 5] =
    ["_definition", "_declaration", "_directive", "_specifier", "_item"];
/// Statements with a body.
const COMPOUND_STATEMENTS: [&str; 14] = [
    "if_statement",
    "for_statement",
    "for_in_statement",
    "for_range_loop",
    "enhanced_for_statement",
    "foreach_statement",
    "while_statement",
    "do_statement",
    "switch_statement",
    "switch_expression",
    "match_statement",
    "try_statement",
    "with_statement",
    "export_statement",
];
const CALLS: [&str; 3] = ["call", "call_expression", "invocation_expression"];
const ASSIGNMENTS: [&str; 3] = ["assignment", "assignment_expression", "augmented_assignment"];
/// Other expressions that prose does not form.
const EXPRESSIONS: [&str; 12] = [
    "method_invocation",
    "object_creation_expression",
    "new_expression",
    "update_expression",
    "augmented_assignment_expression",
    "postfix_unary_expression",
    "await",
    "await_expression",
    "jsx_element",
    "jsx_self_closing_element",
    "arrow_function",
    "named_expression",
];
/// Declarations of variables, which need a value: `let me` is prose.
const VARIABLE_DECLARATIONS: [&str; 6] = [
    "lexical_declaration",
    "variable_declaration",
    "local_variable_declaration",
    "local_declaration_statement",
    "field_declaration",
    "declaration",
];

/// Whether the text parses without errors and has a statement that prose does not form. `false` also if
/// parsing exceeds the timeout.
pub(crate) fn is_program(text: &str, language: Language, timeout: Duration) -> bool {
    let deadline = Deadline::new(timeout);
    let Some(tree) = tree::parse(text, language, &deadline) else { return false };
    if tree.root_node().has_error() {
        return false;
    }
    let (mut findings, mut is_found) = (Vec::new(), false);
    let is_walked = tree::walk(tree.root_node(), language.grammar(), &deadline, &mut |node, _| {
        syntax::check(node, language, text, &mut findings);
        is_found = is_found || is_top_level(node) && is_statement(node, text);
    });
    is_walked.is_some() && is_found && findings.is_empty()
}

fn is_top_level(node: Node<'_>) -> bool {
    let parent = node.parent();
    node.is_named() && parent.is_some_and(|parent| parent.parent().is_none())
}

/// Whether a statement is one that prose does not form.
fn is_statement(node: Node<'_>, text: &str) -> bool {
    let kind = node.kind();
    if VARIABLE_DECLARATIONS.contains(&kind) {
        return has_value(node);
    }
    // A Markdown heading parses as an unknown directive of the C preprocessor.
    if kind == "preproc_call" {
        return false;
    }
    let is_declaration = DECLARATION_BEGINNINGS.iter().any(|begin| kind.starts_with(begin))
        || DECLARATION_ENDINGS.iter().any(|end| kind.ends_with(end));
    if is_declaration || COMPOUND_STATEMENTS.contains(&kind) {
        return true;
    }
    match kind {
        // C# wraps statements, and Java calls.
        "global_statement" => node.named_child(0).is_some_and(|inner| is_statement(inner, text)),
        "expression_statement" => {
            node.named_child(0).is_some_and(|inner| is_code_expression(inner, text))
        }
        _ => false,
    }
}

fn is_code_expression(node: Node<'_>, text: &str) -> bool {
    let kind = node.kind();
    if ASSIGNMENTS.contains(&kind) {
        // `Answer: yes` is an annotation without a value.
        return node.child_by_field_name("right").is_some();
    }
    if CALLS.contains(&kind) {
        // Prose has a space before a bracket, or another script.
        let callee = node.child_by_field_name("function");
        let arguments = node.child_by_field_name("arguments");
        return callee.zip(arguments).is_some_and(|(callee, arguments)| {
            node_text(callee, text).is_ascii() && callee.end_byte() == arguments.start_byte()
        });
    }
    EXPRESSIONS.contains(&kind)
}

/// Whether a declaration assigns a value, or declares a function.
fn has_value(node: Node<'_>) -> bool {
    let mut cursor = node.walk();
    let mut children: Vec<_> = node.named_children(&mut cursor).collect();
    // C# nests the declarators by one level.
    let nested: Vec<_> = children
        .iter()
        .flat_map(|child| {
            let mut cursor = child.walk();
            child.named_children(&mut cursor).collect::<Vec<_>>()
        })
        .collect();
    children.extend(nested);
    children.iter().any(|child| match child.kind() {
        "init_declarator" | "function_declarator" | "primitive_type" | "template_type" => true,
        "variable_declarator" => child.named_child_count() > 1,
        kind => kind.ends_with("_specifier"),
    })
}
