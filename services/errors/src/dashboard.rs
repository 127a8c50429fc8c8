//! The sums, from what is counted by the hour.

use hapa_core::pagination;
use hapa_core::rpc_error::ErrorCode;
use hapa_core::timestamps::{DAY, HOUR, floor, now, timestamp};
use hapa_proto::errors::v1::GetDashboardResponse;
use hapa_proto::errors::v1::get_dashboard_response::{ErrorCodeCount, RecentIncident};

use crate::calls::Calls;
use crate::error::Error;
use crate::incident::{self, count};
use crate::store::{Filter, Store};
use crate::view::View;

const MOST: usize = 10;

pub(crate) async fn get(
    store: &Store,
    view: &View,
    calls: &Calls,
) -> Result<GetDashboardResponse, Error> {
    let start = floor(now() - DAY, HOUR);
    let filter = Filter { status: String::new(), error_code: String::new(), seen_after: i64::MIN };
    let after = pagination::after("")?;
    let (head, codes, recent, requests) = tokio::join!(
        store.head(),
        codes(store, view, start),
        incident::page(store, view, &filter, &after, i64::try_from(MOST).unwrap_or(1)),
        requests(view, calls, start),
    );
    let (head, codes) = (head?, codes?);
    let total = match view {
        View::Mesh => head.total,
        View::Owner(owner) => store.own_total(owner).await?,
    };
    let errors: i64 = codes.iter().map(|(_, errors)| errors).sum();
    let recent = recent?.into_iter().map(|pattern| RecentIncident {
        incident_id: pattern.incident_id,
        error_code: pattern.error_code,
        timestamp: Some(timestamp(pattern.last_seen)),
        status: pattern.status,
        count: count(pattern.total),
        recovered_count: count(pattern.recovered_count),
    });
    Ok(GetDashboardResponse {
        total_errors: count(total),
        errors_last_24h: count(errors),
        error_rate: rate(errors, requests),
        top_error_codes: codes.into_iter().take(MOST).map(code).collect(),
        recent_incidents: recent.collect(),
        last_cleanup: Some(head.cleanup_time).filter(|time| *time > 0).map(timestamp),
    })
}

async fn codes(store: &Store, view: &View, start: i64) -> Result<Vec<(String, i64)>, Error> {
    match view {
        View::Mesh => store.codes_since(start).await,
        View::Owner(owner) => store.own_codes_since(owner, start).await,
    }
}

/// Calls since a time. How many an owner made in these hours is not known here.
async fn requests(view: &View, calls: &Calls, start: i64) -> Option<u32> {
    match view {
        View::Mesh => calls.since(start).await,
        View::Owner(_) => None,
    }
}

/// Errors a call, as far as calls are known.
fn rate(errors: i64, requests: Option<u32>) -> f64 {
    match requests {
        Some(requests) if requests > 0 => (f64::from(count(errors)) / f64::from(requests)).min(1.0),
        _ => 0.0,
    }
}

fn code((code, errors): (String, i64)) -> ErrorCodeCount {
    let known = ErrorCode::ALL.iter().map(|known| known.entry());
    let entry = known.into_iter().find(|entry| entry.name == code);
    let description = entry.map(|entry| entry.meaning).unwrap_or_default().to_owned();
    ErrorCodeCount { code, count: count(errors), description }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_from_0_to_1_and_0_where_nothing_is_known() {
        for (errors, requests, expected) in
            [(5, None, 0.0), (5, Some(0), 0.0), (5, Some(20), 0.25), (30, Some(20), 1.0)]
        {
            assert!((rate(errors, requests) - expected).abs() < 1e-9);
        }
    }
}
