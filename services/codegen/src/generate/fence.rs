//! Splits a streamed answer into code and explanation. Lines that open or close Markdown code
//! blocks are removed and switch the kind. All other bytes pass through in order, as soon as they
//! cannot belong to such a line.
//! <https://spec.commonmark.org/0.31.2/#fenced-code-blocks>

use hapa_proto::codegen::v1::stream_generate_code_response::Kind;

/// Longest line that can be a fence. Longer lines are not held back.
const MAX_FENCE_LINE_LEN: usize = 200;

/// Longer first words of info strings are cut to this length. Names of languages are shorter.
const MAX_INFO_WORD_LEN: usize = 40;

/// The position of a piece of text in the answer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Segment<'s> {
    pub(crate) kind: Kind,
    /// The number of the code block, from 1. For explanation, the number of the previous block.
    pub(crate) block: usize,
    /// The first word after the block's opening fence, usually its language. "": there is none.
    pub(crate) info_word: &'s str,
}

/// The state of the splitter between two pieces of the answer.
#[derive(Debug, Default)]
pub(crate) struct FenceSplitter {
    /// The number of opened blocks.
    block_count: usize,
    /// The first word after the last opening fence.
    info_word: String,
    /// The current line while it may be a fence, or else "".
    pending_line: String,
    /// The current line is no fence, so its rest passes through.
    is_mid_line: bool,
    /// The opening fence of the current block.
    open_fence: Option<Fence>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Fence {
    marker: char,
    length: usize,
}

enum LineKind {
    /// The line opens a block with this fence, or closes the current one.
    Fence(Option<Fence>),
    Text,
    /// The rest of the line is needed.
    Undecided,
}

impl FenceSplitter {
    /// Adds a piece of the answer and emits all text that certainly is code or explanation.
    pub(crate) fn push(&mut self, mut text: &str, emit: &mut impl FnMut(Segment<'_>, &str)) {
        while !text.is_empty() {
            let end = memchr::memchr(b'\n', text.as_bytes());
            let (line, rest) = text.split_at(end.map_or(text.len(), |at| at + 1));
            text = rest;
            if self.is_mid_line {
                emit(self.segment(), line);
            } else {
                self.pending_line.push_str(line);
                self.resolve_pending(end.is_some(), emit);
            }
            if end.is_some() {
                self.is_mid_line = false;
            }
        }
    }

    /// Emits the held-back text at the end of the answer.
    pub(crate) fn end(&mut self, emit: &mut impl FnMut(Segment<'_>, &str)) {
        if !self.pending_line.is_empty() {
            self.resolve_pending(true, emit);
        }
    }

    fn resolve_pending(&mut self, is_complete: bool, emit: &mut impl FnMut(Segment<'_>, &str)) {
        match self.classify(is_complete) {
            LineKind::Fence(open_fence) => {
                self.open_fence = open_fence;
                if let Some(fence) = open_fence {
                    self.start_block(fence);
                }
                self.pending_line.clear();
            }
            LineKind::Text => {
                emit(self.segment(), &self.pending_line);
                self.pending_line.clear();
                self.is_mid_line = true;
            }
            LineKind::Undecided => {}
        }
    }

    fn classify(&self, is_complete: bool) -> LineKind {
        let line = self.pending_line.trim_end_matches(['\n', '\r']);
        let body = line.trim_start_matches(' ');
        let Some(marker) = body.chars().next() else {
            return if is_complete || line.len() > 3 {
                LineKind::Text
            } else {
                LineKind::Undecided
            };
        };
        if !matches!(marker, '`' | '~')
            || line.len() - body.len() > 3
            || line.len() > MAX_FENCE_LINE_LEN
        {
            return LineKind::Text;
        }
        let after = body.trim_start_matches(marker);
        let fence = Fence { marker, length: body.len() - after.len() };
        let (is_long_enough, is_fence) = match self.open_fence {
            Some(open_fence) if open_fence.marker != marker => return LineKind::Text,
            Some(open_fence) => (fence.length >= open_fence.length, after.trim().is_empty()),
            // A backtick after the fence makes the line inline code.
            None => (fence.length >= 3, marker != '`' || !after.contains('`')),
        };
        if !is_fence || (!is_long_enough && (is_complete || !after.is_empty())) {
            return LineKind::Text;
        }
        if !is_complete {
            return LineKind::Undecided;
        }
        LineKind::Fence(self.open_fence.is_none().then_some(fence))
    }

    fn start_block(&mut self, fence: Fence) {
        let after = self.pending_line.trim_start_matches(' ').trim_start_matches(fence.marker);
        let word = after.split_whitespace().next().unwrap_or_default();
        self.block_count += 1;
        self.info_word = word.chars().take(MAX_INFO_WORD_LEN).collect();
    }

    fn segment(&self) -> Segment<'_> {
        let kind = if self.open_fence.is_some() { Kind::Code } else { Kind::Explanation };
        Segment { kind, block: self.block_count, info_word: &self.info_word }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn split<'a>(pieces: impl IntoIterator<Item = &'a str>) -> Vec<(Kind, String)> {
        let (mut splitter, mut parts) = (FenceSplitter::default(), Vec::<(Kind, String)>::new());
        let mut emit = |segment: Segment<'_>, text: &str| match parts.last_mut() {
            Some((last, joined)) if *last == segment.kind => joined.push_str(text),
            _ => parts.push((segment.kind, text.to_owned())),
        };
        for piece in pieces {
            splitter.push(piece, &mut emit);
        }
        splitter.end(&mut emit);
        parts
    }

    fn check(answer: &str, expected: &[(Kind, &str)]) {
        let expected: Vec<_> =
            expected.iter().map(|(kind, text)| (*kind, (*text).to_owned())).collect();
        assert_eq!(split([answer]), expected, "{answer:?}");
        assert_eq!(split(answer.split_inclusive(|_| true)), expected, "by letters: {answer:?}");
    }

    #[test]
    fn fences_switch_the_kind_and_are_removed() {
        use Kind::{Code, Explanation};
        check(
            "a\n```python\nx = 1\n```\nb",
            &[(Explanation, "a\n"), (Code, "x = 1\n"), (Explanation, "b")],
        );
        check("```\nx\n```", &[(Code, "x\n")]);
        check("~~~ py\n```\n~~~~\nz", &[(Code, "```\n"), (Explanation, "z")]);
        check("````\n```\n````\n", &[(Code, "```\n")]);
        check("  ```py\r\nx\r\n  ```  \r\ny", &[(Code, "x\r\n"), (Explanation, "y")]);
        check("```py\nnever closed", &[(Code, "never closed")]);
    }

    #[test]
    fn blocks_have_their_number_and_the_word_of_their_fence() {
        let (mut splitter, mut seen) = (FenceSplitter::default(), Vec::new());
        let answer = "a\n``` py title=x\n1\n```\n```\n2\n```\nb\n~~~js\n3\n";
        splitter.push(answer, &mut |segment, text| {
            seen.push((segment.block, segment.info_word.to_owned(), text.to_owned()));
        });
        let seen: Vec<_> =
            seen.iter().map(|(block, word, text)| (*block, word.as_str(), text.as_str())).collect();
        let expected =
            [(0, "", "a\n"), (1, "py", "1\n"), (2, "", "2\n"), (2, "", "b\n"), (3, "js", "3\n")];
        assert_eq!(seen, expected);
    }

    #[test]
    fn lines_similar_to_a_fence_pass_through() {
        use Kind::{Code, Explanation};
        check("```inline``` code\n", &[(Explanation, "```inline``` code\n")]);
        check("use `x` or ``y``\n``\n", &[(Explanation, "use `x` or ``y``\n``\n")]);
        check("    ```\n", &[(Explanation, "    ```\n")]);
        check("```\n``` not the end\n```\n", &[(Code, "``` not the end\n")]);
        check("   \n\n  한글\n", &[(Explanation, "   \n\n  한글\n")]);
    }

    #[test]
    fn only_a_possible_fence_is_held_back() {
        let (mut splitter, mut given) = (FenceSplitter::default(), String::new());
        splitter.push("word", &mut |_, text| given.push_str(text));
        assert_eq!(given, "word");
        splitter.push(" `a\n``", &mut |_, text| given.push_str(text));
        assert_eq!(given, "word `a\n");
        splitter.push("b", &mut |_, text| given.push_str(text));
        assert_eq!(given, "word `a\n``b");
        splitter.push("\n```", &mut |_, text| given.push_str(text));
        splitter.push(&"x".repeat(MAX_FENCE_LINE_LEN), &mut |_, text| given.push_str(text));
        assert!(given.len() > MAX_FENCE_LINE_LEN, "a long line is not held back for ever");
    }

    proptest! {
        #[test]
        fn the_split_does_not_depend_on_the_pieces(
            answer in "([`~]{1,5}| {1,5}|[a-z한]|\r?\n|```py\n|\n```\n){0,40}",
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..20),
        ) {
            let letters: Vec<_> = answer.char_indices().map(|(at, _)| at).collect();
            let mut at: Vec<_> = cuts.iter().filter(|_| !letters.is_empty()).map(|cut| letters[cut.index(letters.len())]).collect();
            at.push(answer.len());
            at.sort_unstable();
            let mut from = 0;
            let pieces: Vec<_> = at.iter().map(|to| { let piece = &answer[from..*to]; from = *to; piece }).collect();
            prop_assert_eq!(split(pieces), split([answer.as_str()]));
        }

        #[test]
        fn text_without_fence_characters_passes_through_unchanged(answer in "[^`~]{0,80}") {
            let joined: String = split([answer.as_str()]).into_iter().map(|(_, text)| text).collect();
            prop_assert_eq!(joined, answer);
        }
    }
}
