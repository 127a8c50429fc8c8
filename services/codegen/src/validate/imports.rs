//! Binds the names of imports and parameters, in the languages where grammar.rs cannot describe
//! them.

use tree_sitter::Node;

use crate::validate::grammar::Language;
use crate::validate::symbols::{SymbolTable, node_text, string_literal};

pub(super) fn record(
    symbols: &mut SymbolTable,
    node: Node<'_>,
    scope: usize,
    language: Language,
    code: &str,
) {
    match (language.family(), node.kind()) {
        (Language::Python, "import_statement") => bind_python_import(symbols, node, scope, code),
        (Language::Python, "import_from_statement") => {
            bind_python_from_import(symbols, node, scope, code);
        }
        (Language::Python, "parameters" | "lambda_parameters") => {
            bind_parameters(symbols, node, scope, code);
        }
        (Language::JavaScript, "import_statement") => {
            bind_script_import(symbols, node, scope, code);
        }
        (Language::JavaScript, "formal_parameters") => bind_parameters(symbols, node, scope, code),
        _ => {}
    }
}

/// The name of a module without the prefix `node:`.
pub(super) fn plain_module_name(name: &str) -> &str {
    name.strip_prefix("node:").unwrap_or(name)
}

/// `import os`, `import os.path`, `import os as o`
fn bind_python_import(symbols: &mut SymbolTable, node: Node<'_>, scope: usize, code: &str) {
    let mut cursor = node.walk();
    for child in node.children_by_field_name("name", &mut cursor) {
        if let Some((name, alias)) = alias_pair(child) {
            symbols.bind(scope, node_text(alias, code), Some(node_text(name, code).to_owned()));
        } else {
            // `import os.path` binds `os` to the module itself, until another binding of the name.
            let first = node_text(child, code).split('.').next().unwrap_or_default();
            symbols.bind_module(scope, first);
        }
    }
}

/// `from os import system as s`
fn bind_python_from_import(symbols: &mut SymbolTable, node: Node<'_>, scope: usize, code: &str) {
    let Some(module) = node.child_by_field_name("module_name") else { return };
    let module = node_text(module, code);
    let mut cursor = node.walk();
    for child in node.children_by_field_name("name", &mut cursor) {
        let (name, alias) = alias_pair(child).unwrap_or((child, child));
        symbols.bind(
            scope,
            node_text(alias, code),
            Some(format!("{module}.{}", node_text(name, code))),
        );
    }
    let mut cursor = node.walk();
    if node.named_children(&mut cursor).any(|part| part.kind() == "wildcard_import") {
        symbols.bind_wildcard(module);
    }
}

fn alias_pair(node: Node<'_>) -> Option<(Node<'_>, Node<'_>)> {
    let is_aliased = matches!(node.kind(), "aliased_import" | "import_specifier");
    let alias = node.child_by_field_name("alias").filter(|_| is_aliased);
    node.child_by_field_name("name").zip(alias)
}

/// Binds parameters, which hide names of the enclosing scopes.
fn bind_parameters(symbols: &mut SymbolTable, node: Node<'_>, scope: usize, code: &str) {
    let mut cursor = node.walk();
    for child in node.named_children(&mut cursor) {
        let fields = ["name", "pattern"];
        let name =
            fields.iter().find_map(|field| child.child_by_field_name(field)).unwrap_or(child);
        let name = if name.kind() == "identifier" { Some(name) } else { name.named_child(0) };
        if let Some(name) = name.filter(|name| name.kind() == "identifier") {
            symbols.bind(scope, node_text(name, code), None);
        }
    }
}

/// `import cp, { exec as run } from 'child_process'`, `import * as cp from …`
fn bind_script_import(symbols: &mut SymbolTable, node: Node<'_>, scope: usize, code: &str) {
    let source = node.child_by_field_name("source").and_then(|source| string_literal(source, code));
    let Some(source) = source.map(plain_module_name) else { return };
    let mut cursor = node.walk();
    let Some(clause) =
        node.named_children(&mut cursor).find(|child| child.kind() == "import_clause")
    else {
        return;
    };
    let mut cursor = clause.walk();
    for part in clause.named_children(&mut cursor) {
        match part.kind() {
            "identifier" => symbols.bind(scope, node_text(part, code), Some(source.to_owned())),
            "namespace_import" => {
                if let Some(name) = part.named_child(0) {
                    symbols.bind(scope, node_text(name, code), Some(source.to_owned()));
                }
            }
            _ => {
                let mut cursor = part.walk();
                for child in part.named_children(&mut cursor) {
                    let pair = alias_pair(child).or_else(|| {
                        let name = child.child_by_field_name("name")?;
                        Some((name, name))
                    });
                    let Some((name, alias)) = pair else { continue };
                    let path = format!("{source}.{}", node_text(name, code));
                    symbols.bind(scope, node_text(alias, code), Some(path));
                }
            }
        }
    }
}
