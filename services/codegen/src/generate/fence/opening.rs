//! Lines outside of code, which may open a block.

use crate::generate::fence::container::{LinePrefix, read_prefix};
use crate::generate::fence::html::{self, HtmlMatch};
use crate::generate::fence::info::{info_word, is_info_char, is_language};
use crate::generate::fence::{Fence, LineEnd, LineKind, MAX_INDENT_LEN, MIN_FENCE_LEN};

/// Whether the current line may belong to a list item.
#[derive(Debug, Default)]
pub(super) struct ListContext {
    is_in_list: bool,
    is_after_blank: bool,
}

impl ListContext {
    /// Classifies a line outside of code.
    pub(super) fn classify(&mut self, line: &str, end: LineEnd) -> LineKind {
        let prefix = read_prefix(line);
        if prefix.is_partial && end == LineEnd::Unknown {
            return LineKind::Undecided;
        }
        let column = prefix.container.column;
        if self.is_in_list || prefix.has_list_marker || column <= MAX_INDENT_LEN {
            match classify_opening(line, &prefix, end) {
                LineKind::Text(_) => {}
                kind => return kind,
            }
        }
        let is_blank = prefix.body.is_empty() && !prefix.has_list_marker;
        if prefix.has_list_marker {
            self.is_in_list = true;
        } else if !is_blank && column == 0 && (self.is_after_blank || line.starts_with('#')) {
            self.is_in_list = false;
        }
        self.is_after_blank = is_blank;
        LineKind::Text(0)
    }
}

/// Classifies a line that may open a block.
fn classify_opening(line: &str, prefix: &LinePrefix<'_>, end: LineEnd) -> LineKind {
    let (body, container) = (prefix.body, prefix.container);
    let Some(marker) = body.chars().next().filter(|marker| matches!(marker, '`' | '~')) else {
        return classify_tags(line, prefix, end);
    };
    let info = body.trim_start_matches(marker);
    let length = body.len() - info.len();
    let is_fence = length >= MIN_FENCE_LEN && is_info_of(marker, length, info);
    let open = || {
        let word = info_word(info);
        LineKind::Open(Fence::new(marker, length, container, &word), word)
    };
    match end {
        LineEnd::Known if is_fence => open(),
        LineEnd::TooFar if is_fence && marker == '`' && starts_with_language(info) => open(),
        LineEnd::Unknown if is_fence || info.is_empty() => LineKind::Undecided,
        _ => LineKind::Text(0),
    }
}

/// Whether a text may be the info string of a fence of this length. Tildes also underline code in error messages,
/// as in `~~~~^~~~`. A backtick after a fence of backticks is inline code, except in the attributes of a language.
fn is_info_of(marker: char, length: usize, info: &str) -> bool {
    if marker == '~' {
        return info.chars().all(is_info_char);
    }
    let mut runs = info.split(|letter| letter != '`').map(str::len);
    !info.contains('`') || (starts_with_language(info) && runs.all(|run| run < length))
}

fn starts_with_language(info: &str) -> bool {
    info.trim_start().split([' ', '\t', '{']).next().is_some_and(is_language)
}

/// Classifies a line that may begin with the tags of an HTML block.
fn classify_tags(line: &str, prefix: &LinePrefix<'_>, end: LineEnd) -> LineKind {
    if prefix.container.quotes > 0 {
        return LineKind::Text(0);
    }
    match html::match_open(prefix.body) {
        HtmlMatch::Found(info_word, length) => {
            LineKind::OpenHtml(line.len() - prefix.body.len() + length, info_word)
        }
        HtmlMatch::Partial if end == LineEnd::Unknown => LineKind::Undecided,
        HtmlMatch::Partial | HtmlMatch::None => LineKind::Text(0),
    }
}
