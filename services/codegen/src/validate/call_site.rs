//! A call or object creation as the rules see it: the resolved path of the function, and its
//! arguments.

use tree_sitter::Node;

use crate::validate::grammar::{Grammar, Language};
use crate::validate::symbols::{SymbolTable, arguments, node_text, string_literal};
use crate::validate::tree::NodeScope;

/// Deepest nesting of lists that may count as a literal.
const MAX_LITERAL_DEPTH: usize = 6;

#[derive(Debug)]
pub(super) struct CallSite<'t> {
    pub(super) node: Node<'t>,
    /// Possible paths of the called function: the resolved one, and one for each wildcard import.
    pub(super) paths: Vec<String>,
    symbols: &'t SymbolTable,
    scope: usize,
    language: Language,
    code: &'t str,
}

impl<'t> CallSite<'t> {
    pub(super) fn from_node(
        node: Node<'t>,
        scope: NodeScope,
        symbols: &'t SymbolTable,
        language: Language,
        code: &'t str,
    ) -> Option<CallSite<'t>> {
        let grammar = language.grammar();
        if !grammar.calls.iter().any(|(kind, ..)| *kind == node.kind()) {
            return None;
        }
        let scope = scope.id;
        // The path of a call is the path of its function and "()".
        let path = symbols.resolve_path(node, scope, language, code)?;
        let path = path.strip_suffix("()")?;
        let path = match path.strip_prefix("new ") {
            Some(name) => format!("new {}", without_namespace(name, grammar)),
            None => without_namespace(path, grammar).to_owned(),
        };
        let modules = symbols.wildcard_modules.iter().filter(|_| !path.contains(['.', '(']));
        let mut paths: Vec<_> = modules.map(|module| format!("{module}.{path}")).collect();
        paths.push(path);
        Some(CallSite { node, paths, symbols, scope, language, code })
    }

    fn positional(&self) -> Vec<Node<'t>> {
        arguments(self.node)
            .into_iter()
            .filter(|argument| argument.kind() != "keyword_argument")
            .collect()
    }

    fn keyword(&self, name: &str) -> Option<Node<'t>> {
        let named = |argument: &Node<'_>| {
            argument.kind() == "keyword_argument"
                && argument
                    .child_by_field_name("name")
                    .is_some_and(|node| node_text(node, self.code) == name)
        };
        arguments(self.node).into_iter().find(named)?.child_by_field_name("value")
    }

    fn argument(&self, index: usize, name: &str) -> Option<Node<'t>> {
        self.keyword(name).or_else(|| self.positional().get(index).copied())
    }

    /// Whether all arguments are literals.
    pub(super) fn is_literal(&self) -> bool {
        arguments(self.node).into_iter().all(|argument| {
            let value = argument
                .child_by_field_name("value")
                .filter(|_| argument.kind() == "keyword_argument");
            is_literal(value.unwrap_or(argument), self.code, MAX_LITERAL_DEPTH)
        })
    }

    /// Whether the first argument is computed.
    pub(super) fn has_computed_first_argument(&self) -> bool {
        self.positional()
            .first()
            .is_some_and(|argument| !is_literal(*argument, self.code, MAX_LITERAL_DEPTH))
    }

    /// Whether any argument is computed. In `new Function('a', 'return a')` the last one is the
    /// code.
    pub(super) fn has_computed_argument(&self) -> bool {
        self.positional()
            .iter()
            .any(|argument| !is_literal(*argument, self.code, MAX_LITERAL_DEPTH))
    }

    pub(super) fn uses_shell(&self) -> bool {
        self.keyword("shell")
            .is_some_and(|value| !matches!(node_text(value, self.code), "False" | "0" | "None"))
    }

    /// Whether the command is one string, where a list of arguments is safer.
    pub(super) fn has_string_command(&self) -> bool {
        let first = self.argument(0, "args");
        first.is_some_and(|argument| match argument.kind() {
            "string" => string_literal(argument, self.code).is_none_or(|words| words.contains(' ')),
            "concatenated_string" => true,
            "binary_operator" => {
                argument.child_by_field_name("left").is_some_and(|left| left.kind() == "string")
            }
            _ => false,
        })
    }

    pub(super) fn has_safe_loader(&self) -> bool {
        let loader = self.argument(1, "Loader");
        let path = loader
            .and_then(|node| self.symbols.resolve_path(node, self.scope, self.language, self.code));
        path.is_some_and(|path| path.ends_with("SafeLoader") || path.ends_with("BaseLoader"))
    }

    /// Whether `open(path, mode)` opens for writing.
    pub(super) fn opens_for_writing(&self) -> bool {
        self.has_write_mode(1)
    }

    /// Whether `Path(…).open(mode)` opens for writing.
    pub(super) fn opens_receiver_for_writing(&self) -> bool {
        self.has_write_mode(0)
    }

    fn has_write_mode(&self, index: usize) -> bool {
        let mode = self.argument(index, "mode").and_then(|mode| string_literal(mode, self.code));
        mode.is_some_and(|mode| mode.contains(['w', 'a', 'x', '+']))
    }

    /// Whether one of the first `count` arguments is a path outside of the working folder.
    pub(super) fn has_outside_path(&self, count: usize) -> bool {
        self.positional().iter().take(count).any(|path| is_outside_path(*path, self.code))
    }

    /// Whether the receiver's path is outside of the working folder, as in
    /// `Path("/etc/x").write_text(…)`.
    pub(super) fn has_outside_receiver(&self) -> bool {
        let callee = self.node.child_by_field_name("function");
        let receiver = callee.and_then(|callee| callee.child_by_field_name("object"));
        receiver.is_some_and(|path| {
            arguments(path).iter().any(|argument| is_outside_path(*argument, self.code))
        })
    }
}

fn without_namespace<'p>(path: &'p str, grammar: &Grammar) -> &'p str {
    grammar.prefixes.iter().find_map(|prefix| path.strip_prefix(prefix)).unwrap_or(path)
}

fn is_literal(node: Node<'_>, code: &str, remaining_depth: usize) -> bool {
    match node.kind() {
        "integer"
        | "float"
        | "number"
        | "true"
        | "false"
        | "none"
        | "null"
        | "null_literal"
        | "decimal_integer_literal"
        | "integer_literal"
        | "boolean_literal"
        | "number_literal"
        | "nullptr"
        | "escape_sequence" => true,
        "concatenated_string" | "list" | "tuple" | "array" | "parenthesized_expression" => {
            let mut cursor = node.walk();
            remaining_depth > 0
                && node
                    .named_children(&mut cursor)
                    .all(|argument| is_literal(argument, code, remaining_depth - 1))
        }
        _ => string_literal(node, code).is_some(),
    }
}

/// Whether a string literal, or the literal start of an interpolated string, is a path outside of
/// the working folder.
fn is_outside_path(node: Node<'_>, code: &str) -> bool {
    let path = match string_literal(node, code) {
        Some(path) => path,
        None if node.kind() == "string" => {
            let mut cursor = node.walk();
            let begin =
                node.named_children(&mut cursor).find(|argument| argument.kind() != "string_start");
            begin
                .filter(|argument| argument.kind() == "string_content")
                .map_or("", |argument| node_text(argument, code))
        }
        None => return false,
    };
    let has_drive =
        path.as_bytes().get(1) == Some(&b':') && path.as_bytes()[0].is_ascii_alphabetic();
    path.starts_with(['/', '\\', '~'])
        || has_drive
        || path.split(['/', '\\']).any(|part| part == "..")
}
