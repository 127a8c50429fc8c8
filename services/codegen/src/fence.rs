//! Tells code from explanation while an answer streams: the lines that open and close Markdown code
//! blocks are taken out and set the kind; every other byte goes through, in order, as soon as it
//! can't be part of such a line any more.
//! <https://spec.commonmark.org/0.31.2/#fenced-code-blocks>

use hapa_proto::codegen::v1::stream_generate_code_response::Kind;

/// Longest line that may still turn out to be a fence: beyond it text is not held back.
const LONGEST_FENCE: usize = 200;

/// Longest first word of an opening fence that is told; languages have shorter names.
const LONGEST_WORD: usize = 40;

/// Where a piece of text stands.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spot<'s> {
    pub(crate) kind: Kind,
    /// The number of the code block, from 1; of text, that of the block before it.
    pub(crate) block: usize,
    /// The first word after the block's opening fence: its language, or "".
    pub(crate) word: &'s str,
}

/// What is known of the text so far.
#[derive(Debug, Default)]
pub(crate) struct Splitter {
    /// How many blocks were opened, and the word of the last.
    blocks: usize,
    word: String,
    /// The begun line, while it may be a fence; empty otherwise.
    held: String,
    /// The begun line is no fence: the rest of it goes straight through.
    in_line: bool,
    /// The fence that opened the block we are in.
    open: Option<Fence>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Fence {
    mark: char,
    length: usize,
}

enum Line {
    /// It opens or closes a block.
    Marks(Option<Fence>),
    /// It is text.
    Text,
    /// More of it must be seen.
    Unclear,
}

impl Splitter {
    /// Takes a piece of the answer and gives what is certain now.
    pub(crate) fn push(&mut self, mut text: &str, give: &mut impl FnMut(Spot<'_>, &str)) {
        while !text.is_empty() {
            let end = memchr::memchr(b'\n', text.as_bytes());
            let (line, rest) = text.split_at(end.map_or(text.len(), |at| at + 1));
            text = rest;
            if self.in_line {
                give(self.spot(), line);
            } else {
                self.held.push_str(line);
                self.decide(end.is_some(), give);
            }
            if end.is_some() {
                self.in_line = false;
            }
        }
    }

    /// The answer has ended: what is held back is decided.
    pub(crate) fn end(&mut self, give: &mut impl FnMut(Spot<'_>, &str)) {
        if !self.held.is_empty() {
            self.decide(true, give);
        }
    }

    fn decide(&mut self, whole: bool, give: &mut impl FnMut(Spot<'_>, &str)) {
        match self.look(whole) {
            Line::Marks(open) => {
                self.open = open;
                if let Some(fence) = open {
                    self.begin(fence);
                }
                self.held.clear();
            }
            Line::Text => {
                give(self.spot(), &self.held);
                self.held.clear();
                self.in_line = true;
            }
            Line::Unclear => {}
        }
    }

    fn look(&self, whole: bool) -> Line {
        let line = self.held.trim_end_matches(['\n', '\r']);
        let body = line.trim_start_matches(' ');
        let Some(mark) = body.chars().next() else {
            return if whole || line.len() > 3 { Line::Text } else { Line::Unclear };
        };
        if !matches!(mark, '`' | '~') || line.len() - body.len() > 3 || line.len() > LONGEST_FENCE {
            return Line::Text;
        }
        let after = body.trim_start_matches(mark);
        let fence = Fence { mark, length: body.len() - after.len() };
        let (long_enough, fits) = match self.open {
            Some(open) if open.mark != mark => return Line::Text,
            Some(open) => (fence.length >= open.length, after.trim().is_empty()),
            // A backtick after the fence makes it inline code.
            None => (fence.length >= 3, mark != '`' || !after.contains('`')),
        };
        if !fits || (!long_enough && (whole || !after.is_empty())) {
            return Line::Text;
        }
        if !whole {
            return Line::Unclear;
        }
        Line::Marks(self.open.is_none().then_some(fence))
    }

    fn begin(&mut self, fence: Fence) {
        let after = self.held.trim_start_matches(' ').trim_start_matches(fence.mark);
        let word = after.split_whitespace().next().unwrap_or_default();
        self.blocks += 1;
        self.word = word.chars().take(LONGEST_WORD).collect();
    }

    fn spot(&self) -> Spot<'_> {
        let kind = if self.open.is_some() { Kind::Code } else { Kind::Explanation };
        Spot { kind, block: self.blocks, word: &self.word }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn split<'a>(pieces: impl IntoIterator<Item = &'a str>) -> Vec<(Kind, String)> {
        let (mut splitter, mut parts) = (Splitter::default(), Vec::<(Kind, String)>::new());
        let mut give = |spot: Spot<'_>, text: &str| match parts.last_mut() {
            Some((last, joined)) if *last == spot.kind => joined.push_str(text),
            _ => parts.push((spot.kind, text.to_owned())),
        };
        for piece in pieces {
            splitter.push(piece, &mut give);
        }
        splitter.end(&mut give);
        parts
    }

    fn check(answer: &str, expected: &[(Kind, &str)]) {
        let expected: Vec<_> =
            expected.iter().map(|(kind, text)| (*kind, (*text).to_owned())).collect();
        assert_eq!(split([answer]), expected, "{answer:?}");
        assert_eq!(split(answer.split_inclusive(|_| true)), expected, "by letters: {answer:?}");
    }

    #[test]
    fn fences_set_the_kind_and_are_taken_out() {
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
    fn blocks_are_told_apart_with_the_word_of_their_fence() {
        let (mut splitter, mut seen) = (Splitter::default(), Vec::new());
        let answer = "a\n``` py title=x\n1\n```\n```\n2\n```\nb\n~~~js\n3\n";
        splitter.push(answer, &mut |spot, text| {
            seen.push((spot.block, spot.word.to_owned(), text.to_owned()));
        });
        let seen: Vec<_> =
            seen.iter().map(|(block, word, text)| (*block, word.as_str(), text.as_str())).collect();
        let expected =
            [(0, "", "a\n"), (1, "py", "1\n"), (2, "", "2\n"), (2, "", "b\n"), (3, "js", "3\n")];
        assert_eq!(seen, expected);
    }

    #[test]
    fn what_only_looks_like_a_fence_goes_through() {
        use Kind::{Code, Explanation};
        check("```inline``` code\n", &[(Explanation, "```inline``` code\n")]);
        check("use `x` or ``y``\n``\n", &[(Explanation, "use `x` or ``y``\n``\n")]);
        check("    ```\n", &[(Explanation, "    ```\n")]);
        check("```\n``` not the end\n```\n", &[(Code, "``` not the end\n")]);
        check("   \n\n  한글\n", &[(Explanation, "   \n\n  한글\n")]);
    }

    #[test]
    fn only_what_may_be_a_fence_is_held_back() {
        let (mut splitter, mut given) = (Splitter::default(), String::new());
        splitter.push("word", &mut |_, text| given.push_str(text));
        assert_eq!(given, "word");
        splitter.push(" `a\n``", &mut |_, text| given.push_str(text));
        assert_eq!(given, "word `a\n");
        splitter.push("b", &mut |_, text| given.push_str(text));
        assert_eq!(given, "word `a\n``b");
        splitter.push("\n```", &mut |_, text| given.push_str(text));
        splitter.push(&"x".repeat(LONGEST_FENCE), &mut |_, text| given.push_str(text));
        assert!(given.len() > LONGEST_FENCE, "a long line is not held back for ever");
    }

    proptest! {
        #[test]
        fn the_split_is_the_same_wherever_the_text_is_cut(
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
        fn text_without_marks_comes_out_byte_for_byte(answer in "[^`~]{0,80}") {
            let joined: String = split([answer.as_str()]).into_iter().map(|(_, text)| text).collect();
            prop_assert_eq!(joined, answer);
        }
    }
}
