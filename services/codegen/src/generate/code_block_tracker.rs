//! Tracks whether a growing answer is inside of a code block, as `fence` reads it, without its texts.

use crate::generate::fence::FenceSplitter;

/// The state after the text so far. It does not depend on the pieces.
#[derive(Debug, Default)]
pub(crate) struct CodeBlockTracker(FenceSplitter);

impl CodeBlockTracker {
    pub(crate) fn push(&mut self, text: &str) {
        self.0.push(text, &mut |_, _| ());
    }

    /// Whether an earlier fence has opened a block that no fence has closed.
    pub(crate) fn is_in_block(&self) -> bool {
        self.0.is_in_block()
    }

    /// Whether the text ends in a fence that closes the block, if only white space follows on its line.
    pub(crate) fn is_after_closing_fence(&self) -> bool {
        self.0.is_after_closing_fence()
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
            ("```py\nx```", true, true),
            ("a:```py\n", true, false),
            ("```py\nx\n```\n", false, false),
            ("```py\nx\n```done.\n", false, false),
            ("1. ~~~~\n```\n~~~\n", true, false),
            ("> ````\n> ```\n> ```` \n", false, false),
            ("```a`\n", false, false),
            ("```", false, false),
            ("<pre><code>\n", true, false),
        ] {
            let (mut whole, mut letters) = <(CodeBlockTracker, CodeBlockTracker)>::default();
            whole.push(text);
            text.split_inclusive(|_| true).for_each(|letter| letters.push(letter));
            for tracker in [whole, letters] {
                let state = (tracker.is_in_block(), tracker.is_after_closing_fence());
                assert_eq!(state, (is_in_block, is_after_fence), "{text:?}");
            }
        }
    }
}
