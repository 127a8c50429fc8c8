//! Splits a streamed answer into code and explanation at its Markdown code blocks: fences as CommonMark defines
//! them, in list items and block quotes too, and HTML blocks `<pre><code>`.
//! <https://spec.commonmark.org/0.31.2/#fenced-code-blocks>
//!
//! The texts, joined, are byte for byte the answer, except for:
//! * lines that open or close a block,
//! * in a block, the indentation of its opening fence and the `>` of its block quotes,
//! * in an HTML block, entities, which are decoded.
//!
//! Models often indent a list's blocks by another width than its items. Therefore a fence in a list may have any
//! indentation, and code may be indented less than its fence. A fence closes also before a control token.
//!
//! Text is emitted as soon as it cannot belong to such a line, so at most 200 bytes are held back.

mod container;
mod html;
mod info;

use hapa_proto::codegen::v1::stream_generate_code_response::Kind;

use crate::generate::fence::container::{
    Container, LinePrefix, Unquoted, read_prefix, skip_blank, skip_quotes,
};
use crate::generate::fence::html::HtmlMatch;
use crate::generate::fence::info::info_word;
use crate::request::control_tokens::is_only_tokens;

/// Longest line that can be a fence. Longer lines are not held back.
const MAX_FENCE_LINE_LEN: usize = 200;
/// Shortest fence.
const MIN_FENCE_LEN: usize = 3;
/// Deepest indentation of a fence outside of lists. Deeper lines are indented code.
const MAX_INDENT_LEN: usize = 3;

/// The position of a piece of text in the answer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Segment<'s> {
    pub(crate) kind: Kind,
    /// The number of the code block, from 1. For explanation, the number of the previous block.
    pub(crate) block: usize,
    /// The language that the block's opening fence names. "": there is none.
    pub(crate) info_word: &'s str,
}

/// The state of the splitter between two pieces of the answer.
#[derive(Debug, Default)]
pub(crate) struct FenceSplitter {
    /// The number of opened blocks.
    block_count: usize,
    /// The language of the last block.
    info_word: String,
    /// The current line while it may be a fence, or possible markup of an HTML block, or else "".
    pending: String,
    /// The current line is no fence, so its rest passes through.
    is_mid_line: bool,
    /// HTML tags end here, and a line break after them belongs to them.
    is_after_tag: bool,
    lists: ListContext,
    open_block: Option<OpenBlock>,
}

#[derive(Clone, Copy, Debug)]
enum OpenBlock {
    Fenced(Fence),
    Html,
}

/// The opening fence of a block.
#[derive(Clone, Copy, Debug)]
struct Fence {
    marker: char,
    length: usize,
    container: Container,
}

/// Whether the current line may belong to a list item.
#[derive(Debug, Default)]
struct ListContext {
    is_in_list: bool,
    is_after_blank: bool,
}

/// Where the text of a line ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LineEnd {
    Known,
    /// More text of the line may follow.
    Unknown,
    /// The line is too long for a fence, and its start alone is known.
    TooFar,
}

enum LineKind {
    Open(Fence, String),
    /// Tags of this length open a block in this language.
    OpenHtml(usize, String),
    Close,
    /// The line has left the block quote of the block, and is to be read again.
    Leave,
    /// Text, without its first bytes.
    Text(usize),
    /// The rest of the line is needed.
    Undecided,
}

impl FenceSplitter {
    /// Adds a piece of the answer and emits all text that certainly is code or explanation.
    pub(crate) fn push(&mut self, text: &str, emit: &mut impl FnMut(Segment<'_>, &str)) {
        if matches!(self.open_block, Some(OpenBlock::Html)) && !self.pending.is_empty() {
            let mut joined = std::mem::take(&mut self.pending);
            joined.push_str(text);
            return self.advance(&joined, false, emit);
        }
        self.advance(text, false, emit);
    }

    /// Emits the held-back text at the end of the answer.
    pub(crate) fn end(&mut self, emit: &mut impl FnMut(Segment<'_>, &str)) {
        if matches!(self.open_block, Some(OpenBlock::Html)) {
            let pending = std::mem::take(&mut self.pending);
            self.advance(&pending, true, emit);
        } else if !self.pending.is_empty() {
            self.resolve_pending(true, emit);
        }
    }

    fn advance(&mut self, mut text: &str, is_last: bool, emit: &mut impl FnMut(Segment<'_>, &str)) {
        while !text.is_empty() {
            let length = match self.open_block {
                _ if self.is_after_tag => self.push_after_tag(text),
                Some(OpenBlock::Html) => self.push_html(text, is_last, emit),
                _ => self.push_line(text, emit),
            };
            text = &text[length..];
        }
    }

    /// Adds text up to the end of its line. Returns its length.
    fn push_line(&mut self, text: &str, emit: &mut impl FnMut(Segment<'_>, &str)) -> usize {
        let end = memchr::memchr(b'\n', text.as_bytes());
        let line = &text[..end.map_or(text.len(), |at| at + 1)];
        if self.is_mid_line {
            emit(self.segment(), line);
            self.is_mid_line = end.is_none();
        } else {
            self.pending.push_str(line);
            self.resolve_pending(end.is_some(), emit);
        }
        line.len()
    }

    /// Drops a line break after tags.
    fn push_after_tag(&mut self, text: &str) -> usize {
        if text.starts_with('\r') {
            return 1;
        }
        self.is_after_tag = false;
        let has_break = text.starts_with('\n');
        self.is_mid_line = self.open_block.is_none() && !has_break;
        usize::from(has_break)
    }

    /// Adds text of an HTML block up to its next markup. Returns the length of what is done.
    fn push_html(
        &mut self,
        text: &str,
        is_last: bool,
        emit: &mut impl FnMut(Segment<'_>, &str),
    ) -> usize {
        let at = memchr::memchr2(b'<', b'&', text.as_bytes()).unwrap_or(text.len());
        if at > 0 {
            emit(self.segment(), &text[..at]);
            return at;
        }
        match html::match_markup(text) {
            HtmlMatch::Found(Some(decoded), length) => {
                emit(self.segment(), decoded);
                length
            }
            HtmlMatch::Found(None, length) => {
                (self.open_block, self.is_after_tag) = (None, true);
                length
            }
            HtmlMatch::Partial if !is_last => {
                text.clone_into(&mut self.pending);
                text.len()
            }
            HtmlMatch::Partial | HtmlMatch::None => {
                emit(self.segment(), &text[..1]);
                1
            }
        }
    }

    fn resolve_pending(&mut self, is_complete: bool, emit: &mut impl FnMut(Segment<'_>, &str)) {
        loop {
            match self.classify(is_complete) {
                LineKind::Open(fence, info_word) => {
                    self.start_block(OpenBlock::Fenced(fence), info_word);
                }
                LineKind::OpenHtml(length, info_word) => {
                    let rest = self.pending.split_off(length);
                    self.start_block(OpenBlock::Html, info_word);
                    self.is_after_tag = true;
                    self.pending.clear();
                    // Another block cannot start on this line, so this does not recur.
                    return self.advance(&rest, false, emit);
                }
                LineKind::Close => self.open_block = None,
                LineKind::Leave => {
                    self.open_block = None;
                    continue;
                }
                LineKind::Text(from) => {
                    if from < self.pending.len() {
                        emit(self.segment(), &self.pending[from..]);
                    }
                    self.is_mid_line = !is_complete;
                }
                LineKind::Undecided => return,
            }
            return self.pending.clear();
        }
    }

    fn classify(&mut self, is_complete: bool) -> LineKind {
        let line = self.pending.strip_suffix('\n').unwrap_or(&self.pending);
        let line = line.strip_suffix('\r').unwrap_or(line);
        // The start of a long line decides alone, however much of it has arrived.
        let is_long = line.len() > MAX_FENCE_LINE_LEN;
        let line = &line[..line.floor_char_boundary(MAX_FENCE_LINE_LEN)];
        let end = match (is_long, is_complete) {
            (true, _) => LineEnd::TooFar,
            (false, true) => LineEnd::Known,
            (false, false) => LineEnd::Unknown,
        };
        match self.open_block {
            Some(OpenBlock::Fenced(fence)) => fence.classify(line, end),
            _ => self.lists.classify(line, end),
        }
    }

    fn start_block(&mut self, block: OpenBlock, info_word: String) {
        self.open_block = Some(block);
        self.block_count += 1;
        self.info_word = info_word;
    }

    fn segment(&self) -> Segment<'_> {
        let kind = if self.open_block.is_some() { Kind::Code } else { Kind::Explanation };
        Segment { kind, block: self.block_count, info_word: &self.info_word }
    }
}

impl ListContext {
    /// Classifies a line outside of code.
    fn classify(&mut self, line: &str, end: LineEnd) -> LineKind {
        let prefix = read_prefix(line);
        if prefix.is_partial && end == LineEnd::Unknown {
            return LineKind::Undecided;
        }
        let column = prefix.container.column;
        if self.is_in_list || prefix.has_list_marker || column <= MAX_INDENT_LEN {
            match classify_opening(line, &prefix, end) {
                LineKind::Text(_) => {}
                kind => return kind,
            }
        }
        let is_blank = prefix.body.is_empty() && !prefix.has_list_marker;
        if prefix.has_list_marker {
            self.is_in_list = true;
        } else if !is_blank && column == 0 && (self.is_after_blank || line.starts_with('#')) {
            self.is_in_list = false;
        }
        self.is_after_blank = is_blank;
        LineKind::Text(0)
    }
}

/// Classifies a line that may open a block.
fn classify_opening(line: &str, prefix: &LinePrefix<'_>, end: LineEnd) -> LineKind {
    let (body, container) = (prefix.body, prefix.container);
    let Some(marker) = body.chars().next().filter(|marker| matches!(marker, '`' | '~')) else {
        return classify_tags(line, prefix, end);
    };
    let after = body.trim_start_matches(marker);
    let length = body.len() - after.len();
    // A backtick after the fence makes the line inline code.
    let is_inline = marker == '`' && after.contains('`');
    let is_fence = length >= MIN_FENCE_LEN && !is_inline;
    match end {
        LineEnd::Known if is_fence => {
            LineKind::Open(Fence { marker, length, container }, info_word(after))
        }
        LineEnd::Unknown if is_fence || after.is_empty() => LineKind::Undecided,
        _ => LineKind::Text(0),
    }
}

/// Classifies a line that may begin with the tags of an HTML block.
fn classify_tags(line: &str, prefix: &LinePrefix<'_>, end: LineEnd) -> LineKind {
    if prefix.container.quotes > 0 {
        return LineKind::Text(0);
    }
    match html::match_open(prefix.body) {
        HtmlMatch::Found(info_word, length) => {
            LineKind::OpenHtml(line.len() - prefix.body.len() + length, info_word)
        }
        HtmlMatch::Partial if end == LineEnd::Unknown => LineKind::Undecided,
        HtmlMatch::Partial | HtmlMatch::None => LineKind::Text(0),
    }
}

impl Fence {
    /// Classifies a line of the block that this fence has opened.
    fn classify(&self, line: &str, end: LineEnd) -> LineKind {
        let from = match skip_quotes(line, self.container.quotes, end != LineEnd::Unknown) {
            Unquoted::Rest(from) => from,
            Unquoted::Partial => return LineKind::Undecided,
            Unquoted::Missing => return LineKind::Leave,
        };
        let (rest, last) = (&line[from..], self.container.column);
        let text = LineKind::Text(from + skip_blank(rest, 0, last).0);
        let (blank, column) = skip_blank(rest, 0, usize::MAX);
        let body = &rest[blank..];
        if column > last + MAX_INDENT_LEN {
            return text;
        }
        if body.is_empty() {
            return if end == LineEnd::Unknown { LineKind::Undecided } else { text };
        }
        let after = body.trim_start_matches(self.marker);
        let length = body.len() - after.len();
        if length == 0 || (length < self.length && !after.is_empty()) {
            return text;
        }
        let after = after.trim_start();
        match end {
            LineEnd::Unknown if after.is_empty() || after.starts_with(['<', '[']) => {
                LineKind::Undecided
            }
            LineEnd::Known if length >= self.length && is_only_tokens(after) => LineKind::Close,
            _ => text,
        }
    }
}

#[cfg(test)]
mod tests;
