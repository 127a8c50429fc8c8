//! What imports and parameters do to names, in the languages where that is more than a binding.

use tree_sitter::Node;

use crate::validate::grammar::Language;
use crate::validate::names::{Names, string, text};

pub(super) fn read(
    names: &mut Names,
    node: Node<'_>,
    scope: usize,
    language: Language,
    code: &str,
) {
    match (language.family(), node.kind()) {
        (Language::Python, "import_statement") => python_import(names, node, scope, code),
        (Language::Python, "import_from_statement") => python_from(names, node, scope, code),
        (Language::Python, "parameters" | "lambda_parameters") => {
            parameters(names, node, scope, code);
        }
        (Language::JavaScript, "import_statement") => script_import(names, node, scope, code),
        (Language::JavaScript, "formal_parameters") => parameters(names, node, scope, code),
        _ => {}
    }
}

/// A module by its plain name.
pub(super) fn module(name: &str) -> &str {
    name.strip_prefix("node:").unwrap_or(name)
}

/// `import os`, `import os.path`, `import os as o`
fn python_import(names: &mut Names, node: Node<'_>, scope: usize, code: &str) {
    let mut cursor = node.walk();
    for one in node.children_by_field_name("name", &mut cursor) {
        if let Some((name, alias)) = aliased(one) {
            names.bind(scope, text(alias, code), Some(text(name, code).to_owned()));
        } else {
            // `import os.path` gives `os`, which stands for itself: as long as nothing else does.
            let first = text(one, code).split('.').next().unwrap_or_default();
            names.bind_module(scope, first);
        }
    }
}

/// `from os import system as s`
fn python_from(names: &mut Names, node: Node<'_>, scope: usize, code: &str) {
    let Some(module) = node.child_by_field_name("module_name") else { return };
    let module = text(module, code);
    let mut cursor = node.walk();
    for one in node.children_by_field_name("name", &mut cursor) {
        let (name, alias) = aliased(one).unwrap_or((one, one));
        names.bind(scope, text(alias, code), Some(format!("{module}.{}", text(name, code))));
    }
    let mut cursor = node.walk();
    if node.named_children(&mut cursor).any(|part| part.kind() == "wildcard_import") {
        names.import_all(module);
    }
}

fn aliased(node: Node<'_>) -> Option<(Node<'_>, Node<'_>)> {
    let is_aliased = matches!(node.kind(), "aliased_import" | "import_specifier");
    let alias = node.child_by_field_name("alias").filter(|_| is_aliased);
    node.child_by_field_name("name").zip(alias)
}

/// They hide what is around the function.
fn parameters(names: &mut Names, node: Node<'_>, scope: usize, code: &str) {
    let mut cursor = node.walk();
    for one in node.named_children(&mut cursor) {
        let fields = ["name", "pattern"];
        let name = fields.iter().find_map(|field| one.child_by_field_name(field)).unwrap_or(one);
        let name = if name.kind() == "identifier" { Some(name) } else { name.named_child(0) };
        if let Some(name) = name.filter(|name| name.kind() == "identifier") {
            names.bind(scope, text(name, code), None);
        }
    }
}

/// `import cp, { exec as run } from 'child_process'`, `import * as cp from …`
fn script_import(names: &mut Names, node: Node<'_>, scope: usize, code: &str) {
    let source = node.child_by_field_name("source").and_then(|source| string(source, code));
    let Some(source) = source.map(module) else { return };
    let mut cursor = node.walk();
    let Some(clause) = node.named_children(&mut cursor).find(|one| one.kind() == "import_clause")
    else {
        return;
    };
    let mut cursor = clause.walk();
    for part in clause.named_children(&mut cursor) {
        match part.kind() {
            "identifier" => names.bind(scope, text(part, code), Some(source.to_owned())),
            "namespace_import" => {
                if let Some(name) = part.named_child(0) {
                    names.bind(scope, text(name, code), Some(source.to_owned()));
                }
            }
            _ => {
                let mut cursor = part.walk();
                for one in part.named_children(&mut cursor) {
                    let pair = aliased(one).or_else(|| {
                        let name = one.child_by_field_name("name")?;
                        Some((name, name))
                    });
                    let Some((name, alias)) = pair else { continue };
                    let path = format!("{source}.{}", text(name, code));
                    names.bind(scope, text(alias, code), Some(path));
                }
            }
        }
    }
}
