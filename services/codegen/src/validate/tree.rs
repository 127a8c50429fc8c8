//! Parsing and walking within a time, and without recursion: code may be as deep as it is long.

use std::ops::ControlFlow;

use tree_sitter::{Node, ParseOptions, Parser, Tree};

use crate::validate::clock::Clock;
use crate::validate::grammar::{Grammar, Language};

/// None where the time is over.
pub(super) fn parse(code: &str, language: Language, clock: &Clock) -> Option<Tree> {
    if clock.is_over_now() {
        return None;
    }
    let mut parser = Parser::new();
    // Fails for a grammar of another generation alone: the tests would know.
    parser.set_language(&language.grammar().language()).ok()?;
    let mut progress = |_: &tree_sitter::ParseState| {
        if clock.is_over_now() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let options = ParseOptions::new().progress_callback(&mut progress);
    let read = &mut |at: usize, _| code.as_bytes().get(at..).unwrap_or_default();
    parser.parse_with_options(read, None, Some(options))
}

/// Visits every node before its children, with the number of its scope: 0 is the whole, and each
/// function, class or block that has names of its own is one more, in the order of the text. None
/// where the time is over.
pub(super) fn walk<'t>(
    root: Node<'t>,
    grammar: &Grammar,
    clock: &Clock,
    visit: &mut impl FnMut(Node<'t>, Scope),
) -> Option<()> {
    let mut cursor = root.walk();
    let mut open = vec![Scope { number: 0, outer: 0, begins: true }];
    let mut scopes = 0;
    loop {
        if clock.is_over() {
            return None;
        }
        let node = cursor.node();
        let outer = open.last().map_or(0, |scope| scope.number);
        let mut scope = Scope { number: outer, outer, begins: false };
        if node.is_named() && grammar.scopes.contains(&node.kind()) {
            scopes += 1;
            scope = Scope { number: scopes, outer, begins: true };
        }
        visit(node, scope);
        open.push(scope);
        if cursor.goto_first_child() {
            continue;
        }
        loop {
            open.pop();
            if cursor.goto_next_sibling() {
                break;
            }
            if !cursor.goto_parent() {
                return Some(());
            }
        }
    }
}

/// Where names are looked up.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scope {
    pub(super) number: usize,
    /// The one around it; of one that does not begin here, itself.
    pub(super) outer: usize,
    /// The node opens it.
    pub(super) begins: bool,
}
