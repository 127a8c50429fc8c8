//! Static analysis of a piece of code: syntax errors, dangerous calls, invisible characters and
//! style. It reads the syntax tree, so comments, strings and methods that share a dangerous name
//! cause no findings.
//!
//! Invariants: no code is executed; analysis ends at its deadline; nesting depth costs no stack. It
//! reports nothing that one piece of code cannot show, such as the value of a variable.

mod call_site;
mod deadline;
mod grammar;
mod imports;
mod inspector;
mod program;
mod request;
mod rules;
mod style;
mod symbols;
mod syntax;
mod tree;

use std::collections::BTreeSet;
use std::time::Duration;

use tree_sitter::Node;

use crate::request::unicode;
use crate::validate::deadline::Deadline;
pub(crate) use crate::validate::grammar::Language;
pub(crate) use crate::validate::inspector::CodeInspector;
pub(crate) use crate::validate::program::is_program;
pub(crate) use crate::validate::request::{ValidationPool, validate_request};

/// The severity of a finding, lowest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Severity {
    Info,
    Warning,
    Error,
    Critical,
}

impl Severity {
    fn as_str(self) -> &'static str {
        match self {
            Severity::Info => "info",
            Severity::Warning => "warning",
            Severity::Error => "error",
            Severity::Critical => "critical",
        }
    }
}

/// A problem in the code. Lines and columns count from 0.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Finding {
    pub(crate) line: usize,
    /// In bytes from the start of the line.
    column: usize,
    pub(crate) severity: Severity,
    pub(crate) issue: &'static str,
    pub(crate) message: String,
    suggestion: &'static str,
}

impl Finding {
    fn at(node: Node<'_>, severity: Severity, issue: &'static str) -> Finding {
        let position = node.start_position();
        let (message, suggestion) = (String::new(), "");
        Finding {
            line: position.row,
            column: position.column,
            severity,
            issue,
            message,
            suggestion,
        }
    }

    fn with_message(self, message: impl Into<String>, suggestion: &'static str) -> Finding {
        Finding { message: message.into(), suggestion, ..self }
    }
}

/// The findings in the order of the text, and the metrics of the code.
#[derive(Debug, Default)]
pub(crate) struct AnalysisReport {
    pub(crate) findings: Vec<Finding>,
    lines_of_code: usize,
    functions: u32,
    classes: u32,
    complexity: u32,
}

/// The issue type of syntax errors.
pub(crate) const SYNTAX_ERROR: &str = "syntax_error";
/// The issue type of code that could not be analysed in time.
const NOT_CHECKED: &str = "not_checked";

/// Analyses code. `None`: the timeout expired.
pub(crate) fn analyse(
    code: &str,
    language: Language,
    timeout: Duration,
    with_style: bool,
) -> Option<AnalysisReport> {
    let deadline = Deadline::new(timeout);
    let tree = tree::parse(code, language, &deadline)?;
    let grammar = language.grammar();
    let mut report = AnalysisReport { complexity: 1, ..AnalysisReport::default() };
    let mut lines = BTreeSet::new();
    let mut symbols = symbols::SymbolTable::default();
    tree::walk(tree.root_node(), grammar, &deadline, &mut |node, scope| {
        syntax::check(node, language, code, &mut report.findings);
        symbols.record(node, scope, language, code);
        if with_style {
            report.findings.extend(style::check(node, language, code));
        }
        report.count_node(node, grammar);
        if node.child_count() == 0 && !grammar.comments.contains(&node.kind()) {
            lines.extend(node.start_position().row..=node.end_position().row);
        }
    })?;
    // The second pass resolves calls: all symbols are bound, including functions defined below
    // their use.
    tree::walk(tree.root_node(), grammar, &deadline, &mut |node, scope| {
        let call = call_site::CallSite::from_node(node, scope, &symbols, language, code);
        report.findings.extend(call.and_then(|call| rules::check(&call, language)));
    })?;
    report.lines_of_code = lines.len();
    if with_style {
        report.findings.extend(style::check_lines(code));
    }
    find_invisible(code, &mut report.findings);
    report.findings.sort_by_key(|finding| (finding.line, finding.column));
    Some(report)
}

impl AnalysisReport {
    /// Adds a node to the metrics.
    fn count_node(&mut self, node: Node<'_>, grammar: &grammar::Grammar) {
        let kind = node.kind();
        self.functions += u32::from(grammar.functions.contains(&kind));
        self.classes += u32::from(grammar.classes.contains(&kind) && node.is_named());
        self.complexity += u32::from(grammar.branches.contains(&kind));
    }
}

/// Adds a finding for every line with invisible characters.
fn find_invisible(code: &str, findings: &mut Vec<Finding>) {
    if code.is_ascii() && !code.bytes().any(|byte| unicode::is_invisible(byte.into())) {
        return;
    }
    for (line, text) in code.lines().enumerate() {
        // One finding per line is enough: the line needs a review in any case.
        let mut filter = unicode::InvisibleCharFilter::default();
        let mut buffer = [0; 4];
        let first = text
            .char_indices()
            .find(|(_, character)| filter.strip(character.encode_utf8(&mut buffer)).is_empty());
        let Some((column, first)) = first else { continue };
        let has_bidi = text.chars().any(unicode::is_bidi);
        let severity = if has_bidi { Severity::Error } else { Severity::Warning };
        let message =
            format!("the code contains the invisible character U+{:04X}", u32::from(first));
        let suggestion = "Remove it: the interpreter may read other code than a person sees.";
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
