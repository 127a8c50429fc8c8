//! What a careful reader should know of the code in an answer. It gathers the code blocks as they
//! come, and looks at them once, when the answer is whole.
//!
//! Kept true: it costs an answer a bounded time, and what did not fit into it is not spoken of.

use std::time::{Duration, Instant};

use crate::validate::{Language, SYNTAX_ERROR, Severity, examine};

/// For all blocks of an answer. One of 16 KiB takes a few milliseconds.
const TIME: Duration = Duration::from_millis(25);
/// Longest that all code may be together: an answer of the most tokens is shorter.
const LONGEST: usize = 64 * 1024;
const MOST_WARNINGS: usize = 10;

/// The code blocks of one answer.
#[derive(Debug, Default)]
pub(crate) struct Inspector {
    /// The language where a block names none.
    asked: Option<Language>,
    blocks: Vec<Block>,
    number: usize,
    length: usize,
    /// Of all blocks before, as they stand one after the other in generated_code.
    lines: usize,
}

#[derive(Debug)]
struct Block {
    language: Option<Language>,
    first_line: usize,
    code: String,
}

impl Inspector {
    pub(crate) fn new(language: &str) -> Inspector {
        Inspector { asked: Language::named(language), ..Inspector::default() }
    }

    /// Takes code of the block with this number, counted from 1, and the word of its fence.
    pub(crate) fn take(&mut self, number: usize, word: &str, code: &str) {
        self.length += code.len();
        if self.length > LONGEST {
            self.blocks.clear();
            return;
        }
        if self.number != number {
            self.number = number;
            let language = if word.is_empty() { self.asked } else { Language::named(word) };
            self.blocks.push(Block { language, first_line: self.lines, code: String::new() });
        }
        self.lines += memchr::memchr_iter(b'\n', code.as_bytes()).count();
        if let Some(block) = self.blocks.last_mut() {
            block.code.push_str(code);
        }
    }

    /// In words, by line. What was cut off ends where syntax does not.
    pub(crate) fn warnings(&self, is_cut: bool) -> Vec<String> {
        let ends = Instant::now() + TIME;
        let mut warnings = Vec::new();
        for block in &self.blocks {
            // A session of an interpreter is no program.
            let Some(language) = block.language.filter(|_| !block.code.starts_with(">>>")) else {
                continue;
            };
            let left = ends.saturating_duration_since(Instant::now());
            let Some(report) = examine(&block.code, language, left, false) else {
                break;
            };
            let told = report.findings.iter().filter(|finding| match finding.issue {
                SYNTAX_ERROR => !is_cut,
                _ => language == Language::Python && finding.severity >= Severity::Warning,
            });
            warnings.extend(told.map(|finding| {
                format!("line {}: {}", block.first_line + finding.line + 1, finding.message)
            }));
        }
        let more = warnings.len().saturating_sub(MOST_WARNINGS);
        warnings.truncate(MOST_WARNINGS);
        if more > 0 {
            warnings.push(format!("and {more} more"));
        }
        warnings
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn warnings(asked: &str, blocks: &[(&str, &str)], is_cut: bool) -> Vec<String> {
        let mut inspector = Inspector::new(asked);
        for (number, (word, code)) in (1..).zip(blocks) {
            for piece in code.split_inclusive(' ') {
                inspector.take(number, word, piece);
            }
        }
        inspector.warnings(is_cut)
    }

    #[test]
    fn lines_are_those_of_the_blocks_one_after_the_other() {
        let blocks = [("python", "import os\nx = 1\n"), ("", "import os\nos.system(x)\n")];
        assert_eq!(
            warnings("python", &blocks, false),
            ["line 4: os.system runs its argument in a shell"]
        );
    }

    #[test]
    fn the_word_of_the_fence_wins_and_an_unknown_one_is_not_checked() {
        let broken = "def f(:\n";
        assert_eq!(
            warnings("python", &[("bash", broken), ("json", broken)], false),
            Vec::<String>::new()
        );
        assert!(!warnings("bash", &[("py", broken)], false).is_empty());
        assert_eq!(warnings("python", &[("", ">>> f(\n")], false), Vec::<String>::new());
    }

    #[test]
    fn an_answer_that_was_cut_has_no_syntax_errors_and_still_its_dangers() {
        let cut = [("python", "import os\nos.system(x)\ndef f(")];
        assert_eq!(warnings("python", &cut, true).len(), 1);
        assert_eq!(warnings("python", &cut, false).len(), 2);
    }

    #[test]
    fn other_languages_are_told_of_syntax_alone() {
        assert_eq!(warnings("js", &[("js", "eval(x);\n")], false), Vec::<String>::new());
        assert_eq!(warnings("js", &[("js", "let = = 1;\n")], false).len(), 1);
    }

    #[test]
    fn warnings_and_code_are_bounded() {
        let many = "eval(x)\n".repeat(30);
        let told = warnings("python", &[("python", &many)], false);
        assert_eq!((told.len(), told[10].as_str()), (11, "and 20 more"));
        let long = "eval(x)\n".repeat(LONGEST / 8 + 1);
        assert_eq!(warnings("python", &[("python", &long)], false), Vec::<String>::new());
    }
}
