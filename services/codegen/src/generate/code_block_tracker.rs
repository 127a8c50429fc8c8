//! Tracks whether a growing answer is inside of a fenced code block. It decides by whole lines and accepts
//! every container that `fence` accepts, but reports no texts.

/// Shortest fence.
const MIN_FENCE_LEN: usize = 3;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum LinePhase {
    /// White space and markers of lists and quotes.
    #[default]
    Container,
    /// The characters of a possible fence.
    Run,
    /// The info string.
    Info,
    /// The line is no fence.
    Text,
}

/// The state after the text so far.
#[derive(Debug, Default)]
pub(crate) struct CodeBlockTracker {
    /// Marker and length of the fence of the open block.
    open: Option<(u8, usize)>,
    phase: LinePhase,
    marker: u8,
    length: usize,
    /// The fence has no info string, so it can close a block.
    is_bare: bool,
}

impl CodeBlockTracker {
    pub(crate) fn push(&mut self, text: &str) {
        let mut bytes = text.as_bytes();
        while let Some((byte, rest)) = bytes.split_first() {
            if self.phase == LinePhase::Text {
                let Some(at) = memchr::memchr(b'\n', bytes) else { return };
                self.phase = LinePhase::Container;
                bytes = &bytes[at + 1..];
            } else {
                self.step(*byte);
                bytes = rest;
            }
        }
    }

    /// Whether an earlier line has opened a block that no line has closed.
    pub(crate) fn is_in_block(&self) -> bool {
        self.open.is_some()
    }

    /// Whether the current line consists of a fence without info string.
    pub(crate) fn is_after_fence(&self) -> bool {
        self.phase == LinePhase::Run && self.length >= MIN_FENCE_LEN
    }

    fn step(&mut self, byte: u8) {
        match (self.phase, byte) {
            (_, b'\n') => self.end_line(),
            (LinePhase::Container, b'`' | b'~') => {
                (self.phase, self.marker, self.length) = (LinePhase::Run, byte, 1);
                self.is_bare = true;
            }
            (LinePhase::Container, byte) => {
                let is_container = byte.is_ascii_digit() || b" \t\r>-*+.)".contains(&byte);
                if !is_container {
                    self.phase = LinePhase::Text;
                }
            }
            (LinePhase::Run, byte) if byte == self.marker => self.length += 1,
            (LinePhase::Run, _) if self.length < MIN_FENCE_LEN => self.phase = LinePhase::Text,
            (LinePhase::Info, b'`') if self.marker == b'`' => self.phase = LinePhase::Text,
            (_, byte) => {
                self.phase = LinePhase::Info;
                self.is_bare &= byte.is_ascii_whitespace();
            }
        }
    }

    fn end_line(&mut self) {
        let is_fence =
            matches!(self.phase, LinePhase::Run | LinePhase::Info) && self.length >= MIN_FENCE_LEN;
        self.phase = LinePhase::Container;
        if !is_fence {
            return;
        }
        match self.open {
            None => self.open = Some((self.marker, self.length)),
            Some((marker, length)) => {
                if self.is_bare && marker == self.marker && self.length >= length {
                    self.open = None;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_begin_and_end_at_their_fences() {
        for (text, is_in_block, is_after_fence) in [
            ("a `b`\n", false, false),
            ("```py\n", true, false),
            ("```py\nx\n```", true, true),
            ("```py\nx\n```\n", false, false),
            ("1. ~~~~\n```\n~~~\n", true, false),
            ("> ````\n```\n ```` \n", false, false),
            ("```a`\n", false, false),
            ("```", false, true),
            ("```\n```x\n", true, false),
        ] {
            let (mut whole, mut letters) = <(CodeBlockTracker, CodeBlockTracker)>::default();
            whole.push(text);
            text.split_inclusive(|_| true).for_each(|letter| letters.push(letter));
            for tracker in [whole, letters] {
                let state = (tracker.is_in_block(), tracker.is_after_fence());
                assert_eq!(state, (is_in_block, is_after_fence), "{text:?}");
            }
        }
    }
}
