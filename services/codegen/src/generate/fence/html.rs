//! Code blocks in HTML: `<pre><code class="language-py">…</code></pre>`.

use crate::generate::fence::info::language_of_class;

/// Most white space between two tags, in bytes.
const MAX_GAP_LEN: usize = 16;

/// The entities that are decoded. All others stay as they are.
const ENTITIES: [(&str, &str); 7] = [
    ("&lt;", "<"),
    ("&gt;", ">"),
    ("&amp;", "&"),
    ("&quot;", "\""),
    ("&#39;", "'"),
    ("&#x27;", "'"),
    ("&apos;", "'"),
];

/// What a text begins with.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum HtmlMatch<T> {
    /// A value, and its length in bytes.
    Found(T, usize),
    /// More text is needed.
    Partial,
    None,
}

/// Matches the start of a line with the opening tags of a code block, and returns its language.
pub(super) fn match_open(text: &str) -> HtmlMatch<String> {
    let (pre, after) = match match_tag(text, "<pre") {
        HtmlMatch::Found(pre, length) => (pre, &text[length..]),
        HtmlMatch::Partial => return HtmlMatch::Partial,
        HtmlMatch::None => return HtmlMatch::None,
    };
    match match_tag(after.trim_start(), "<code") {
        HtmlMatch::Found(code, length) => {
            let language = language_of(code).or_else(|| language_of(pre)).unwrap_or_default();
            let end = text.len() - after.trim_start().len() + length;
            HtmlMatch::Found(language.to_owned(), end)
        }
        HtmlMatch::Partial => HtmlMatch::Partial,
        HtmlMatch::None => HtmlMatch::None,
    }
}

/// Matches a tag with this beginning, and returns its attributes.
fn match_tag<'t>(text: &'t str, begin: &str) -> HtmlMatch<&'t str> {
    let Some(after) = strip_prefix_ignoring_case(text, begin) else {
        return if is_start_of(text, begin) { HtmlMatch::Partial } else { HtmlMatch::None };
    };
    if !after.is_empty() && !after.starts_with(['>', ' ']) {
        return HtmlMatch::None;
    }
    match after.split_once('>') {
        Some((attributes, _)) => HtmlMatch::Found(attributes, begin.len() + attributes.len() + 1),
        None => HtmlMatch::Partial,
    }
}

/// The language in the attributes `class` or `lang`.
fn language_of(attributes: &str) -> Option<&str> {
    let value = |name: &str| {
        let (_, after) = attributes.split_once(name)?;
        after.split(['"', '\'']).next()
    };
    let class = value("class=\"").or_else(|| value("class='")).and_then(|classes| {
        let mut classes = classes.split_whitespace();
        classes.find(|class| class.starts_with("lang"))
    });
    let language = class.or_else(|| value("lang=\"")).or_else(|| value("lang='"));
    language.map(language_of_class)
}

/// Matches the start of a text in the block with its closing tags and with entities. Returns what it stands
/// for; `None` is the end of the block.
pub(super) fn match_markup(text: &str) -> HtmlMatch<Option<&'static str>> {
    let mut is_partial = false;
    for (entity, decoded) in ENTITIES {
        if text.starts_with(entity) {
            return HtmlMatch::Found(Some(decoded), entity.len());
        }
        is_partial |= entity.starts_with(text);
    }
    let after = strip_prefix_ignoring_case(text, "</code>").unwrap_or(text);
    let close = after.trim_start();
    if after.len() - close.len() > MAX_GAP_LEN {
        return HtmlMatch::None;
    }
    if let Some(rest) = strip_prefix_ignoring_case(close, "</pre>") {
        return HtmlMatch::Found(None, text.len() - rest.len());
    }
    is_partial |= is_start_of(text, "</code>") || is_start_of(close, "</pre>");
    if is_partial { HtmlMatch::Partial } else { HtmlMatch::None }
}

fn strip_prefix_ignoring_case<'t>(text: &'t str, prefix: &str) -> Option<&'t str> {
    let (begin, rest) = text.split_at_checked(prefix.len())?;
    begin.eq_ignore_ascii_case(prefix).then_some(rest)
}

/// Whether the whole text is the start of a longer one.
fn is_start_of(text: &str, whole: &str) -> bool {
    whole.get(..text.len()).is_some_and(|begin| begin.eq_ignore_ascii_case(text))
}
