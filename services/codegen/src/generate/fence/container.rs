//! What may stand before a fence on its line: indentation, markers of list items, and markers of block quotes.

/// A tab stop, in columns.
const TAB_SIZE: usize = 4;
/// Longest number of an ordered list.
const MAX_LIST_NUMBER_LEN: usize = 9;

/// The place of a fence on its line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Container {
    /// The number of `>` before it.
    pub(super) quotes: usize,
    /// Its column after the last `>`.
    pub(super) column: usize,
}

/// A line outside of code, without its line break.
#[derive(Debug)]
pub(super) struct LinePrefix<'l> {
    pub(super) container: Container,
    pub(super) has_list_marker: bool,
    /// The rest of the line.
    pub(super) body: &'l str,
    /// The body may turn out to be another marker.
    pub(super) is_partial: bool,
}

/// Reads the containers at the start of a line.
pub(super) fn read_prefix(line: &str) -> LinePrefix<'_> {
    let (mut container, mut has_list_marker, mut body) = (Container::default(), false, line);
    loop {
        let (blank, column) = skip_blank(body, container.column, usize::MAX);
        body = &body[blank..];
        if let Some(after) = body.strip_prefix('>') {
            container = Container { quotes: container.quotes + 1, column: 0 };
            body = after.strip_prefix(' ').unwrap_or(after);
            continue;
        }
        container.column = column;
        let marker = list_marker_len(body);
        if marker == 0 || !body[marker..].starts_with([' ', '\t']) {
            let is_partial = marker == body.len() || is_number(body);
            return LinePrefix { container, has_list_marker, body, is_partial };
        }
        container.column += marker;
        has_list_marker = true;
        body = &body[marker..];
    }
}

fn is_number(text: &str) -> bool {
    text.len() <= MAX_LIST_NUMBER_LEN && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// The length of the list marker at the start of a text. 0: there is none.
fn list_marker_len(text: &str) -> usize {
    if text.starts_with(['-', '*', '+']) {
        return 1;
    }
    let number = text.len() - text.trim_start_matches(|letter: char| letter.is_ascii_digit()).len();
    let is_marker =
        number > 0 && is_number(&text[..number]) && text[number..].starts_with(['.', ')']);
    if is_marker { number + 1 } else { 0 }
}

/// Skips spaces and tabs from one column to another. A tab that crosses the last column is not skipped.
/// Returns the skipped bytes and the column after them.
pub(super) fn skip_blank(text: &str, mut column: usize, last: usize) -> (usize, usize) {
    for (at, byte) in text.bytes().enumerate() {
        let next = match byte {
            b' ' => column + 1,
            b'\t' => column - column % TAB_SIZE + TAB_SIZE,
            _ => return (at, column),
        };
        if next > last {
            return (at, column);
        }
        column = next;
    }
    (text.len(), column)
}

/// What the markers of block quotes leave of a line in code.
pub(super) enum Unquoted {
    /// The rest of the line begins at this byte.
    Rest(usize),
    /// More text is needed.
    Partial,
    /// A marker is missing, which ends the quote.
    Missing,
}

/// Skips markers of block quotes. A complete line misses no further text.
pub(super) fn skip_quotes(line: &str, quotes: usize, is_complete: bool) -> Unquoted {
    let mut rest = line;
    for _ in 0..quotes {
        let body = rest.trim_start_matches([' ', '\t']);
        match body.strip_prefix('>') {
            // A space after the marker belongs to it.
            Some("") if !is_complete => return Unquoted::Partial,
            Some(after) => rest = after.strip_prefix(' ').unwrap_or(after),
            None if body.is_empty() && !is_complete => return Unquoted::Partial,
            None => return Unquoted::Missing,
        }
    }
    Unquoted::Rest(line.len() - rest.len())
}
