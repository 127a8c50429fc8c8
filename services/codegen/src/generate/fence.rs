//! Splits a streamed answer into code and explanation at its Markdown code blocks: fences as CommonMark defines
//! them, in list items and block quotes too, and HTML blocks `<pre><code>`.
//! <https://spec.commonmark.org/0.31.2/#fenced-code-blocks>
//!
//! The texts, joined, are byte for byte the answer, except for:
//! * lines that open or close a block, and fences at the end of other lines,
//! * in a block, the indentation of its opening fence and the `>` of its block quotes,
//! * in an HTML block, entities, which are decoded.
//!
//! Models often indent a list's blocks by another width than its items. Therefore a fence in a list may have any
//! indentation, and code may be indented less than its fence. A fence closes also before a control token.
//!
//! Models also forget line breaks around fences of backticks, unlike `CommonMark`:
//! * "Here it is:```py" opens a block if the line contains no other backticks. Its line break is explanation.
//! * "```This prints 1." closes a block, and the rest of the line is explanation.
//! * "print(1)```" closes a block, and its line break is code. Lines of comments and Markdown are excepted.
//! * "```js" in a block of a named language closes it and opens the next one, if the word is a language. In a block
//!   without a name it is code. In a Markdown block it opens an inner block, which the next bare fence closes.
//!
//! Text is emitted as soon as it cannot belong to such a line, so at most 200 bytes are held back.

mod closing;
mod container;
mod html;
mod info;
mod line_text;
mod opening;

use hapa_proto::codegen::v1::stream_generate_code_response::Kind;

use crate::generate::fence::closing::Fence;
use crate::generate::fence::container::{Container, read_prefix};
use crate::generate::fence::html::HtmlMatch;
use crate::generate::fence::line_text::{LineTail, LineText};
use crate::generate::fence::opening::ListContext;

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
    /// The text of the current line that may be a fence, or possible markup of an HTML block, or else "".
    pending: String,
    position: LinePosition,
    /// The emitted text of the current line.
    line_text: LineText,
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

/// How the rest of the current line is read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum LinePosition {
    /// The line may begin with a fence.
    #[default]
    Start,
    /// The line may end in a fence.
    Middle,
    /// The rest of the line belongs to its fence.
    InFence,
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
    /// A fence opens a block in this language. It also closes an open block.
    Open(Fence, String),
    /// Tags of this length open a block in this language.
    OpenHtml(usize, String),
    Close,
    /// The fence before this byte closes the block, and the rest of the line is text.
    CloseBefore(usize),
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
            return;
        }
        if self.position == LinePosition::Start && !self.pending.is_empty() {
            self.resolve_pending(true, emit);
        }
        let pending = std::mem::take(&mut self.pending);
        self.push_middle(&pending, true, emit);
    }

    /// Whether the text so far ends inside of a block. A line that may yet be a fence does not count.
    pub(crate) fn is_in_block(&self) -> bool {
        self.open_block.is_some()
    }

    /// Whether the text so far ends in a fence that closes a block, if nothing else follows on its line.
    pub(crate) fn is_after_closing_fence(&self) -> bool {
        let Some(OpenBlock::Fenced(fence)) = self.open_block else { return false };
        !self.pending.is_empty() && fence.is_closed_by(&self.pending)
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
        match self.position {
            LinePosition::Start => {
                self.pending.push_str(line);
                self.resolve_pending(end.is_some(), emit);
            }
            LinePosition::Middle if self.pending.is_empty() => self.push_middle(line, false, emit),
            LinePosition::Middle => {
                let mut joined = std::mem::take(&mut self.pending);
                joined.push_str(line);
                self.push_middle(&joined, false, emit);
            }
            LinePosition::InFence if end.is_some() => self.position = LinePosition::Start,
            LinePosition::InFence => {}
        }
        line.len()
    }

    /// Adds text of a line that does not begin with a fence, up to the end of the line.
    fn push_middle(&mut self, text: &str, is_last: bool, emit: &mut impl FnMut(Segment<'_>, &str)) {
        let at = memchr::memchr(b'`', text.as_bytes()).filter(|_| !self.line_text.is_plain());
        let (before, rest) = text.split_at(at.unwrap_or(text.len()));
        self.emit_text(before, emit);
        if rest.is_empty() {
            return;
        }
        let close_len = match self.open_block {
            Some(OpenBlock::Fenced(fence)) => Some(fence.inline_close_len().unwrap_or(usize::MAX)),
            _ => None,
        };
        match self.line_text.classify(rest, close_len, is_last) {
            LineTail::Undecided => rest.clone_into(&mut self.pending),
            LineTail::Text => {
                self.line_text.set_plain();
                self.emit_text(rest, emit);
            }
            LineTail::Fence(length) => {
                let (fence, line_break) = rest.split_at(length);
                self.emit_text(line_break, emit);
                if self.open_block.take().is_none() {
                    let (fence, info_word) = self.line_text.open(fence);
                    self.start_block(OpenBlock::Fenced(fence), info_word);
                }
            }
        }
    }

    /// Emits text of a line that does not begin with a fence.
    fn emit_text(&mut self, text: &str, emit: &mut impl FnMut(Segment<'_>, &str)) {
        if text.is_empty() {
            return;
        }
        self.line_text.push(text);
        let is_complete = text.ends_with('\n');
        self.position = if is_complete { LinePosition::Start } else { LinePosition::Middle };
        emit(self.segment(), text);
    }

    /// Drops a line break after tags.
    fn push_after_tag(&mut self, text: &str) -> usize {
        if text.starts_with('\r') {
            return 1;
        }
        self.is_after_tag = false;
        let has_break = text.starts_with('\n');
        if self.open_block.is_none() && !has_break {
            (self.position, self.line_text) = (LinePosition::Middle, LineText::plain());
        }
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
                    // A long line can be a fence before its end.
                    if !is_complete {
                        self.position = LinePosition::InFence;
                    }
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
                LineKind::CloseBefore(from) => {
                    self.open_block = None;
                    return self.pass_pending(from, LineText::plain(), emit);
                }
                LineKind::Leave => {
                    self.open_block = None;
                    continue;
                }
                LineKind::Text(from) => {
                    let container = match self.open_block {
                        None => read_prefix(&self.pending).container,
                        Some(_) => Container::default(),
                    };
                    return self.pass_pending(from, LineText::new(container), emit);
                }
                LineKind::Undecided => return,
            }
            return self.pending.clear();
        }
    }

    /// Passes on the pending line from this byte as text.
    fn pass_pending(
        &mut self,
        from: usize,
        line_text: LineText,
        emit: &mut impl FnMut(Segment<'_>, &str),
    ) {
        let line = std::mem::take(&mut self.pending);
        (self.position, self.line_text) = (LinePosition::Middle, line_text);
        self.push_middle(&line[from..], false, emit);
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
        match &mut self.open_block {
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

#[cfg(test)]
mod tests;
