//! Pages of lists: a size within bounds, and a token that leads on from the last row.

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;

use crate::violations::Violations;

const DEFAULT_SIZE: i32 = 50;
const LARGEST_SIZE: i32 = 1_000;

/// Where a page begins: after this row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct After {
    /// The time that the list is sorted by.
    pub time: i64,
    /// The row's id, where times are equal.
    pub id: String,
}

/// Rows to return.
pub fn size(asked: i32) -> Result<i64, Violations> {
    match asked {
        0 => Ok(DEFAULT_SIZE.into()),
        1..=LARGEST_SIZE => Ok(asked.into()),
        _ => Err(Violations::one("page_size", "must be from 0 to 1000")),
    }
}

/// Of rows that were asked for with one more than a page holds: the page, and whether there is more.
pub fn cut<T>(mut rows: Vec<T>, size: i64) -> (Vec<T>, bool) {
    let size = usize::try_from(size).unwrap_or(usize::MAX);
    let more = rows.len() > size;
    rows.truncate(size);
    (rows, more)
}

/// Leads on from a row.
pub fn token(time: i64, id: &str) -> String {
    BASE64_URL_SAFE_NO_PAD.encode(format!("{time}/{id}"))
}

/// Where a token leads; "" to the begin.
pub fn after(token: &str) -> Result<After, Violations> {
    if token.is_empty() {
        return Ok(After { time: i64::MAX, id: String::new() });
    }
    let parse = || {
        let text = String::from_utf8(BASE64_URL_SAFE_NO_PAD.decode(token).ok()?).ok()?;
        let (time, id) = text.split_once('/')?;
        // A zero byte is no text of PostgreSQL's.
        let plain = !id.chars().any(char::is_control);
        plain.then_some(After { time: time.parse().ok()?, id: id.to_owned() })
    };
    parse().ok_or_else(|| Violations::one("page_token", "is not one that a reply gave"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_token_leads_back_to_its_row() {
        let expected = After { time: 42, id: "key_1".to_owned() };
        assert_eq!(after(&token(42, "key_1")).unwrap(), expected);
    }

    proptest! {
        #[test]
        fn a_made_up_token_never_panics(token in "\\PC{1,40}") {
            let _ = after(&token);
        }
    }
}
