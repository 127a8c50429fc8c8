//! The most frequent error groups of a period, each with its trend against the period before.

use hapa_core::timestamps::{DAY, HOUR, MINUTE, floor, now, timestamp};
use hapa_core::violations::Violations;
use hapa_proto::errors::v1::list_patterns_response::Pattern;
use hapa_proto::errors::v1::{ListPatternsRequest, ListPatternsResponse};

use crate::error::Error;
use crate::incident::saturating_u32;
use crate::store::{ComparisonWindow, GroupFrequency, Store};
use crate::visibility::Visibility;

const MAX_PATTERN_COUNT: i64 = 100;

pub(crate) async fn list(
    store: &Store,
    visibility: &Visibility,
    request: &ListPatternsRequest,
) -> Result<ListPatternsResponse, Error> {
    let window = comparison_window(&request.period, now())?;
    let groups = match visibility {
        Visibility::All => store.top_groups(window, MAX_PATTERN_COUNT).await?,
        Visibility::Owner(owner) => {
            store.owner_top_groups(owner, window, MAX_PATTERN_COUNT).await?
        }
    };
    Ok(ListPatternsResponse { patterns: groups.into_iter().map(to_pattern).collect() })
}

fn comparison_window(period: &str, now: i64) -> Result<ComparisonWindow, Violations> {
    let (length, bucket_width) = match period {
        "1h" => (HOUR, MINUTE),
        "" | "24h" => (DAY, HOUR),
        "7d" => (7 * DAY, DAY),
        "30d" => (30 * DAY, DAY),
        _ => return Err(Violations::single("period", "must be 1h, 24h, 7d or 30d")),
    };
    let start = floor(now - length, bucket_width);
    Ok(ComparisonWindow { bucket_width, start, previous_start: start - length })
}

fn to_pattern(frequency: GroupFrequency) -> Pattern {
    let GroupFrequency { group, count, previous_count, owner_count } = frequency;
    Pattern {
        error_code: group.error_code,
        fingerprint: group.fingerprint,
        count: saturating_u32(count),
        first_seen: Some(timestamp(group.first_seen)),
        last_seen: Some(timestamp(group.last_seen)),
        affected_users: saturating_u32(owner_count),
        trend: trend(count, previous_count).to_owned(),
        incident_id: group.incident_id,
        method: group.method,
        message: group.message,
    }
}

/// `rising` above 3/2 of the previous count, `falling` below 2/3 of it.
fn trend(count: i64, previous_count: i64) -> &'static str {
    if previous_count == 0 {
        "new"
    } else if count.saturating_mul(2) > previous_count.saturating_mul(3) {
        "rising"
    } else if count.saturating_mul(3) < previous_count.saturating_mul(2) {
        "falling"
    } else {
        "steady"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trend_compares_with_the_previous_period() {
        for (count, previous_count, expected) in [
            (1, 0, "new"),
            (15, 10, "steady"),
            (16, 10, "rising"),
            (10, 15, "steady"),
            (9, 15, "falling"),
        ] {
            assert_eq!(trend(count, previous_count), expected, "{count} after {previous_count}");
        }
    }

    #[test]
    fn a_window_starts_at_a_full_minute_hour_or_day() {
        let now = 100 * DAY + 5 * HOUR + 7 * MINUTE + 9;
        let hour = comparison_window("1h", now).unwrap();
        assert_eq!(hour.start, 100 * DAY + 4 * HOUR + 7 * MINUTE);
        let day = comparison_window("", now).unwrap();
        assert_eq!((day.start, day.previous_start), (99 * DAY + 5 * HOUR, 98 * DAY + 5 * HOUR));
        let month = comparison_window("30d", now).unwrap();
        assert_eq!((month.start, month.previous_start), (70 * DAY, 40 * DAY));
        assert!(comparison_window("1d", now).is_err());
    }
}
