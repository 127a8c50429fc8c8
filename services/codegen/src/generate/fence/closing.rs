//! Lines of a fenced block, one of which closes it.

use crate::generate::fence::container::{Container, Unquoted, skip_blank, skip_quotes};
use crate::generate::fence::info::{info_word, is_language, is_nested_info};
use crate::generate::fence::{LineEnd, LineKind, MAX_INDENT_LEN};
use crate::request::control_tokens::is_only_tokens;

/// What a block contains, by the word of its opening fence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum BlockContent {
    /// Markdown, which may contain fences of the same length.
    Markdown,
    /// The fence names no language.
    Unnamed,
    Code,
}

/// The opening fence of a block.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fence {
    marker: char,
    length: usize,
    container: Container,
    content: BlockContent,
    /// The number of open blocks in a Markdown block.
    depth: usize,
    /// The first line of code limits the column, because the fence follows text.
    is_after_text: bool,
}

impl Fence {
    pub(super) fn new(marker: char, length: usize, container: Container, word: &str) -> Fence {
        let content = match word.to_ascii_lowercase().as_str() {
            "markdown" | "md" => BlockContent::Markdown,
            "" => BlockContent::Unnamed,
            _ => BlockContent::Code,
        };
        Fence { marker, length, container, content, depth: 0, is_after_text: false }
    }

    /// The fence at the end of a line of text.
    pub(super) fn after_text(length: usize, container: Container, word: &str) -> Fence {
        Fence { is_after_text: true, ..Fence::new('`', length, container, word) }
    }

    /// The length of the backticks that can close the block at the end of a line of code.
    pub(super) fn inline_close_len(&self) -> Option<usize> {
        let can_close = self.marker == '`' && self.content != BlockContent::Markdown;
        can_close.then_some(self.length)
    }

    /// Whether a line without its line break begins with a fence that closes the block.
    pub(super) fn is_closed_by(&self, line: &str) -> bool {
        let body = line.trim_start_matches([' ', '\t', '>']).trim_end();
        let is_bare = body.chars().all(|letter| letter == self.marker);
        is_bare && body.len() >= self.length && self.depth == 0
    }

    /// Classifies a line of the block.
    pub(super) fn classify(&mut self, line: &str, end: LineEnd) -> LineKind {
        let from = match skip_quotes(line, self.container.quotes, end != LineEnd::Unknown) {
            Unquoted::Rest(from) => from,
            Unquoted::Partial => return LineKind::Undecided,
            Unquoted::Missing => return LineKind::Leave,
        };
        let rest = &line[from..];
        let (blank, column) = skip_blank(rest, 0, usize::MAX);
        let body = &rest[blank..];
        if self.is_after_text && !body.is_empty() {
            self.container.column = self.container.column.min(column);
            self.is_after_text = false;
        }
        if self.is_after_text && end == LineEnd::Unknown {
            return LineKind::Undecided;
        }
        let last = self.container.column;
        let text = LineKind::Text(from + skip_blank(rest, 0, last).0);
        if column > last + MAX_INDENT_LEN {
            return text;
        }
        if body.is_empty() {
            return if end == LineEnd::Unknown { LineKind::Undecided } else { text };
        }
        let after = body.trim_start_matches(self.marker);
        let length = body.len() - after.len();
        if length == 0 || (length < self.length && !after.is_empty()) || after.contains('`') {
            return text;
        }
        // After a fence of tildes, only white space and tokens can close.
        let can_close = self.marker == '`'
            || matches!(after.trim_start().chars().next(), None | Some('<' | '[' | ']'));
        match end {
            LineEnd::Unknown if can_close => LineKind::Undecided,
            LineEnd::Unknown => text,
            _ if length < self.length => text,
            _ => self.classify_closing(after, line.len() - after.len(), end).unwrap_or(text),
        }
    }

    /// Classifies a line by the text after a fence, which begins at this byte. `None`: the line is code.
    fn classify_closing(&mut self, after: &str, at: usize, end: LineEnd) -> Option<LineKind> {
        let is_known = end == LineEnd::Known;
        let after = after.trim();
        if is_only_tokens(after) {
            let is_nested = self.depth > 0;
            self.depth = self.depth.saturating_sub(1);
            return (is_known && !is_nested).then_some(LineKind::Close);
        }
        if self.marker == '~' {
            return None;
        }
        let is_info = is_known && is_nested_info(after);
        match self.content {
            BlockContent::Markdown if is_info => {
                self.depth += 1;
                None
            }
            BlockContent::Unnamed if is_info => None,
            _ if self.depth > 0 => None,
            BlockContent::Code if is_info && is_language(&info_word(after)) => {
                let word = info_word(after);
                Some(LineKind::Open(Fence::new('`', self.length, self.container, &word), word))
            }
            _ => Some(LineKind::CloseBefore(at)),
        }
    }
}
