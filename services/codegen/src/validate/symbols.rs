//! The symbol table: resolves names by scope through imports, assignments and calls to the path of
//! their origin. After `import os as o`, `o.system` resolves to `os.system`.

use std::collections::HashMap;

use tree_sitter::Node;

use crate::validate::grammar::Language;
use crate::validate::imports;
use crate::validate::tree::NodeScope;

/// Longest resolved chain of members and calls. Real code has shorter ones.
const MAX_PATH_DEPTH: usize = 16;
/// Longest resolved name or path, in bytes.
const MAX_NAME_LEN: usize = 200;
const MAX_WILDCARD_IMPORTS: usize = 16;

/// The symbols of all scopes, indexed by scope id.
#[derive(Debug, Default)]
pub(super) struct SymbolTable {
    scopes: Vec<ScopeSymbols>,
    /// Modules of wildcard imports.
    pub(super) wildcard_modules: Vec<String>,
}

#[derive(Debug, Default)]
struct ScopeSymbols {
    parent: usize,
    /// Names of a class are visible in its body, but not in its functions.
    is_class: bool,
    /// The path of each name. `None`: the code defines the name itself.
    names: HashMap<String, Option<String>>,
}

/// The text of a node.
pub(super) fn node_text<'c>(node: Node<'_>, code: &'c str) -> &'c str {
    code.get(node.byte_range()).unwrap_or_default()
}

impl SymbolTable {
    /// Records the bindings of a node.
    pub(super) fn record(
        &mut self,
        node: Node<'_>,
        scope: NodeScope,
        language: Language,
        code: &str,
    ) {
        if self.scopes.len() <= scope.id {
            let is_class = matches!(
                node.kind(),
                "class_definition" | "class_body" | "field_declaration_list" | "declaration_list"
            );
            self.scopes.push(ScopeSymbols {
                parent: scope.parent,
                is_class,
                names: HashMap::new(),
            });
        }
        let grammar = language.grammar();
        // A function's name belongs to the enclosing scope.
        let enclosing = if scope.starts_here { scope.parent } else { scope.id };
        for (_, name, value) in grammar.bindings.iter().filter(|(kind, ..)| *kind == node.kind()) {
            let Some(name) = node.child_by_field_name(name) else { continue };
            let value = match *value {
                "" => None,
                "*" => last_child(node).filter(|value| *value != name),
                value => node.child_by_field_name(value),
            };
            let path = value.and_then(|value| self.resolve_path(value, enclosing, language, code));
            self.bind_pattern(name, path, enclosing, code);
        }
        imports::record(self, node, scope.id, language, code);
    }

    /// Binds the names on the left-hand side of an assignment.
    fn bind_pattern(&mut self, left: Node<'_>, path: Option<String>, scope: usize, code: &str) {
        match left.kind() {
            "identifier" => self.bind(scope, node_text(left, code), path),
            "pattern_list" | "tuple_pattern" | "list_pattern" | "pointer_declarator" => {
                let mut cursor = left.walk();
                for part in
                    left.named_children(&mut cursor).filter(|part| part.kind() == "identifier")
                {
                    self.bind(scope, node_text(part, code), None);
                }
            }
            // C++: a definition hides the library function. A prototype declares it and hides
            // nothing.
            "function_declarator" => {
                let name = left.child_by_field_name("declarator");
                if let Some(name) = name.filter(|name| name.kind() == "identifier") {
                    self.bind(scope, node_text(name, code), None);
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
            let member = path.map(|path| format!("{path}.{}", node_text(key, code)));
            self.bind(scope, node_text(name, code), member);
        }
    }

    /// Binds a name. A binding with a path wins over one without, in any order: a variable of the
    /// same name must not hide an import.
    pub(super) fn bind(&mut self, scope: usize, name: &str, path: Option<String>) {
        let Some(scope) = self.scopes.get_mut(scope) else { return };
        if name.len() > MAX_NAME_LEN || path.as_deref() == Some(name) {
            return;
        }
        let bound = scope.names.entry(name.to_owned()).or_default();
        if path.is_some() {
            *bound = path;
        }
    }

    /// Binds a module to its own name.
    pub(super) fn bind_module(&mut self, scope: usize, name: &str) {
        if let Some(scope) = self.scopes.get_mut(scope).filter(|_| name.len() <= MAX_NAME_LEN) {
            scope.names.insert(name.to_owned(), Some(name.to_owned()));
        }
    }

    /// Records a wildcard import of a module.
    pub(super) fn bind_wildcard(&mut self, module: &str) {
        if self.wildcard_modules.len() < MAX_WILDCARD_IMPORTS && module.len() <= MAX_NAME_LEN {
            self.wildcard_modules.push(module.to_owned());
        }
    }

    /// Looks up a name from a scope outwards. `Some(None)`: the code defines it itself. `None`: it
    /// is unbound.
    fn lookup(&self, name: &str, from: usize) -> Option<&Option<String>> {
        let mut id = from;
        loop {
            let scope = self.scopes.get(id)?;
            if (id == from || !scope.is_class)
                && let Some(path) = scope.names.get(name)
            {
                return Some(path);
            }
            if id == 0 {
                return None;
            }
            id = scope.parent;
        }
    }

    /// The path of an expression, which starts with a module or a built-in name. `None`: it is
    /// unknown.
    pub(super) fn resolve_path(
        &self,
        node: Node<'_>,
        scope: usize,
        language: Language,
        code: &str,
    ) -> Option<String> {
        let resolver = PathResolver { symbols: self, scope, language, code };
        resolver.resolve(node, MAX_PATH_DEPTH).filter(|path| path.len() <= MAX_NAME_LEN)
    }
}

/// Resolves expressions from one scope.
struct PathResolver<'n> {
    symbols: &'n SymbolTable,
    scope: usize,
    language: Language,
    code: &'n str,
}

impl PathResolver<'_> {
    fn resolve(&self, node: Node<'_>, remaining_depth: usize) -> Option<String> {
        let remaining_depth = remaining_depth.checked_sub(1)?;
        let grammar = self.language.grammar();
        let kind = node.kind();
        if grammar.wrappers.contains(&kind) {
            return self.resolve(last_child(node)?, remaining_depth);
        }
        if let Some((_, object, member)) = grammar.members.iter().find(|entry| entry.0 == kind) {
            let member = node.child_by_field_name(member)?;
            let member =
                string_literal(member, self.code).unwrap_or_else(|| node_text(member, self.code));
            return match node.child_by_field_name(object) {
                Some(object) => {
                    Some(format!("{}.{member}", self.resolve(object, remaining_depth)?))
                }
                // `::system`
                None => Some(member.to_owned()),
            };
        }
        if let Some((_, callee, new)) = grammar.calls.iter().find(|call| call.0 == kind) {
            return self.resolve_call(
                node,
                node.child_by_field_name(callee)?,
                new,
                remaining_depth,
            );
        }
        match kind {
            "identifier"
            | "type_identifier"
            | "namespace_identifier"
            | "dotted_name"
            | "generic_name"
            | "generic_type"
            | "scoped_type_identifier" => self.resolve_name(node_text(node, self.code)),
            _ => None,
        }
    }

    fn resolve_name(&self, name: &str) -> Option<String> {
        let name = name.split('<').next().unwrap_or(name);
        if name.len() > MAX_NAME_LEN {
            return None;
        }
        match self.symbols.lookup(name, self.scope) {
            Some(path) => path.clone(),
            None => Some(name.to_owned()),
        }
    }

    /// The path of a call's result. Some functions return the object that their argument names.
    fn resolve_call(
        &self,
        call: Node<'_>,
        callee: Node<'_>,
        new: &str,
        remaining_depth: usize,
    ) -> Option<String> {
        let path = match call.child_by_field_name("object") {
            // Java: the object is a sibling of the method name.
            Some(object) => {
                format!(
                    "{}.{}",
                    self.resolve(object, remaining_depth)?,
                    node_text(callee, self.code)
                )
            }
            None => self.resolve(callee, remaining_depth)?,
        };
        let argument = |index| arguments(call).get(index).copied();
        match (self.language.family(), path.as_str()) {
            (Language::Python, "__import__" | "importlib.import_module")
            | (Language::JavaScript, "require") => {
                let module = argument(0).and_then(|name| string_literal(name, self.code));
                module.map(|name| imports::plain_module_name(name).to_owned())
            }
            (Language::Python, "getattr") => {
                let object = self.resolve(argument(0)?, remaining_depth)?;
                Some(format!("{object}.{}", string_literal(argument(1)?, self.code)?))
            }
            (Language::JavaScript, "util.promisify") => self.resolve(argument(0)?, remaining_depth),
            _ => Some(format!("{new}{path}()")),
        }
    }
}

/// The arguments of a call or an object creation, without comments.
pub(super) fn arguments(call: Node<'_>) -> Vec<Node<'_>> {
    let Some(list) = call.child_by_field_name("arguments") else { return Vec::new() };
    let mut cursor = list.walk();
    let given = list.named_children(&mut cursor).filter(|node| !node.kind().ends_with("comment"));
    // C# wraps each argument in another node.
    given
        .map(|node| if node.kind() == "argument" { last_child(node).unwrap_or(node) } else { node })
        .collect()
}

fn last_child(node: Node<'_>) -> Option<Node<'_>> {
    let last = u32::try_from(node.named_child_count()).ok()?.checked_sub(1)?;
    node.named_child(last)
}

/// The content of a string literal without interpolation. Escapes are not decoded.
pub(super) fn string_literal<'c>(node: Node<'_>, code: &'c str) -> Option<&'c str> {
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
    let whole = node_text(node, code)
        .trim_start_matches(|letter: char| letter.is_ascii_alphabetic() || letter == '@');
    let quotes = whole.chars().take_while(|letter| whole.starts_with(*letter)).count();
    let quotes = if quotes >= 6 || quotes == 3 { 3 } else { 1 };
    whole.get(quotes..whole.len().checked_sub(quotes)?)
}
