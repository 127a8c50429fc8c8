//! What fails most in a period, and whether it fails more than in the period before.

use hapa_core::timestamps::{DAY, HOUR, MINUTE, floor, now, timestamp};
use hapa_core::violations::Violations;
use hapa_proto::errors::v1::list_patterns_response::Pattern;
use hapa_proto::errors::v1::{ListPatternsRequest, ListPatternsResponse};

use crate::error::Error;
use crate::incident::count;
use crate::store::{Ranked, Store, Window};
use crate::view::View;

const MOST: i64 = 100;

pub(crate) async fn list(
    store: &Store,
    view: &View,
    request: &ListPatternsRequest,
) -> Result<ListPatternsResponse, Error> {
    let window = window(&request.period, now())?;
    let ranked = match view {
        View::Mesh => store.ranked(window, MOST).await?,
        View::Owner(owner) => store.own_ranked(owner, window, MOST).await?,
    };
    Ok(ListPatternsResponse { patterns: ranked.into_iter().map(pattern).collect() })
}

fn window(period: &str, now: i64) -> Result<Window, Violations> {
    let (length, width) = match period {
        "1h" => (HOUR, MINUTE),
        "" | "24h" => (DAY, HOUR),
        "7d" => (7 * DAY, DAY),
        "30d" => (30 * DAY, DAY),
        _ => return Err(Violations::one("period", "must be 1h, 24h, 7d or 30d")),
    };
    let start = floor(now - length, width);
    Ok(Window { width, start, before: start - length })
}

fn pattern(ranked: Ranked) -> Pattern {
    let Ranked { pattern, count: times, count_before, owners } = ranked;
    Pattern {
        error_code: pattern.error_code,
        fingerprint: pattern.fingerprint,
        count: count(times),
        first_seen: Some(timestamp(pattern.first_seen)),
        last_seen: Some(timestamp(pattern.last_seen)),
        affected_users: count(owners),
        trend: trend(times, count_before).to_owned(),
        incident_id: pattern.incident_id,
        method: pattern.method,
        message: pattern.message,
    }
}

fn trend(count: i64, before: i64) -> &'static str {
    if before == 0 {
        "new"
    } else if count.saturating_mul(2) > before.saturating_mul(3) {
        "rising"
    } else if count.saturating_mul(3) < before.saturating_mul(2) {
        "falling"
    } else {
        "steady"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trend_compares_with_the_period_before() {
        for (count, before, expected) in [
            (1, 0, "new"),
            (15, 10, "steady"),
            (16, 10, "rising"),
            (10, 15, "steady"),
            (9, 15, "falling"),
        ] {
            assert_eq!(trend(count, before), expected, "{count} after {before}");
        }
    }

    #[test]
    fn a_window_begins_with_a_whole_minute_hour_or_day() {
        let now = 100 * DAY + 5 * HOUR + 7 * MINUTE + 9;
        let hour = window("1h", now).unwrap();
        assert_eq!(hour.start, 100 * DAY + 4 * HOUR + 7 * MINUTE);
        let day = window("", now).unwrap();
        assert_eq!((day.start, day.before), (99 * DAY + 5 * HOUR, 98 * DAY + 5 * HOUR));
        let month = window("30d", now).unwrap();
        assert_eq!((month.start, month.before), (70 * DAY, 40 * DAY));
        assert!(window("1d", now).is_err());
    }
}
