//! Conversions between times in databases (microseconds since 1970, UTC) and protobuf times.

use std::time::{SystemTime, UNIX_EPOCH};

use prost_types::{Duration, Timestamp};
use time::OffsetDateTime;

/// One second, in microseconds.
pub const SECOND: i64 = 1_000_000;
/// One minute, in microseconds.
pub const MINUTE: i64 = 60 * SECOND;
/// One hour, in microseconds.
pub const HOUR: i64 = 60 * MINUTE;
/// One day, in microseconds.
pub const DAY: i64 = 24 * HOUR;

/// The last second that RFC 3339 can represent, in seconds since 1970.
pub const LAST_SECOND: i64 = 253_402_300_799;

/// The current time, in microseconds since 1970.
pub fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_micros()).unwrap_or(i64::MAX)
}

/// A protobuf timestamp from microseconds since 1970.
pub fn timestamp(micros: i64) -> Timestamp {
    let nanos = i32::try_from(micros.rem_euclid(SECOND) * 1_000).unwrap_or_default();
    Timestamp { seconds: micros.div_euclid(SECOND), nanos }
}

/// Microseconds since 1970 from a protobuf timestamp.
pub fn micros(time: &Timestamp) -> i64 {
    time.seconds.saturating_mul(SECOND).saturating_add(i64::from(time.nanos / 1_000))
}

/// A protobuf duration from microseconds.
pub fn duration(micros: i64) -> Duration {
    let nanos = i32::try_from(micros.rem_euclid(SECOND) * 1_000).unwrap_or_default();
    Duration { seconds: micros.div_euclid(SECOND), nanos }
}

/// Microseconds from a protobuf duration.
pub fn micros_of(duration: &Duration) -> i64 {
    duration.seconds.saturating_mul(SECOND).saturating_add(i64::from(duration.nanos / 1_000))
}

/// Rounds a time down to a multiple of `width`, such as the start of its minute, hour or day.
pub const fn floor(micros: i64, width: i64) -> i64 {
    micros - micros.rem_euclid(width)
}

/// The date of a time in UTC, such as 2026-01-31.
pub fn day(micros: i64) -> String {
    let time = OffsetDateTime::from_unix_timestamp(micros.div_euclid(SECOND));
    let date = time.unwrap_or(OffsetDateTime::UNIX_EPOCH).date();
    format!("{:04}-{:02}-{:02}", date.year(), u8::from(date.month()), date.day())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn dates_are_in_utc() {
        let new_years_eve = micros(&Timestamp { seconds: 1_798_761_540, nanos: 0 });
        assert_eq!(day(new_years_eve), "2026-12-31");
        assert_eq!(day(new_years_eve + MINUTE), "2027-01-01");
    }

    proptest! {
        #[test]
        fn times_convert_without_loss(micro in any::<i64>()) {
            let back = micros(&timestamp(micro));
            prop_assert!(back == micro || micro < -9_223_372_036_854_000_000);
        }

        #[test]
        fn durations_convert_without_loss(micro in 0..4_000_000_000_000_000i64) {
            prop_assert_eq!(micros_of(&duration(micro)), micro);
            prop_assert!((0..HOUR).contains(&(micro - floor(micro, HOUR))));
        }
    }
}
