//! The dashboard: totals and top error codes, read from the hourly counts.

use hapa_core::pagination;
use hapa_core::timestamps::{DAY, HOUR, floor, now, timestamp};
use hapa_proto::errors::v1::GetDashboardResponse;
use hapa_proto::errors::v1::get_dashboard_response::{ErrorCodeCount, RecentIncident};

use crate::call_counter::CallCounter;
use crate::error::Error;
use crate::incident::{self, saturating_u32};
use crate::store::{IncidentFilter, Store};
use crate::validation::published_meaning;
use crate::visibility::Visibility;

const MAX_ENTRIES: usize = 10;

pub(crate) async fn get(
    store: &Store,
    visibility: &Visibility,
    call_counter: &CallCounter,
) -> Result<GetDashboardResponse, Error> {
    let start = floor(now() - DAY, HOUR);
    let filter =
        IncidentFilter { status: String::new(), error_code: String::new(), seen_after: i64::MIN };
    let after = pagination::parse_page_token("")?;
    let (head, codes, recent, requests) = tokio::join!(
        store.head(),
        codes(store, visibility, start),
        incident::page(store, visibility, &filter, &after, i64::try_from(MAX_ENTRIES).unwrap_or(1)),
        requests(visibility, call_counter, start),
    );
    let (head, codes) = (head?, codes?);
    let total = match visibility {
        Visibility::All => head.total,
        Visibility::Owner(owner) => store.owner_total(owner).await?,
    };
    let errors: i64 = codes.iter().map(|(_, errors)| errors).sum();
    let recent = recent?.into_iter().map(|group| RecentIncident {
        incident_id: group.incident_id,
        error_code: group.error_code,
        timestamp: Some(timestamp(group.last_seen)),
        status: group.status,
        count: saturating_u32(group.total),
        recovered_count: saturating_u32(group.recovered_count),
    });
    Ok(GetDashboardResponse {
        total_errors: saturating_u32(total),
        errors_last_24h: saturating_u32(errors),
        error_rate: error_rate(errors, requests),
        top_error_codes: codes.into_iter().take(MAX_ENTRIES).map(code_count).collect(),
        recent_incidents: recent.collect(),
        last_cleanup: Some(head.cleanup_time).filter(|time| *time > 0).map(timestamp),
    })
}

async fn codes(
    store: &Store,
    visibility: &Visibility,
    start: i64,
) -> Result<Vec<(String, i64)>, Error> {
    match visibility {
        Visibility::All => store.codes_since(start).await,
        Visibility::Owner(owner) => store.owner_codes_since(owner, start).await,
    }
}

/// The number of calls since `start`. `None` for one owner: AnalyticsService counts all owners
/// together.
async fn requests(visibility: &Visibility, call_counter: &CallCounter, start: i64) -> Option<u32> {
    match visibility {
        Visibility::All => call_counter.since(start).await,
        Visibility::Owner(_) => None,
    }
}

/// Errors per call, from 0 to 1. 0 if the number of calls is unknown.
fn error_rate(errors: i64, requests: Option<u32>) -> f64 {
    match requests {
        Some(requests) if requests > 0 => {
            (f64::from(saturating_u32(errors)) / f64::from(requests)).min(1.0)
        }
        _ => 0.0,
    }
}

fn code_count((code, errors): (String, i64)) -> ErrorCodeCount {
    let description = published_meaning(&code).to_owned();
    ErrorCodeCount { code, count: saturating_u32(errors), description }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_rate_is_from_0_to_1_and_0_without_a_call_count() {
        for (errors, requests, expected) in
            [(5, None, 0.0), (5, Some(0), 0.0), (5, Some(20), 0.25), (30, Some(20), 1.0)]
        {
            assert!((error_rate(errors, requests) - expected).abs() < 1e-9);
        }
    }
}
