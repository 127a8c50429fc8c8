//! Date arithmetic: expiry times, and the UTC days and months of token budgets.

use std::time::Duration;

use hapa_core::timestamps::{DAY, SECOND};
use time::{Date, Month, OffsetDateTime};

/// Adds days to a time in epoch microseconds.
pub(crate) fn add_days(from: i64, days: u32) -> i64 {
    from.saturating_add(i64::from(days) * DAY)
}

/// Adds seconds to a time in epoch microseconds.
pub(crate) fn add_seconds(from: i64, seconds: u32) -> i64 {
    from.saturating_add(i64::from(seconds) * SECOND)
}

/// The month of a day: `2026-01` of `2026-01-31`.
pub(crate) fn month_of(day: &str) -> &str {
    day.get(..7).unwrap_or(day)
}

/// Time until the next UTC day or month starts.
pub(crate) fn until_next_period(micros: i64, is_monthly: bool) -> Duration {
    let today = utc_date(micros);
    let next = if is_monthly {
        let (month, year) = match today.month() {
            Month::December => (Month::January, today.year() + 1),
            month => (month.next(), today.year()),
        };
        Date::from_calendar_date(year, month, 1).ok()
    } else {
        today.next_day()
    };
    let next_start = next.map_or(micros + DAY, |next| {
        next.midnight().assume_utc().unix_timestamp().saturating_mul(SECOND)
    });
    Duration::from_micros(u64::try_from(next_start - micros).unwrap_or_default())
}

fn utc_date(micros: i64) -> Date {
    let time = OffsetDateTime::from_unix_timestamp(micros.div_euclid(SECOND));
    time.unwrap_or(OffsetDateTime::UNIX_EPOCH).date()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use hapa_core::timestamps::day;
    use hapa_core::timestamps::micros;
    use prost_types::Timestamp;

    use super::*;

    #[test]
    fn days_and_months_are_in_utc() {
        let new_years_eve = micros(&Timestamp { seconds: 1_798_761_540, nanos: 0 });
        assert_eq!(day(new_years_eve), "2026-12-31");
        assert_eq!(month_of(&day(new_years_eve)), "2026-12");
        assert_eq!(until_next_period(new_years_eve, false), Duration::from_mins(1));
        assert_eq!(until_next_period(new_years_eve, true), Duration::from_mins(1));
    }

    proptest! {
        #[test]
        fn a_period_always_ends_in_the_future(micro in 0..4_000_000_000_000_000i64) {
            prop_assert!(until_next_period(micro, false) <= Duration::from_hours(24));
            prop_assert!(until_next_period(micro, true) <= Duration::from_hours(24 * 31));
            prop_assert!(until_next_period(micro, false) > Duration::ZERO);
        }
    }
}
