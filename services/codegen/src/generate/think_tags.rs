//! Separates inline reasoning from a streamed answer, for engines without a reasoning parser. Reasoning stands
//! between tags such as `<think>` and `</think>` at the start of the output. Tags are removed, and so are white
//! space before the opening tag and one line break after the closing tag. All other bytes pass through in order.
//!
//! Some chat templates contain the opening tag, so the output begins inside of the reasoning: `Expect::Open`.
//! Otherwise a closing tag on a line of its own shows it afterwards: `OutputPart::Reclassified`.
//!
//! Tags elsewhere are text. Only a possible tag is held back, at most 128 bytes of it.

mod harmony;
mod tags;

use crate::generate::code_block_tracker::CodeBlockTracker;
use crate::generate::think_tags::harmony::Header;
use crate::generate::think_tags::tags::{TagMatch, TagPair};

/// Most white space around a tag on its line, in bytes.
const MAX_BLANK_LEN: usize = 32;

/// Where the output begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Expect {
    /// In the answer, unless it starts with an opening tag.
    Detect,
    /// Inside of the reasoning, because the chat template contains the opening tag.
    Open,
}

/// What a text is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OutputPart {
    Reasoning,
    Answer,
    /// All text so far was reasoning, although it was emitted as `Answer`. The text is empty.
    Reclassified,
}

#[derive(Clone, Copy, Debug)]
enum State {
    /// Only white space has arrived.
    Start,
    /// In reasoning. `None`: no tag has opened it, so any tag closes it.
    Reasoning(Option<&'static TagPair>),
    /// Directly after a closing tag, where one line break is dropped.
    AfterTag,
    /// In a harmony message that is not the answer.
    HarmonyMessage,
    /// Between two harmony messages.
    HarmonyHeader,
    /// In the answer, at the start of a line that may be a closing tag.
    LineStart,
    /// In the answer, within a line.
    MidLine,
    /// In the answer, after the reasoning. Tags have no meaning any more.
    AfterReasoning,
}

/// What a step has done with the text.
enum Step {
    /// This many bytes are processed.
    Done(usize),
    /// More text is needed.
    Hold,
}

/// The state of the splitter between two pieces of the output.
#[derive(Debug)]
pub(crate) struct ThinkTagSplitter {
    expect: Expect,
    state: State,
    /// A possible tag.
    pending: String,
    blocks: CodeBlockTracker,
    /// Lines of the answer that are opening tags, without their closing tags.
    open_tags: u32,
}

impl ThinkTagSplitter {
    pub(crate) fn new(expect: Expect) -> ThinkTagSplitter {
        let (pending, blocks) = Default::default();
        ThinkTagSplitter { expect, state: State::Start, pending, blocks, open_tags: 0 }
    }

    /// Adds a piece of the output and emits all text of which the part is certain.
    pub(crate) fn push(&mut self, text: &str, emit: &mut impl FnMut(OutputPart, &str)) {
        if self.pending.is_empty() {
            return self.advance(text, false, emit);
        }
        let mut joined = std::mem::take(&mut self.pending);
        joined.push_str(text);
        self.advance(&joined, false, emit);
    }

    /// Emits the held-back text at the end of the output.
    pub(crate) fn end(&mut self, emit: &mut impl FnMut(OutputPart, &str)) {
        let pending = std::mem::take(&mut self.pending);
        self.advance(&pending, true, emit);
    }

    /// Whether the text so far ends in reasoning that no tag has closed.
    pub(crate) fn is_in_reasoning(&self) -> bool {
        match self.state {
            State::Start => self.expect == Expect::Open,
            State::Reasoning(_) | State::HarmonyMessage | State::HarmonyHeader => true,
            _ => false,
        }
    }

    fn advance(&mut self, mut text: &str, is_last: bool, emit: &mut impl FnMut(OutputPart, &str)) {
        while !text.is_empty() {
            let step = match self.state {
                State::Start => self.start(text, is_last),
                State::Reasoning(pair) => self.reasoning(pair, text, is_last, emit),
                State::AfterTag => self.after_tag(text, is_last),
                State::HarmonyMessage => self.harmony_message(text, is_last, emit),
                State::HarmonyHeader => self.harmony_header(text, is_last, emit),
                State::LineStart => self.line_start(text, is_last, emit),
                State::MidLine => self.mid_line(text, emit),
                State::AfterReasoning => {
                    emit(OutputPart::Answer, text);
                    Step::Done(text.len())
                }
            };
            match step {
                Step::Done(length) => text = &text[length..],
                Step::Hold => {
                    text.clone_into(&mut self.pending);
                    return;
                }
            }
        }
    }

    fn go_to(&mut self, state: State, length: usize) -> Step {
        self.state = state;
        Step::Done(length)
    }

    fn start(&mut self, text: &str, is_last: bool) -> Step {
        let body = text.trim_start();
        let blank = text.len() - body.len();
        let without_tag = match self.expect {
            Expect::Detect => State::LineStart,
            Expect::Open => State::Reasoning(None),
        };
        if blank > MAX_BLANK_LEN {
            return self.go_to(without_tag, 0);
        }
        let opening = tags::match_opening(body);
        let header = harmony::match_header_start(body);
        // The reasoning is empty if the output begins with its closing tag.
        let closing = tags::match_closing(body);
        let is_partial = body.is_empty()
            || opening == TagMatch::Partial
            || header == TagMatch::Partial
            || closing == TagMatch::Partial;
        match (opening, header, closing) {
            (TagMatch::Found(pair, length), ..) => {
                self.go_to(State::Reasoning(Some(pair)), blank + length)
            }
            (_, TagMatch::Found(..), _) => self.go_to(State::HarmonyHeader, blank),
            (.., TagMatch::Found(_, length)) => self.go_to(State::AfterTag, blank + length),
            _ if is_partial && !is_last => Step::Hold,
            _ => self.go_to(without_tag, 0),
        }
    }

    fn reasoning(
        &mut self,
        pair: Option<&'static TagPair>,
        text: &str,
        is_last: bool,
        emit: &mut impl FnMut(OutputPart, &str),
    ) -> Step {
        let found = match pair {
            Some(pair) => tags::find_any(text, &std::iter::once((pair, pair.close))),
            None => tags::find_any(text, &tags::closing_tags()),
        };
        match found {
            Some((0, TagMatch::Found(_, length))) => self.go_to(State::AfterTag, length),
            found => emit_reasoning(found.map(|(at, _)| at), text, is_last, emit),
        }
    }

    fn after_tag(&mut self, text: &str, is_last: bool) -> Step {
        match text {
            "\r" if !is_last => Step::Hold,
            text if text.starts_with("\r\n") => self.go_to(State::AfterReasoning, 2),
            text => self.go_to(State::AfterReasoning, usize::from(text.starts_with('\n'))),
        }
    }

    fn harmony_message(
        &mut self,
        text: &str,
        is_last: bool,
        emit: &mut impl FnMut(OutputPart, &str),
    ) -> Step {
        match harmony::find_message_end(text) {
            Some((0, TagMatch::Found(is_end, length))) => {
                self.go_to(State::HarmonyHeader, if is_end { length } else { 0 })
            }
            found => emit_reasoning(found.map(|(at, _)| at), text, is_last, emit),
        }
    }

    fn harmony_header(
        &mut self,
        text: &str,
        is_last: bool,
        emit: &mut impl FnMut(OutputPart, &str),
    ) -> Step {
        match harmony::read_header(text) {
            Header::Complete { length, is_answer: true } => {
                self.go_to(State::AfterReasoning, length)
            }
            Header::Complete { length, .. } => self.go_to(State::HarmonyMessage, length),
            Header::Partial if !is_last => Step::Hold,
            Header::Partial => emit_all(OutputPart::Reasoning, text, emit),
            Header::None => self.go_to(State::AfterReasoning, 0),
        }
    }

    fn line_start(
        &mut self,
        text: &str,
        is_last: bool,
        emit: &mut impl FnMut(OutputPart, &str),
    ) -> Step {
        let body = text.trim_start_matches([' ', '\t']);
        let blank = text.len() - body.len();
        let closing = tags::match_closing(body);
        let opening = tags::match_opening(body);
        let is_partial =
            body.is_empty() || closing == TagMatch::Partial || opening == TagMatch::Partial;
        if blank <= MAX_BLANK_LEN && is_partial && !is_last {
            return Step::Hold;
        }
        if let TagMatch::Found(_, length) = closing
            && blank <= MAX_BLANK_LEN
        {
            let after = body[length..].trim_start_matches([' ', '\t', '\r']);
            let trailing = body.len() - length - after.len();
            if after.is_empty() && !is_last && trailing <= MAX_BLANK_LEN {
                return Step::Hold;
            }
            if trailing <= MAX_BLANK_LEN
                && (after.is_empty() || after.starts_with('\n'))
                && !self.blocks.is_in_block()
                && self.open_tags == 0
            {
                emit(OutputPart::Reclassified, "");
                return self.go_to(State::AfterTag, blank + length + trailing);
            }
            self.open_tags = self.open_tags.saturating_sub(1);
        }
        let is_opening = matches!(opening, TagMatch::Found(..)) && blank <= MAX_BLANK_LEN;
        self.open_tags += u32::from(is_opening);
        self.go_to(State::MidLine, 0)
    }

    fn mid_line(&mut self, text: &str, emit: &mut impl FnMut(OutputPart, &str)) -> Step {
        let end = memchr::memchr(b'\n', text.as_bytes());
        let line = &text[..end.map_or(text.len(), |at| at + 1)];
        self.blocks.push(line);
        emit(OutputPart::Answer, line);
        self.go_to(if end.is_some() { State::LineStart } else { State::MidLine }, line.len())
    }
}

/// Emits reasoning up to a possible tag. At the end of the output, an incomplete tag is text.
fn emit_reasoning(
    tag: Option<usize>,
    text: &str,
    is_last: bool,
    emit: &mut impl FnMut(OutputPart, &str),
) -> Step {
    match tag {
        Some(0) if !is_last => Step::Hold,
        Some(0) | None => emit_all(OutputPart::Reasoning, text, emit),
        Some(at) => emit_all(OutputPart::Reasoning, &text[..at], emit),
    }
}

fn emit_all(part: OutputPart, text: &str, emit: &mut impl FnMut(OutputPart, &str)) -> Step {
    emit(part, text);
    Step::Done(text.len())
}

#[cfg(test)]
mod tests;
