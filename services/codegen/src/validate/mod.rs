//! What is wrong or dangerous in a piece of code, told by its syntax tree and never by its text: a
//! comment, a string or a method that is merely called like something dangerous is nothing.
//!
//! Kept true: nothing is executed; parsing and looking end at the time that was given; depth costs no
//! stack. What can't be told from one piece of code (what a variable holds) is not claimed.

mod calls;
mod clock;
mod grammar;
mod imports;
mod inspector;
mod names;
mod request;
mod rules;
mod style;
mod syntax;
mod tree;

use std::collections::BTreeSet;
use std::time::Duration;

use tree_sitter::Node;

use crate::unicode;
use crate::validate::clock::Clock;
pub(crate) use crate::validate::grammar::Language;
pub(crate) use crate::validate::inspector::Inspector;
pub(crate) use crate::validate::request::{Validators, check};

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Severity {
    Info,
    Warning,
    Error,
    Critical,
}

impl Severity {
    fn word(self) -> &'static str {
        match self {
            Severity::Info => "info",
            Severity::Warning => "warning",
            Severity::Error => "error",
            Severity::Critical => "critical",
        }
    }
}

/// One thing that was found; lines and columns count from 0.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Finding {
    pub(crate) line: usize,
    /// In bytes.
    column: usize,
    pub(crate) severity: Severity,
    pub(crate) issue: &'static str,
    pub(crate) message: String,
    suggestion: &'static str,
}

impl Finding {
    fn at(node: Node<'_>, severity: Severity, issue: &'static str) -> Finding {
        let at = node.start_position();
        let (message, suggestion) = (String::new(), "");
        Finding { line: at.row, column: at.column, severity, issue, message, suggestion }
    }

    fn says(self, message: impl Into<String>, suggestion: &'static str) -> Finding {
        Finding { message: message.into(), suggestion, ..self }
    }
}

/// All that was found, in the order of the text.
#[derive(Debug, Default)]
pub(crate) struct Report {
    pub(crate) findings: Vec<Finding>,
    lines_of_code: usize,
    functions: u32,
    classes: u32,
    complexity: u32,
}

/// Issue types that the rest of this crate asks for.
pub(crate) const SYNTAX_ERROR: &str = "syntax_error";
const NOT_CHECKED: &str = "not_checked";

/// Looks at code; None where the time did not suffice.
pub(crate) fn examine(
    code: &str,
    language: Language,
    within: Duration,
    with_style: bool,
) -> Option<Report> {
    let clock = Clock::new(within);
    let tree = tree::parse(code, language, &clock)?;
    let grammar = language.grammar();
    let mut report = Report { complexity: 1, ..Report::default() };
    let mut lines = BTreeSet::new();
    let mut names = names::Names::default();
    tree::walk(tree.root_node(), grammar, &clock, &mut |node, scope| {
        syntax::check(node, language, code, &mut report.findings);
        names.read(node, scope, language, code);
        if with_style {
            report.findings.extend(style::check(node, language, code));
        }
        report.count(node, grammar);
        if node.child_count() == 0 && !grammar.comments.contains(&node.kind()) {
            lines.extend(node.start_position().row..=node.end_position().row);
        }
    })?;
    // Names are known now, also those of functions that stand below their use.
    tree::walk(tree.root_node(), grammar, &clock, &mut |node, scope| {
        if let Some(call) = calls::Call::read(node, scope, &names, language, code) {
            report.findings.extend(rules::apply(&call, language));
        }
    })?;
    report.lines_of_code = lines.len();
    if with_style {
        report.findings.extend(style::lines(code));
    }
    hidden(code, &mut report.findings);
    report.findings.sort_by_key(|finding| (finding.line, finding.column));
    Some(report)
}

impl Report {
    fn count(&mut self, node: Node<'_>, grammar: &grammar::Grammar) {
        let kind = node.kind();
        self.functions += u32::from(grammar.functions.contains(&kind));
        self.classes += u32::from(grammar.classes.contains(&kind) && node.is_named());
        self.complexity += u32::from(grammar.branches.contains(&kind));
    }
}

/// What a reader of the code does not see.
fn hidden(code: &str, findings: &mut Vec<Finding>) {
    if code.is_ascii() && !code.bytes().any(|byte| unicode::is_invisible(byte.into())) {
        return;
    }
    for (line, text) in code.lines().enumerate() {
        // One finding a line: which of them it is makes no difference to who must look at it.
        let mut sieve = unicode::Sieve::default();
        let mut letter = [0; 4];
        let first = text
            .char_indices()
            .find(|(_, one)| sieve.strip(one.encode_utf8(&mut letter)).is_empty());
        let Some((column, first)) = first else { continue };
        let is_worse = text.chars().any(unicode::is_bidi);
        let severity = if is_worse { Severity::Error } else { Severity::Warning };
        let message = format!("U+{:04X} is in the code and can't be seen", u32::from(first));
        let suggestion = "Remove it: the code may be read otherwise than it looks.";
        findings.push(Finding {
            line,
            column,
            severity,
            issue: "invisible_character",
            message,
            suggestion,
        });
    }
}

#[cfg(test)]
mod tests;
