//! Parses code and walks its syntax tree, with a deadline and without recursion: nesting can be as
//! deep as the code is long.

use std::ops::ControlFlow;

use tree_sitter::{Node, ParseOptions, Parser, Tree};

use crate::validate::deadline::Deadline;
use crate::validate::grammar::{Grammar, Language};

/// Parses code. `None`: the deadline expired.
pub(super) fn parse(code: &str, language: Language, deadline: &Deadline) -> Option<Tree> {
    if deadline.is_expired_now() {
        return None;
    }
    let mut parser = Parser::new();
    // Fails only for a grammar with an incompatible ABI version, which the tests would detect.
    parser.set_language(&language.grammar().language()).ok()?;
    let mut progress = |_: &tree_sitter::ParseState| {
        if deadline.is_expired_now() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let options = ParseOptions::new().progress_callback(&mut progress);
    let read_at = &mut |at: usize, _| code.as_bytes().get(at..).unwrap_or_default();
    parser.parse_with_options(read_at, None, Some(options))
}

/// Visits every node before its children, with its scope. Scope 0 is the whole text. Each function,
/// class or block with names of its own is a further scope, in the order of the text. `None`: the
/// deadline expired.
pub(super) fn walk<'t>(
    root: Node<'t>,
    grammar: &Grammar,
    deadline: &Deadline,
    visit: &mut impl FnMut(Node<'t>, NodeScope),
) -> Option<()> {
    let mut cursor = root.walk();
    let mut open_scopes = vec![NodeScope { id: 0, parent: 0, starts_here: true }];
    let mut scopes = 0;
    loop {
        if deadline.is_expired() {
            return None;
        }
        let node = cursor.node();
        let parent = open_scopes.last().map_or(0, |scope| scope.id);
        let mut scope = NodeScope { id: parent, parent, starts_here: false };
        if node.is_named() && grammar.scopes.contains(&node.kind()) {
            scopes += 1;
            scope = NodeScope { id: scopes, parent, starts_here: true };
        }
        visit(node, scope);
        open_scopes.push(scope);
        if cursor.goto_first_child() {
            continue;
        }
        loop {
            open_scopes.pop();
            if cursor.goto_next_sibling() {
                break;
            }
            if !cursor.goto_parent() {
                return Some(());
            }
        }
    }
}

/// The scope in which the names of a node are resolved.
#[derive(Clone, Copy, Debug)]
pub(super) struct NodeScope {
    pub(super) id: usize,
    /// The enclosing scope. If the scope does not start at this node, it is `id` itself.
    pub(super) parent: usize,
    /// Whether this node opens the scope.
    pub(super) starts_here: bool,
}
