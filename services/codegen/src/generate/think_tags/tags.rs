//! The tags around reasoning, and how text is matched with them.

/// The tags before and after reasoning.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct TagPair {
    open: &'static str,
    pub(super) close: &'static str,
}

const fn pair(open: &'static str, close: &'static str) -> TagPair {
    TagPair { open, close }
}

/// DeepSeek, Qwen and most others; Seed-OSS; Kimi; Magistral; OpenThinker; Command A; Gemma 4.
static PAIRS: [TagPair; 10] = [
    pair("<think>", "</think>"),
    pair("<thinking>", "</thinking>"),
    pair("<reasoning>", "</reasoning>"),
    pair("<thought>", "</thought>"),
    pair("<seed:think>", "</seed:think>"),
    pair("◁think▷", "◁/think▷"),
    pair("[THINK]", "[/THINK]"),
    pair("<|begin_of_thought|>", "<|end_of_thought|>"),
    pair("<|START_THINKING|>", "<|END_THINKING|>"),
    pair("<|channel>thought", "<channel|>"),
];

/// What a text begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TagMatch<T> {
    /// A tag of this length in bytes.
    Found(T, usize),
    /// The text may be the start of a tag.
    Partial,
    None,
}

/// Matches the start of a text with the opening tags.
pub(super) fn match_opening(text: &str) -> TagMatch<&'static TagPair> {
    match_any(text, PAIRS.iter().map(|pair| (pair, pair.open)))
}

/// Matches the start of a text with the closing tags.
pub(super) fn match_closing(text: &str) -> TagMatch<&'static TagPair> {
    match_any(text, closing_tags())
}

/// All closing tags.
pub(super) fn closing_tags() -> impl Iterator<Item = (&'static TagPair, &'static str)> + Clone {
    PAIRS.iter().map(|pair| (pair, pair.close))
}

/// All tags, and whether they are closing tags.
pub(super) fn all_tags() -> impl Iterator<Item = (bool, &'static str)> + Clone {
    PAIRS.iter().flat_map(|pair| [(false, pair.open), (true, pair.close)])
}

/// Matches the start of a text with tags, ignoring ASCII case.
pub(super) fn match_any<T>(
    text: &str,
    tags: impl Iterator<Item = (T, &'static str)>,
) -> TagMatch<T> {
    let mut is_partial = false;
    for (value, tag) in tags {
        let length = tag.len().min(text.len());
        if text.as_bytes()[..length].eq_ignore_ascii_case(&tag.as_bytes()[..length]) {
            if length == tag.len() {
                return TagMatch::Found(value, length);
            }
            is_partial = true;
        }
    }
    if is_partial { TagMatch::Partial } else { TagMatch::None }
}

/// Finds the first place where a tag is or may begin.
pub(super) fn find_any<T>(
    text: &str,
    tags: &(impl Iterator<Item = (T, &'static str)> + Clone),
) -> Option<(usize, TagMatch<T>)> {
    // The first byte of `◁` is 0xE2.
    memchr::memchr3_iter(b'<', b'[', 0xe2, text.as_bytes()).find_map(|at| {
        match match_any(&text[at..], tags.clone()) {
            TagMatch::None => None,
            found => Some((at, found)),
        }
    })
}
