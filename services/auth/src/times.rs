//! The periods of token budgets, which are those of UTC, and the ends of what is made here.

use std::time::Duration;

use hapa_core::timestamps::{DAY, SECOND};
use time::{Date, Month, OffsetDateTime};

/// `from` and so many days.
pub(crate) fn in_days(from: i64, days: u32) -> i64 {
    from.saturating_add(i64::from(days) * DAY)
}

/// `from` and so many seconds.
pub(crate) fn in_seconds(from: i64, seconds: u32) -> i64 {
    from.saturating_add(i64::from(seconds) * SECOND)
}

/// The month of a day.
pub(crate) fn month_of(day: &str) -> &str {
    day.get(..7).unwrap_or(day)
}

/// How long it is until the day, or the month, begins anew.
pub(crate) fn until_next(micros: i64, is_month: bool) -> Duration {
    let today = date(micros);
    let next = if is_month {
        let (month, year) = match today.month() {
            Month::December => (Month::January, today.year() + 1),
            month => (month.next(), today.year()),
        };
        Date::from_calendar_date(year, month, 1).ok()
    } else {
        today.next_day()
    };
    let begin = next.map_or(micros + DAY, |next| {
        next.midnight().assume_utc().unix_timestamp().saturating_mul(SECOND)
    });
    Duration::from_micros(u64::try_from(begin - micros).unwrap_or_default())
}

fn date(micros: i64) -> Date {
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
    fn days_and_months_are_those_of_utc() {
        let new_years_eve = micros(&Timestamp { seconds: 1_798_761_540, nanos: 0 });
        assert_eq!(day(new_years_eve), "2026-12-31");
        assert_eq!(month_of(&day(new_years_eve)), "2026-12");
        assert_eq!(until_next(new_years_eve, false), Duration::from_mins(1));
        assert_eq!(until_next(new_years_eve, true), Duration::from_mins(1));
    }

    proptest! {
        #[test]
        fn a_period_always_ends_later(micro in 0..4_000_000_000_000_000i64) {
            prop_assert!(until_next(micro, false) <= Duration::from_hours(24));
            prop_assert!(until_next(micro, true) <= Duration::from_hours(24 * 31));
            prop_assert!(until_next(micro, false) > Duration::ZERO);
        }
    }
}
