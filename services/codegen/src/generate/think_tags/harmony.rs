//! Messages of the harmony format of gpt-oss, in an output without its parser. Each has a header,
//! `<|start|>assistant<|channel|>analysis<|message|>`, and the first one lacks `<|start|>`. Only the message of
//! the channel `final` is the answer.
//! <https://developers.openai.com/cookbook/articles/openai-harmony>

use crate::generate::think_tags::tags::{TagMatch, find_any, match_any};

/// Longest header. A longer one is text.
const MAX_HEADER_BYTES: usize = 120;
const CHANNEL: &str = "<|channel|>";
const START: &str = "<|start|>";

/// What stands between two messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Header {
    /// A header of this length, and whether its message is the answer.
    Complete {
        length: usize,
        is_answer: bool,
    },
    Partial,
    /// No header.
    None,
}

/// Whether a text begins with a header.
pub(super) fn match_header_start(text: &str) -> TagMatch<()> {
    match_any(text, [((), CHANNEL), ((), START)].into_iter())
}

/// Reads the header at the start of a text.
pub(super) fn read_header(text: &str) -> Header {
    let body = text.trim_start();
    let is_short = text.len() <= MAX_HEADER_BYTES;
    match match_header_start(body) {
        TagMatch::Found((), _) => {}
        TagMatch::Partial if is_short => return Header::Partial,
        TagMatch::Partial | TagMatch::None => return Header::None,
    }
    let window = &text[..text.floor_char_boundary(MAX_HEADER_BYTES)];
    let Some((header, _)) = window.split_once("<|message|>") else {
        return if is_short { Header::Partial } else { Header::None };
    };
    let channel = header.rsplit_once(CHANNEL).map_or("final", |(_, channel)| channel);
    let length = header.len() + "<|message|>".len();
    Header::Complete { length, is_answer: channel.trim_start().starts_with("final") }
}

/// Finds the end of a message: its length, and that of the token that ends it. The start of the next header is
/// no part of that.
pub(super) fn find_message_end(text: &str) -> Option<(usize, TagMatch<bool>)> {
    let ends = [
        (true, "<|end|>"),
        (true, "<|return|>"),
        (true, "<|call|>"),
        (false, START),
        (false, CHANNEL),
    ];
    find_any(text, &ends.into_iter())
}
