//! Separates inline reasoning from a streamed answer, for engines without a reasoning parser. Reasoning stands
//! between tags such as `<think>` and `</think>` at the start of the output. Tags are removed, and so are white
//! space before the opening tag and one line break after the closing tag. All other bytes pass through in order.
//!
//! Some chat templates contain the opening tag, so the output begins inside of the reasoning: `Expect::Open`.
//! Otherwise a closing tag without an opening one shows it afterwards: `OutputPart::Reclassified`. In a fenced code
//! block, in quotation marks and in backticks, a closing tag is text.
//!
//! Tags elsewhere are text. Only a possible tag is held back, at most 128 bytes of it.

mod harmony;
mod quotes;
mod tags;

use crate::generate::code_block_tracker::CodeBlockTracker;
use crate::generate::think_tags::harmony::Header;
use crate::generate::think_tags::quotes::LineQuotes;
use crate::generate::think_tags::tags::{TagMatch, TagPair};

/// Most white space before the first tag, in bytes.
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
    /// In the answer, which a closing tag may turn into reasoning.
    Answer,
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
    quotes: LineQuotes,
    /// The opening tags in the answer without their closing tags.
    open_tags: u32,
    has_closed: bool,
}

impl ThinkTagSplitter {
    pub(crate) fn new(expect: Expect) -> ThinkTagSplitter {
        let (pending, blocks, quotes, open_tags, has_closed) = Default::default();
        ThinkTagSplitter {
            expect,
            state: State::Start,
            pending,
            blocks,
            quotes,
            open_tags,
            has_closed,
        }
    }

    /// All further text is the answer, for example because the engine separates the reasoning.
    pub(crate) fn set_answer_only(&mut self) {
        self.state = State::AfterReasoning;
    }

    /// Whether a closing tag, or the start of the final message, has ended the reasoning.
    pub(crate) fn has_closed(&self) -> bool {
        self.has_closed
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
                State::Answer => self.answer(text, is_last, emit),
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

    fn close(&mut self, length: usize) -> Step {
        self.has_closed = true;
        self.go_to(State::AfterTag, length)
    }

    fn start(&mut self, text: &str, is_last: bool) -> Step {
        let body = text.trim_start();
        let blank = text.len() - body.len();
        let without_tag = match self.expect {
            Expect::Detect => State::Answer,
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
            (.., TagMatch::Found(_, length)) => self.close(blank + length),
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
            Some((0, TagMatch::Found(_, length))) => self.close(length),
            found => {
                emit_before(OutputPart::Reasoning, found.map(|(at, _)| at), text, is_last, emit)
            }
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
            found => {
                emit_before(OutputPart::Reasoning, found.map(|(at, _)| at), text, is_last, emit)
            }
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
                self.has_closed = true;
                self.go_to(State::AfterReasoning, length)
            }
            Header::Complete { length, .. } => self.go_to(State::HarmonyMessage, length),
            Header::Partial if !is_last => Step::Hold,
            Header::Partial => emit_all(OutputPart::Reasoning, text, emit),
            Header::None => self.go_to(State::AfterReasoning, 0),
        }
    }

    fn answer(
        &mut self,
        text: &str,
        is_last: bool,
        emit: &mut impl FnMut(OutputPart, &str),
    ) -> Step {
        let Some((at, found)) = tags::find_any(text, &tags::all_tags()) else {
            return self.emit_answer(text, emit);
        };
        if at > 0 {
            return self.emit_answer(&text[..at], emit);
        }
        let TagMatch::Found(is_closing, length) = found else {
            return if is_last { self.emit_answer(text, emit) } else { Step::Hold };
        };
        if !is_closing {
            self.open_tags = self.open_tags.saturating_add(1);
            return self.emit_answer(&text[..length], emit);
        }
        let next = text[length..].chars().next();
        if next.is_none() && !is_last {
            return Step::Hold;
        }
        let is_quoted = self.blocks.is_in_block() || self.quotes.is_quoted(&text[length..]);
        if self.open_tags == 0 && (!is_quoted || self.blocks.is_after_closing_fence()) {
            emit(OutputPart::Reclassified, "");
            return self.close(length);
        }
        self.open_tags = self.open_tags.saturating_sub(1);
        self.emit_answer(&text[..length], emit)
    }

    fn emit_answer(&mut self, text: &str, emit: &mut impl FnMut(OutputPart, &str)) -> Step {
        self.blocks.push(text);
        self.quotes.push(text);
        emit_all(OutputPart::Answer, text, emit)
    }
}

/// Emits text up to a possible tag. At the end of the output, an incomplete tag is text.
fn emit_before(
    part: OutputPart,
    tag: Option<usize>,
    text: &str,
    is_last: bool,
    emit: &mut impl FnMut(OutputPart, &str),
) -> Step {
    match tag {
        Some(0) if !is_last => Step::Hold,
        Some(0) | None => emit_all(part, text, emit),
        Some(at) => emit_all(part, &text[..at], emit),
    }
}

fn emit_all(part: OutputPart, text: &str, emit: &mut impl FnMut(OutputPart, &str)) -> Step {
    emit(part, text);
    Step::Done(text.len())
}

#[cfg(test)]
mod tests;
