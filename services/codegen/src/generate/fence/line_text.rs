//! A line that does not begin with a fence, and may end in one.

use crate::generate::fence::closing::Fence;
use crate::generate::fence::container::Container;
use crate::generate::fence::info::{info_word, is_info, is_info_char};
use crate::generate::fence::{MAX_FENCE_LINE_LEN, MIN_FENCE_LEN};

/// With these a comment begins. Documentation in comments contains fences: `/// ```rust`.
const COMMENT_MARKERS: [char; 10] = ['/', '*', '#', '!', ';', '%', '>', '-', '+', '|'];

/// What the emitted text of the current line shows.
#[derive(Debug, Default)]
pub(super) struct LineText {
    container: Container,
    /// The first character that is no white space.
    first: Option<char>,
    /// It contains more than markers of comments.
    has_words: bool,
    /// The last three characters.
    last: [char; 3],
    /// No fence can follow, for example because the line contains inline code.
    is_plain: bool,
}

/// What a line contains from a backtick on.
pub(super) enum LineTail {
    /// A fence. The line break begins at this byte.
    Fence(usize),
    Text,
    /// The rest of the line is needed.
    Undecided,
}

impl LineText {
    pub(super) fn new(container: Container) -> LineText {
        LineText { container, ..LineText::default() }
    }

    /// A line in which no fence can follow.
    pub(super) fn plain() -> LineText {
        LineText { is_plain: true, ..LineText::default() }
    }

    pub(super) fn is_plain(&self) -> bool {
        self.is_plain
    }

    pub(super) fn set_plain(&mut self) {
        self.is_plain = true;
    }

    /// Adds text of the line.
    pub(super) fn push(&mut self, text: &str) {
        if self.is_plain {
            return;
        }
        self.first = self.first.or_else(|| text.trim_start().chars().next());
        let is_word = |letter: char| !letter.is_whitespace() && !COMMENT_MARKERS.contains(&letter);
        self.has_words = self.has_words || text.contains(is_word);
        let skipped = text.char_indices().rev().nth(2).map_or(0, |(at, _)| at);
        for letter in text[skipped..].chars() {
            self.last = [self.last[1], self.last[2], letter];
        }
    }

    /// Classifies the rest of the line, which begins with a backtick. `close_len`: the length of the backticks that
    /// close the open block.
    pub(super) fn classify(&self, rest: &str, close_len: Option<usize>, is_last: bool) -> LineTail {
        let line = rest.strip_suffix('\n').unwrap_or(rest);
        let line = line.strip_suffix('\r').unwrap_or(line);
        let after = line.trim_start_matches('`');
        let length = line.len() - after.len();
        let is_short = length < close_len.unwrap_or(MIN_FENCE_LEN);
        if line.len() > MAX_FENCE_LINE_LEN || !self.has_words {
            return LineTail::Text;
        }
        if after.is_empty() && !is_last && !rest.ends_with('\n') {
            return LineTail::Undecided;
        }
        let is_possible = match close_len {
            Some(_) => after.trim().is_empty() && self.can_close(),
            None => after.chars().all(is_info_char),
        };
        let is_complete = rest.ends_with('\n');
        match close_len {
            _ if is_short || !is_possible => LineTail::Text,
            Some(_) if is_complete || is_last => LineTail::Fence(line.len()),
            None if is_complete && is_info(after) => LineTail::Fence(line.len()),
            None if is_complete || is_last => LineTail::Text,
            _ => LineTail::Undecided,
        }
    }

    /// The block that the fence at the end of this line opens, and its language.
    pub(super) fn open(&self, rest: &str) -> (Fence, String) {
        let info = rest.trim_start_matches('`');
        let word = info_word(info);
        (Fence::after_text(rest.len() - info.len(), self.container, &word), word)
    }

    /// Whether backticks at the end of this line of code close its block. In a comment, and at the start of a text
    /// in three quotation marks, they are code.
    fn can_close(&self) -> bool {
        let is_comment = self.first.is_some_and(|first| COMMENT_MARKERS.contains(&first));
        let is_in_comment = is_comment && self.last[2].is_whitespace();
        let is_after_quotes = matches!(self.last, ['"', '"', '"'] | ['\'', '\'', '\'']);
        !is_in_comment && !is_after_quotes
    }
}
