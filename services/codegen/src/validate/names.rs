//! What a name stands for: names by scope, followed through imports, assignments and calls to the
//! place that they come from (`o.system` after `import os as o` is `os.system`).

use std::collections::HashMap;

use tree_sitter::Node;

use crate::validate::grammar::Language;
use crate::validate::imports;
use crate::validate::tree::Scope;

/// Longest chain of members and calls that is followed, and longest name: code has shorter ones, and
/// a longer one is not worth its time.
const DEEPEST: usize = 16;
const LONGEST: usize = 200;
const MOST_STARS: usize = 16;

/// Every scope, by its number.
#[derive(Debug, Default)]
pub(super) struct Names {
    scopes: Vec<Table>,
    /// Modules whose names are all imported.
    pub(super) stars: Vec<String>,
}

#[derive(Debug, Default)]
struct Table {
    outer: usize,
    /// A class: its names are seen by itself, and not by the functions in it.
    is_class: bool,
    names: HashMap<String, Option<String>>,
}

/// The text of a node.
pub(super) fn text<'c>(node: Node<'_>, code: &'c str) -> &'c str {
    code.get(node.byte_range()).unwrap_or_default()
}

impl Names {
    /// Learns what a node says of names.
    pub(super) fn read(&mut self, node: Node<'_>, scope: Scope, language: Language, code: &str) {
        if self.scopes.len() <= scope.number {
            let is_class = matches!(
                node.kind(),
                "class_definition" | "class_body" | "field_declaration_list" | "declaration_list"
            );
            self.scopes.push(Table { outer: scope.outer, is_class, names: HashMap::new() });
        }
        let grammar = language.grammar();
        // A function's name stands outside of it.
        let around = if scope.begins { scope.outer } else { scope.number };
        for (_, name, value) in grammar.bindings.iter().filter(|(kind, ..)| *kind == node.kind()) {
            let Some(name) = node.child_by_field_name(name) else { continue };
            let value = match *value {
                "" => None,
                "*" => last_child(node).filter(|value| *value != name),
                value => node.child_by_field_name(value),
            };
            let path = value.and_then(|value| self.path(value, around, language, code));
            self.bind_pattern(name, path, around, code);
        }
        imports::read(self, node, scope.number, language, code);
    }

    /// The name on the left of an assignment, or those in it.
    fn bind_pattern(&mut self, left: Node<'_>, path: Option<String>, scope: usize, code: &str) {
        match left.kind() {
            "identifier" => self.bind(scope, text(left, code), path),
            "pattern_list" | "tuple_pattern" | "list_pattern" | "pointer_declarator" => {
                let mut cursor = left.walk();
                for part in
                    left.named_children(&mut cursor).filter(|part| part.kind() == "identifier")
                {
                    self.bind(scope, text(part, code), None);
                }
            }
            // C++: only a function that is written here hides a library's; a prototype declares that one.
            "function_declarator" => {
                let name = left.child_by_field_name("declarator");
                if let Some(name) = name.filter(|name| name.kind() == "identifier") {
                    self.bind(scope, text(name, code), None);
                }
            }
            "object_pattern" => self.bind_members(left, path.as_deref(), scope, code),
            _ => {}
        }
    }

    /// `const { exec: run, spawn } = …`
    fn bind_members(&mut self, left: Node<'_>, path: Option<&str>, scope: usize, code: &str) {
        let mut cursor = left.walk();
        for part in left.named_children(&mut cursor) {
            let (key, name) = match part.kind() {
                "shorthand_property_identifier_pattern" => (part, part),
                "pair_pattern" => {
                    let both =
                        part.child_by_field_name("key").zip(part.child_by_field_name("value"));
                    let Some(both) = both else { continue };
                    both
                }
                _ => continue,
            };
            let member = path.map(|path| format!("{path}.{}", text(key, code)));
            self.bind(scope, text(name, code), member);
        }
    }

    /// A name that leads somewhere wins over one that does not, whichever comes first: a variable of
    /// the same name elsewhere must not hide an import.
    pub(super) fn bind(&mut self, scope: usize, name: &str, path: Option<String>) {
        let Some(scope) = self.scopes.get_mut(scope) else { return };
        if name.len() > LONGEST || path.as_deref() == Some(name) {
            return;
        }
        let known = scope.names.entry(name.to_owned()).or_default();
        if path.is_some() {
            *known = path;
        }
    }

    /// A module by its own name.
    pub(super) fn bind_module(&mut self, scope: usize, name: &str) {
        if let Some(scope) = self.scopes.get_mut(scope).filter(|_| name.len() <= LONGEST) {
            scope.names.insert(name.to_owned(), Some(name.to_owned()));
        }
    }

    /// All names of a module.
    pub(super) fn import_all(&mut self, module: &str) {
        if self.stars.len() < MOST_STARS && module.len() <= LONGEST {
            self.stars.push(module.to_owned());
        }
    }

    /// Some(None): the code's own.
    fn look_up(&self, name: &str, from: usize) -> Option<&Option<String>> {
        let mut number = from;
        loop {
            let scope = self.scopes.get(number)?;
            if (number == from || !scope.is_class)
                && let Some(known) = scope.names.get(name)
            {
                return Some(known);
            }
            if number == 0 {
                return None;
            }
            number = scope.outer;
        }
    }

    /// Where an expression leads, from a module or a built-in name on; None where it is not known.
    pub(super) fn path(
        &self,
        node: Node<'_>,
        scope: usize,
        language: Language,
        code: &str,
    ) -> Option<String> {
        let place = Place { names: self, scope, language, code };
        place.path(node, DEEPEST).filter(|path| path.len() <= LONGEST)
    }
}

/// Where from to look.
struct Place<'n> {
    names: &'n Names,
    scope: usize,
    language: Language,
    code: &'n str,
}

impl Place<'_> {
    fn path(&self, node: Node<'_>, deep: usize) -> Option<String> {
        let deep = deep.checked_sub(1)?;
        let grammar = self.language.grammar();
        let kind = node.kind();
        if grammar.wrappers.contains(&kind) {
            return self.path(last_child(node)?, deep);
        }
        if let Some((_, whole, part)) = grammar.members.iter().find(|member| member.0 == kind) {
            let part = node.child_by_field_name(part)?;
            let part = string(part, self.code).unwrap_or_else(|| text(part, self.code));
            return match node.child_by_field_name(whole) {
                Some(whole) => Some(format!("{}.{part}", self.path(whole, deep)?)),
                // `::system`
                None => Some(part.to_owned()),
            };
        }
        if let Some((_, callee, new)) = grammar.calls.iter().find(|call| call.0 == kind) {
            return self.called(node, node.child_by_field_name(callee)?, new, deep);
        }
        match kind {
            "identifier"
            | "type_identifier"
            | "namespace_identifier"
            | "dotted_name"
            | "generic_name"
            | "generic_type"
            | "scoped_type_identifier" => self.name(text(node, self.code)),
            _ => None,
        }
    }

    fn name(&self, name: &str) -> Option<String> {
        let name = name.split('<').next().unwrap_or(name);
        if name.len() > LONGEST {
            return None;
        }
        match self.names.look_up(name, self.scope) {
            Some(known) => known.clone(),
            None => Some(name.to_owned()),
        }
    }

    /// What a call gives; some give what their argument names.
    fn called(&self, call: Node<'_>, callee: Node<'_>, new: &str, deep: usize) -> Option<String> {
        let path = match call.child_by_field_name("object") {
            // Java: the object stands beside the name.
            Some(object) => format!("{}.{}", self.path(object, deep)?, text(callee, self.code)),
            None => self.path(callee, deep)?,
        };
        let first = |index| arguments(call).get(index).copied();
        match (self.language.family(), path.as_str()) {
            (Language::Python, "__import__" | "importlib.import_module")
            | (Language::JavaScript, "require") => {
                let module = first(0).and_then(|name| string(name, self.code));
                module.map(|name| imports::module(name).to_owned())
            }
            (Language::Python, "getattr") => {
                let whole = self.path(first(0)?, deep)?;
                Some(format!("{whole}.{}", string(first(1)?, self.code)?))
            }
            (Language::JavaScript, "util.promisify") => self.path(first(0)?, deep),
            _ => Some(format!("{new}{path}()")),
        }
    }
}

/// The arguments of a call or a creation, without comments.
pub(super) fn arguments(call: Node<'_>) -> Vec<Node<'_>> {
    let Some(list) = call.child_by_field_name("arguments") else { return Vec::new() };
    let mut cursor = list.walk();
    let given = list.named_children(&mut cursor).filter(|one| !one.kind().ends_with("comment"));
    // C# wraps each once more.
    given
        .map(|one| if one.kind() == "argument" { last_child(one).unwrap_or(one) } else { one })
        .collect()
}

fn last_child(node: Node<'_>) -> Option<Node<'_>> {
    let last = u32::try_from(node.named_child_count()).ok()?.checked_sub(1)?;
    node.named_child(last)
}

/// The text of a string without anything computed in it; escapes stay as they are written.
pub(super) fn string<'c>(node: Node<'_>, code: &'c str) -> Option<&'c str> {
    if !matches!(
        node.kind(),
        "string"
            | "string_literal"
            | "template_string"
            | "raw_string_literal"
            | "verbatim_string_literal"
    ) {
        return None;
    }
    let mut cursor = node.walk();
    let mut parts = node.named_children(&mut cursor);
    if parts.any(|part| {
        matches!(part.kind(), "interpolation" | "template_substitution" | "string_interpolation")
    }) {
        return None;
    }
    let whole = text(node, code)
        .trim_start_matches(|letter: char| letter.is_ascii_alphabetic() || letter == '@');
    let quotes = whole.chars().take_while(|letter| whole.starts_with(*letter)).count();
    let quotes = if quotes >= 6 || quotes == 3 { 3 } else { 1 };
    whole.get(quotes..whole.len().checked_sub(quotes)?)
}
