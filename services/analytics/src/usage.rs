//! GetUsage: usage totals in a window, limited to the owner that the caller may see.

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use hapa_core::call::Call;
use hapa_core::timestamps::{DAY, day, now};
use hapa_core::violations::Violations;
use hapa_proto::analytics::v1::get_usage_response::Row;
use hapa_proto::analytics::v1::{GetUsageRequest, GetUsageResponse};

use crate::error::Error;
use crate::performance::{check_filters, count_as_f64, resolve_window};
use crate::rollup_period::RollupPeriod;
use crate::store::{Store, UsageDimension, UsageFilter, UsageGroup};

const DEFAULT_PAGE_SIZE: i32 = 50;
const MAX_PAGE_SIZE: i32 = 1_000;
const DEFAULT_WINDOW_PERIOD: i64 = 30 * DAY;

/// The start of a page and the window of all pages. The window is part of it, so that pages stay
/// consistent across midnight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct PageCursor {
    offset: i64,
    start: i64,
    end: i64,
}

/// The requested page of usage. A caller that is no admin sees an empty report for other owners.
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
    let dimensions = parse_dimensions(&request.group_by)?;
    let size = page_size(request.page_size)?;
    let page = if request.page_token.is_empty() {
        let (start, end) =
            resolve_window(request.start_time, request.end_time, DEFAULT_WINDOW_PERIOD, now())?;
        PageCursor {
            offset: 0,
            start: RollupPeriod::Day.floor(start),
            end: RollupPeriod::Day.ceil(end),
        }
    } else {
        decode_token(&request.page_token)?
    };
    let Some(owner) = visible_owner(call, request.owner) else {
        return Ok(GetUsageResponse { total: Some(Row::default()), ..GetUsageResponse::default() });
    };
    let filter = UsageFilter {
        start: page.start,
        end: page.end,
        owner,
        key_id: request.key_id,
        model: request.model,
    };
    let (mut rows, grand_total) = store.usage(&filter, &dimensions, size + 1, page.offset).await?;
    let has_more = i64::try_from(rows.len()).is_ok_and(|count| count > size);
    rows.truncate(usize::try_from(size).unwrap_or(usize::MAX));
    let next = PageCursor { offset: page.offset.saturating_add(size), ..page };
    Ok(GetUsageResponse {
        rows: rows.into_iter().map(to_row).collect(),
        next_page_token: if has_more { encode_token(next) } else { String::new() },
        total: Some(to_row(UsageGroup { totals: grand_total, ..UsageGroup::default() })),
    })
}

/// The owner to report on; "" is all owners. `None`: the caller may see nothing of the requested
/// owner.
fn visible_owner(call: &Call, requested: String) -> Option<String> {
    if call.is_admin() {
        return Some(requested);
    }
    let own = &call.principal.as_ref()?.owner;
    (!own.is_empty() && (requested.is_empty() || requested == *own)).then(|| own.clone())
}

fn to_row(group: UsageGroup) -> Row {
    let totals = group.totals;
    Row {
        key_id: group.key_id,
        user_id: group.user_id,
        owner: group.owner,
        model: group.model,
        day: group.day.map(day).unwrap_or_default(),
        requests: count_as_f64(totals.requests),
        errors: count_as_f64(totals.errors),
        prompt_tokens: count_as_f64(totals.prompt_tokens),
        completion_tokens: count_as_f64(totals.completion_tokens),
        reasoning_tokens: count_as_f64(totals.reasoning_tokens),
        total_tokens: count_as_f64(totals.prompt_tokens.saturating_add(totals.completion_tokens)),
    }
}

/// Parses `group_by` into sorted dimensions without duplicates.
fn parse_dimensions(text: &str) -> Result<Vec<UsageDimension>, Violations> {
    if text.is_empty() {
        return Ok(vec![UsageDimension::Owner]);
    }
    let named = text.split(',').map(|name| match name.trim() {
        "key" => Ok(UsageDimension::Key),
        "user" => Ok(UsageDimension::User),
        "owner" => Ok(UsageDimension::Owner),
        "model" => Ok(UsageDimension::Model),
        "day" => Ok(UsageDimension::Day),
        _ => {
            Err(Violations::single("group_by", "must be a list of key, user, owner, model and day"))
        }
    });
    let mut named: Vec<_> = named.collect::<Result<_, _>>()?;
    named.sort_unstable();
    named.dedup();
    Ok(named)
}

fn page_size(requested: i32) -> Result<i64, Violations> {
    match requested {
        0 => Ok(DEFAULT_PAGE_SIZE.into()),
        1..=MAX_PAGE_SIZE => Ok(requested.into()),
        _ => Err(Violations::single("page_size", "must be from 0 to 1000")),
    }
}

fn encode_token(page: PageCursor) -> String {
    BASE64_URL_SAFE_NO_PAD.encode(format!("{}/{}/{}", page.offset, page.start, page.end))
}

fn decode_token(token: &str) -> Result<PageCursor, Violations> {
    let parse = || {
        let text = String::from_utf8(BASE64_URL_SAFE_NO_PAD.decode(token).ok()?).ok()?;
        let numbers: Result<Vec<i64>, _> = text.split('/').map(str::parse).collect();
        let &[offset, start, end] = numbers.ok()?.as_slice() else { return None };
        (offset >= 0).then_some(PageCursor { offset, start, end })
    };
    parse().ok_or_else(|| {
        Violations::single("page_token", "must be the next_page_token of an earlier response")
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn dimensions_are_sorted_and_without_duplicates() {
        assert_eq!(parse_dimensions("").unwrap(), [UsageDimension::Owner]);
        let expected = [UsageDimension::Day, UsageDimension::Model];
        assert_eq!(parse_dimensions("model, day,model").unwrap(), expected);
        for wrong in ["keys", "key,", ","] {
            assert_eq!(parse_dimensions(wrong).unwrap_err().fields(), ["group_by"], "{wrong}");
        }
    }

    #[test]
    fn a_token_decodes_to_its_page() {
        let expected = PageCursor { offset: 50, start: 1, end: 2 };
        assert_eq!(decode_token(&encode_token(expected)).unwrap(), expected);
        assert!(decode_token(&BASE64_URL_SAFE_NO_PAD.encode("-1/0/0")).is_err());
    }

    proptest! {
        #[test]
        fn a_made_up_token_never_panics(token in "\\PC{1,40}") {
            let _ = decode_token(&token);
        }
    }
}
