//! A call or creation as rules see it: what is called, by the place that it comes from, and with what.

use tree_sitter::Node;

use crate::validate::grammar::Language;
use crate::validate::names::{Names, arguments, string, text};
use crate::validate::tree::Scope;

/// How deep a list in a list is still looked into.
const DEEPEST: usize = 6;

#[derive(Debug)]
pub(super) struct Call<'t> {
    pub(super) node: Node<'t>,
    /// The places that it may come from: one, and one more for each module whose names are all imported.
    pub(super) paths: Vec<String>,
    names: &'t Names,
    scope: usize,
    language: Language,
    code: &'t str,
}

impl<'t> Call<'t> {
    pub(super) fn read(
        node: Node<'t>,
        scope: Scope,
        names: &'t Names,
        language: Language,
        code: &'t str,
    ) -> Option<Call<'t>> {
        let grammar = language.grammar();
        if !grammar.calls.iter().any(|(kind, ..)| *kind == node.kind()) {
            return None;
        }
        let scope = scope.number;
        // The path of the call is that of what is called, and "()".
        let path = names.path(node, scope, language, code)?;
        let path = path.strip_suffix("()")?;
        let short = grammar.prefixes.iter().find_map(|prefix| path.strip_prefix(prefix));
        let short = match path.strip_prefix("new ") {
            Some(name) => {
                let name = grammar
                    .prefixes
                    .iter()
                    .find_map(|prefix| name.strip_prefix(prefix))
                    .unwrap_or(name);
                format!("new {name}")
            }
            None => short.unwrap_or(path).to_owned(),
        };
        let all = names.stars.iter().filter(|_| !short.contains(['.', '(']));
        let mut paths: Vec<_> = all.map(|module| format!("{module}.{short}")).collect();
        paths.push(short);
        Some(Call { node, paths, names, scope, language, code })
    }

    fn positional(&self) -> Vec<Node<'t>> {
        arguments(self.node).into_iter().filter(|one| one.kind() != "keyword_argument").collect()
    }

    fn keyword(&self, name: &str) -> Option<Node<'t>> {
        let named = |one: &Node<'_>| {
            one.kind() == "keyword_argument"
                && one.child_by_field_name("name").is_some_and(|node| text(node, self.code) == name)
        };
        arguments(self.node).into_iter().find(named)?.child_by_field_name("value")
    }

    fn argument(&self, index: usize, name: &str) -> Option<Node<'t>> {
        self.keyword(name).or_else(|| self.positional().get(index).copied())
    }

    /// Everything that is handed over stands in the code as it is.
    pub(super) fn is_literal(&self) -> bool {
        arguments(self.node).into_iter().all(|one| {
            let value =
                one.child_by_field_name("value").filter(|_| one.kind() == "keyword_argument");
            is_literal(value.unwrap_or(one), self.code, DEEPEST)
        })
    }

    /// What is run or read is computed.
    pub(super) fn computes_first(&self) -> bool {
        self.positional().first().is_some_and(|one| !is_literal(*one, self.code, DEEPEST))
    }

    /// `new Function('a', 'return a')`: the last is the code.
    pub(super) fn computes_any(&self) -> bool {
        self.positional().iter().any(|one| !is_literal(*one, self.code, DEEPEST))
    }

    pub(super) fn uses_shell(&self) -> bool {
        self.keyword("shell")
            .is_some_and(|value| !matches!(text(value, self.code), "False" | "0" | "None"))
    }

    /// One string where a list of arguments is safer.
    pub(super) fn takes_one_string(&self) -> bool {
        let first = self.argument(0, "args");
        first.is_some_and(|one| match one.kind() {
            "string" => string(one, self.code).is_none_or(|words| words.contains(' ')),
            "concatenated_string" => true,
            "binary_operator" => {
                one.child_by_field_name("left").is_some_and(|left| left.kind() == "string")
            }
            _ => false,
        })
    }

    pub(super) fn has_safe_loader(&self) -> bool {
        let loader = self.argument(1, "Loader");
        let path =
            loader.and_then(|node| self.names.path(node, self.scope, self.language, self.code));
        path.is_some_and(|path| path.ends_with("SafeLoader") || path.ends_with("BaseLoader"))
    }

    /// Opened to be written.
    pub(super) fn writes(&self) -> bool {
        let mode = self.argument(1, "mode").and_then(|mode| string(mode, self.code));
        mode.is_some_and(|mode| mode.contains(['w', 'a', 'x', '+']))
    }

    /// `Path(…).open("w")`: the mode comes first.
    pub(super) fn opens_to_write(&self) -> bool {
        let mode = self.argument(0, "mode").and_then(|mode| string(mode, self.code));
        mode.is_some_and(|mode| mode.contains(['w', 'a', 'x', '+']))
    }

    /// One of the paths leads out of the folder that the code runs in.
    pub(super) fn leads_outside(&self, most: usize) -> bool {
        self.positional().iter().take(most).any(|path| is_outside(*path, self.code))
    }

    /// `Path("/etc/x").write_text(…)`: the path stands in the call before.
    pub(super) fn receiver_leads_outside(&self) -> bool {
        let callee = self.node.child_by_field_name("function");
        let receiver = callee.and_then(|callee| callee.child_by_field_name("object"));
        receiver.is_some_and(|path| arguments(path).iter().any(|one| is_outside(*one, self.code)))
    }
}

fn is_literal(node: Node<'_>, code: &str, deep: usize) -> bool {
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
            deep > 0 && node.named_children(&mut cursor).all(|one| is_literal(one, code, deep - 1))
        }
        _ => string(node, code).is_some(),
    }
}

/// Told of paths that stand in the code, also of the beginning of one that goes on computed.
fn is_outside(node: Node<'_>, code: &str) -> bool {
    let path = match string(node, code) {
        Some(path) => path,
        None if node.kind() == "string" => {
            let mut cursor = node.walk();
            let begin = node.named_children(&mut cursor).find(|one| one.kind() != "string_start");
            begin.filter(|one| one.kind() == "string_content").map_or("", |one| text(one, code))
        }
        None => return false,
    };
    let has_drive =
        path.as_bytes().get(1) == Some(&b':') && path.as_bytes()[0].is_ascii_alphabetic();
    path.starts_with(['/', '\\', '~'])
        || has_drive
        || path.split(['/', '\\']).any(|part| part == "..")
}
