//! Pagination of lists: page sizes within bounds, and tokens that point to the last row of a page.

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;

use crate::violations::Violations;

const DEFAULT_PAGE_SIZE: i32 = 50;
const MAX_PAGE_SIZE: i32 = 1_000;

/// A position in a list. The next page begins after this row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageCursor {
    /// The sort key: a time in microseconds since 1970.
    pub time: i64,
    /// The row's id, which orders rows with equal times.
    pub id: String,
}

/// Validates a requested page size; 0 selects the default of 50.
pub fn page_size(requested: i32) -> Result<i64, Violations> {
    match requested {
        0 => Ok(DEFAULT_PAGE_SIZE.into()),
        1..=MAX_PAGE_SIZE => Ok(requested.into()),
        _ => Err(Violations::single("page_size", "must be from 0 to 1000")),
    }
}

/// Splits a query result that contains up to one row more than the page: the page, and whether there are more rows.
pub fn split_page<T>(mut rows: Vec<T>, size: i64) -> (Vec<T>, bool) {
    let size = usize::try_from(size).unwrap_or(usize::MAX);
    let has_more = rows.len() > size;
    rows.truncate(size);
    (rows, has_more)
}

/// The page token of a row.
pub fn page_token(time: i64, id: &str) -> String {
    BASE64_URL_SAFE_NO_PAD.encode(format!("{time}/{id}"))
}

/// Parses a page token. An empty token selects the first page.
pub fn parse_page_token(token: &str) -> Result<PageCursor, Violations> {
    if token.is_empty() {
        return Ok(PageCursor { time: i64::MAX, id: String::new() });
    }
    let parse = || {
        let text = String::from_utf8(BASE64_URL_SAFE_NO_PAD.decode(token).ok()?).ok()?;
        let (time, id) = text.split_once('/')?;
        // PostgreSQL rejects text with a zero byte.
        let is_valid = !id.chars().any(char::is_control);
        is_valid.then_some(PageCursor { time: time.parse().ok()?, id: id.to_owned() })
    };
    parse().ok_or_else(|| Violations::single("page_token", "is not the token of a previous reply"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_token_points_to_its_row() {
        let expected = PageCursor { time: 42, id: "key_1".to_owned() };
        assert_eq!(parse_page_token(&page_token(42, "key_1")).unwrap(), expected);
    }

    proptest! {
        #[test]
        fn an_invalid_token_never_panics(token in "\\PC{1,40}") {
            let _ = parse_page_token(&token);
        }
    }
}
