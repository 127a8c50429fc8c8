//! What was used in a window, and whose it is to see.

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use hapa_core::call::Call;
use hapa_core::timestamps::{DAY, day, now};
use hapa_core::violations::Violations;
use hapa_proto::analytics::v1::get_usage_response::Row;
use hapa_proto::analytics::v1::{GetUsageRequest, GetUsageResponse};

use crate::error::Error;
use crate::performance::{check_filters, number, window};
use crate::store::{By, Store, Total, Usage};
use crate::times::Span;

const DEFAULT_SIZE: i32 = 50;
const LARGEST_SIZE: i32 = 1_000;
const DEFAULT_WINDOW: i64 = 30 * DAY;

/// Where a page begins, and the window of them all, so that midnight changes nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Page {
    offset: i64,
    start: i64,
    end: i64,
}

/// The report that a request asks for. What is another owner's does not exist for who is no admin.
pub(crate) async fn report(
    store: &Store,
    call: &Call,
    request: GetUsageRequest,
) -> Result<GetUsageResponse, Error> {
    check_filters(&[
        ("owner", &request.owner),
        ("key_id", &request.key_id),
        ("model", &request.model),
    ])?;
    let by = group_by(&request.group_by)?;
    let size = size(request.page_size)?;
    let page = if request.page_token.is_empty() {
        let (start, end) = window(request.start_time, request.end_time, DEFAULT_WINDOW, now())?;
        Page { offset: 0, start: Span::Day.floor(start), end: Span::Day.ceil(end) }
    } else {
        page(&request.page_token)?
    };
    let Some(owner) = visible(call, request.owner) else {
        return Ok(GetUsageResponse { total: Some(Row::default()), ..GetUsageResponse::default() });
    };
    let which = Usage {
        start: page.start,
        end: page.end,
        owner,
        key_id: request.key_id,
        model: request.model,
    };
    let (mut rows, whole) = store.usage(&which, &by, size + 1, page.offset).await?;
    let more = i64::try_from(rows.len()).is_ok_and(|found| found > size);
    rows.truncate(usize::try_from(size).unwrap_or(usize::MAX));
    let next = Page { offset: page.offset.saturating_add(size), ..page };
    Ok(GetUsageResponse {
        rows: rows.into_iter().map(row).collect(),
        next_page_token: if more { token(next) } else { String::new() },
        total: Some(row(Total { used: whole, ..Total::default() })),
    })
}

/// Whose usage to show, "" for everyone's; none where nothing may be seen.
fn visible(call: &Call, asked: String) -> Option<String> {
    if call.is_admin() {
        return Some(asked);
    }
    let own = &call.principal.as_ref()?.owner;
    (!own.is_empty() && (asked.is_empty() || asked == *own)).then(|| own.clone())
}

fn row(total: Total) -> Row {
    let used = total.used;
    Row {
        key_id: total.key_id,
        user_id: total.user_id,
        owner: total.owner,
        model: total.model,
        day: total.day.map(day).unwrap_or_default(),
        requests: number(used.requests),
        errors: number(used.errors),
        prompt_tokens: number(used.prompt_tokens),
        completion_tokens: number(used.completion_tokens),
        total_tokens: number(used.prompt_tokens.saturating_add(used.completion_tokens)),
    }
}

/// Each once, in one order.
fn group_by(text: &str) -> Result<Vec<By>, Violations> {
    if text.is_empty() {
        return Ok(vec![By::Owner]);
    }
    let named = text.split(',').map(|name| match name.trim() {
        "key" => Ok(By::Key),
        "user" => Ok(By::User),
        "owner" => Ok(By::Owner),
        "model" => Ok(By::Model),
        "day" => Ok(By::Day),
        _ => Err(Violations::one("group_by", "takes key, user, owner, model and day")),
    });
    let mut named: Vec<_> = named.collect::<Result<_, _>>()?;
    named.sort_unstable();
    named.dedup();
    Ok(named)
}

fn size(asked: i32) -> Result<i64, Violations> {
    match asked {
        0 => Ok(DEFAULT_SIZE.into()),
        1..=LARGEST_SIZE => Ok(asked.into()),
        _ => Err(Violations::one("page_size", "must be from 0 to 1000")),
    }
}

fn token(page: Page) -> String {
    BASE64_URL_SAFE_NO_PAD.encode(format!("{}/{}/{}", page.offset, page.start, page.end))
}

fn page(token: &str) -> Result<Page, Violations> {
    let parse = || {
        let text = String::from_utf8(BASE64_URL_SAFE_NO_PAD.decode(token).ok()?).ok()?;
        let numbers: Result<Vec<i64>, _> = text.split('/').map(str::parse).collect();
        let &[offset, start, end] = numbers.ok()?.as_slice() else { return None };
        (offset >= 0).then_some(Page { offset, start, end })
    };
    parse().ok_or_else(|| Violations::one("page_token", "is not one that a reply gave"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn groups_are_named_once_and_in_one_order() {
        assert_eq!(group_by("").unwrap(), [By::Owner]);
        assert_eq!(group_by("model, day,model").unwrap(), [By::Day, By::Model]);
        for wrong in ["keys", "key,", ","] {
            assert_eq!(group_by(wrong).unwrap_err().fields(), ["group_by"], "{wrong}");
        }
    }

    #[test]
    fn a_token_leads_back_to_its_page() {
        let expected = Page { offset: 50, start: 1, end: 2 };
        assert_eq!(page(&token(expected)).unwrap(), expected);
        assert!(page(&BASE64_URL_SAFE_NO_PAD.encode("-1/0/0")).is_err());
    }

    proptest! {
        #[test]
        fn a_made_up_token_never_panics(token in "\\PC{1,40}") {
            let _ = page(&token);
        }
    }
}
