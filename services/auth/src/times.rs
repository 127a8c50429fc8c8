//! Times as the store keeps them (microseconds since 1970) and as the wire shows them, and the
//! periods of token budgets, which are those of UTC.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prost_types::Timestamp;
use time::{Date, Month, OffsetDateTime};

const MICROS: i64 = 1_000_000;
/// A day.
pub(crate) const DAY: i64 = 86_400 * MICROS;

/// Now.
pub(crate) fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_micros()).unwrap_or(i64::MAX)
}

pub(crate) fn timestamp(micros: i64) -> Timestamp {
    let nanos = i32::try_from(micros.rem_euclid(MICROS) * 1_000).unwrap_or_default();
    Timestamp { seconds: micros.div_euclid(MICROS), nanos }
}

pub(crate) fn micros(time: &Timestamp) -> i64 {
    time.seconds.saturating_mul(MICROS).saturating_add(i64::from(time.nanos / 1_000))
}

/// `from` and so many days.
pub(crate) fn in_days(from: i64, days: u32) -> i64 {
    from.saturating_add(i64::from(days) * DAY)
}

/// `from` and so many seconds.
pub(crate) fn in_seconds(from: i64, seconds: u32) -> i64 {
    from.saturating_add(i64::from(seconds) * MICROS)
}

/// The day of a moment, as 2026-01-31; its first seven letters are its month.
pub(crate) fn day(micros: i64) -> String {
    let date = date(micros);
    format!("{:04}-{:02}-{:02}", date.year(), u8::from(date.month()), date.day())
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
        next.midnight().assume_utc().unix_timestamp().saturating_mul(MICROS)
    });
    Duration::from_micros(u64::try_from(begin - micros).unwrap_or_default())
}

fn date(micros: i64) -> Date {
    let time = OffsetDateTime::from_unix_timestamp(micros.div_euclid(MICROS));
    time.unwrap_or(OffsetDateTime::UNIX_EPOCH).date()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn days_and_months_are_those_of_utc() {
        let new_years_eve = micros(&Timestamp { seconds: 1_798_761_540, nanos: 0 });
        assert_eq!(day(new_years_eve), "2026-12-31");
        assert_eq!(month_of(&day(new_years_eve)), "2026-12");
        assert_eq!(until_next(new_years_eve, false), Duration::from_mins(1));
        assert_eq!(until_next(new_years_eve, true), Duration::from_mins(1));
        assert_eq!(day(new_years_eve + 60 * MICROS), "2027-01-01");
    }

    proptest! {
        #[test]
        fn times_survive_the_way_through_the_store(micro in any::<i64>()) {
            let back = micros(&timestamp(micro));
            prop_assert!(back == micro || micro < -9_223_372_036_854_000_000);
        }

        #[test]
        fn a_period_always_ends_later(micro in 0..4_000_000_000_000_000i64) {
            prop_assert!(until_next(micro, false) <= Duration::from_hours(24));
            prop_assert!(until_next(micro, true) <= Duration::from_hours(24 * 31));
            prop_assert!(until_next(micro, false) > Duration::ZERO);
        }
    }
}
