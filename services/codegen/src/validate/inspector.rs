//! Warnings about the code in an answer. The inspector collects the code blocks while the answer
//! streams, and analyses them once, at its end.
//!
//! Invariant: the time per answer is bounded, and blocks that do not fit into it cause no warnings.

use std::time::{Duration, Instant};

use crate::validate::{Language, SYNTAX_ERROR, Severity, analyse};

/// Time for all blocks of an answer. A block of 16 KiB takes a few milliseconds.
const INSPECTION_TIMEOUT: Duration = Duration::from_millis(25);
/// Most code in all blocks together. Beyond it the answer has no warnings. An answer with the
/// maximum number of tokens is shorter.
const MAX_CODE_BYTES: usize = 64 * 1024;
const MAX_WARNING_COUNT: usize = 10;

/// The code blocks of one answer.
#[derive(Debug, Default)]
pub(crate) struct CodeInspector {
    /// The language of blocks that name none.
    default_language: Option<Language>,
    blocks: Vec<Block>,
    /// The number of the last block.
    block_number: usize,
    code_len: usize,
    /// Lines of all blocks so far, which the field `generated_code` concatenates.
    line_count: usize,
}

#[derive(Debug)]
struct Block {
    language: Option<Language>,
    first_line: usize,
    code: String,
}

impl CodeInspector {
    pub(crate) fn new(language: &str) -> CodeInspector {
        CodeInspector {
            default_language: Language::from_name(language),
            ..CodeInspector::default()
        }
    }

    /// Adds code of a block. `number` counts from 1, `info_word` is the first word after its
    /// opening fence.
    pub(crate) fn push(&mut self, number: usize, info_word: &str, code: &str) {
        self.code_len += code.len();
        if self.code_len > MAX_CODE_BYTES {
            self.blocks.clear();
            return;
        }
        if self.block_number != number {
            self.block_number = number;
            let language = match info_word {
                "" => self.default_language,
                name => Language::from_name(name),
            };
            self.blocks.push(Block { language, first_line: self.line_count, code: String::new() });
        }
        self.line_count += memchr::memchr_iter(b'\n', code.as_bytes()).count();
        if let Some(block) = self.blocks.last_mut() {
            block.code.push_str(code);
        }
    }

    /// The warnings by line. `is_cut`: the answer is incomplete, so syntax errors are not reported.
    pub(crate) fn warnings(&self, is_cut: bool) -> Vec<String> {
        let deadline = Instant::now() + INSPECTION_TIMEOUT;
        let mut warnings = Vec::new();
        for block in &self.blocks {
            // A transcript of an interactive session is not a program.
            let Some(language) = block.language.filter(|_| !block.code.starts_with(">>>")) else {
                continue;
            };
            let remaining = deadline.saturating_duration_since(Instant::now());
            let Some(report) = analyse(&block.code, language, remaining, false) else {
                break;
            };
            let findings = report.findings.iter().filter(|finding| match finding.issue {
                SYNTAX_ERROR => !is_cut,
                _ => language == Language::Python && finding.severity >= Severity::Warning,
            });
            warnings.extend(findings.map(|finding| {
                format!("line {}: {}", block.first_line + finding.line + 1, finding.message)
            }));
        }
        let omitted = warnings.len().saturating_sub(MAX_WARNING_COUNT);
        warnings.truncate(MAX_WARNING_COUNT);
        if omitted > 0 {
            warnings.push(format!("and {omitted} more"));
        }
        warnings
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn warnings(default_language: &str, blocks: &[(&str, &str)], is_cut: bool) -> Vec<String> {
        let mut inspector = CodeInspector::new(default_language);
        for (block_number, (info_word, code)) in (1..).zip(blocks) {
            for piece in code.split_inclusive(' ') {
                inspector.push(block_number, info_word, piece);
            }
        }
        inspector.warnings(is_cut)
    }

    #[test]
    fn line_numbers_count_through_all_blocks() {
        let blocks = [("python", "import os\nx = 1\n"), ("", "import os\nos.system(x)\n")];
        assert_eq!(
            warnings("python", &blocks, false),
            ["line 4: os.system runs its argument in a shell"]
        );
    }

    #[test]
    fn the_language_of_the_fence_wins_and_unknown_languages_are_not_checked() {
        let broken = "def f(:\n";
        assert_eq!(
            warnings("python", &[("bash", broken), ("json", broken)], false),
            Vec::<String>::new()
        );
        assert!(!warnings("bash", &[("py", broken)], false).is_empty());
        assert_eq!(warnings("python", &[("", ">>> f(\n")], false), Vec::<String>::new());
    }

    #[test]
    fn an_incomplete_answer_has_no_syntax_errors_but_dangerous_calls() {
        let cut = [("python", "import os\nos.system(x)\ndef f(")];
        assert_eq!(warnings("python", &cut, true).len(), 1);
        assert_eq!(warnings("python", &cut, false).len(), 2);
    }

    #[test]
    fn other_languages_than_python_report_syntax_errors_only() {
        assert_eq!(warnings("js", &[("js", "eval(x);\n")], false), Vec::<String>::new());
        assert_eq!(warnings("js", &[("js", "let = = 1;\n")], false).len(), 1);
    }

    #[test]
    fn warnings_and_code_are_bounded() {
        let many = "eval(x)\n".repeat(30);
        let findings = warnings("python", &[("python", &many)], false);
        assert_eq!((findings.len(), findings[10].as_str()), (11, "and 20 more"));
        let long = "eval(x)\n".repeat(MAX_CODE_BYTES / 8 + 1);
        assert_eq!(warnings("python", &[("python", &long)], false), Vec::<String>::new());
    }
}
