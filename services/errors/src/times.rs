//! Times as the store keeps them (microseconds since 1970) and as the wire shows them.

use std::time::{SystemTime, UNIX_EPOCH};

use prost_types::{Duration, Timestamp};

const SECOND: i64 = 1_000_000;
/// A minute.
pub(crate) const MINUTE: i64 = 60 * SECOND;
/// An hour.
pub(crate) const HOUR: i64 = 60 * MINUTE;
/// A day.
pub(crate) const DAY: i64 = 24 * HOUR;

/// Now.
pub(crate) fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_micros()).unwrap_or(i64::MAX)
}

pub(crate) fn timestamp(micros: i64) -> Timestamp {
    let nanos = i32::try_from(micros.rem_euclid(SECOND) * 1_000).unwrap_or_default();
    Timestamp { seconds: micros.div_euclid(SECOND), nanos }
}

pub(crate) fn micros(time: &Timestamp) -> i64 {
    time.seconds.saturating_mul(SECOND).saturating_add(i64::from(time.nanos / 1_000))
}

pub(crate) fn duration(micros: i64) -> Duration {
    let nanos = i32::try_from(micros.rem_euclid(SECOND) * 1_000).unwrap_or_default();
    Duration { seconds: micros.div_euclid(SECOND), nanos }
}

pub(crate) fn micros_of(duration: &Duration) -> i64 {
    duration.seconds.saturating_mul(SECOND).saturating_add(i64::from(duration.nanos / 1_000))
}

/// When the minute, the hour or the day of a moment began.
pub(crate) fn floor(micros: i64, width: i64) -> i64 {
    micros.div_euclid(width) * width
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn times_survive_the_way_through_the_store(micro in 0..4_000_000_000_000_000i64) {
            prop_assert_eq!(micros(&timestamp(micro)), micro);
            prop_assert_eq!(micros_of(&duration(micro)), micro);
            prop_assert!((0..HOUR).contains(&(micro - floor(micro, HOUR))));
        }
    }
}
