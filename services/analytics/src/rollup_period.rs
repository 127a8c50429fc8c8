//! The periods of UTC by which events are aggregated, and the range of valid event times.

use hapa_core::timestamps::{DAY, HOUR, LAST_SECOND, MINUTE, SECOND};
use prost_types::Timestamp;

/// The length of a rollup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RollupPeriod {
    Second,
    Minute,
    Hour,
    Day,
}

impl RollupPeriod {
    pub(crate) const ALL: [RollupPeriod; 4] =
        [RollupPeriod::Second, RollupPeriod::Minute, RollupPeriod::Hour, RollupPeriod::Day];

    pub(crate) const fn length(self) -> i64 {
        match self {
            RollupPeriod::Second => SECOND,
            RollupPeriod::Minute => MINUTE,
            RollupPeriod::Hour => HOUR,
            RollupPeriod::Day => DAY,
        }
    }

    /// The next coarser period. A window reads it in its middle, and this period at its two ends.
    pub(crate) const fn coarser(self) -> Option<RollupPeriod> {
        match self {
            RollupPeriod::Minute => Some(RollupPeriod::Hour),
            RollupPeriod::Hour => Some(RollupPeriod::Day),
            // Second rollups serve the last minute only, which contains no full minute. Days are
            // the coarsest.
            RollupPeriod::Second | RollupPeriod::Day => None,
        }
    }

    /// The length in seconds, which identifies the period in the store.
    pub(crate) const fn seconds(self) -> i64 {
        self.length() / SECOND
    }

    /// How long rollups of this period are stored and updated. `None`: forever.
    pub(crate) const fn retention(self) -> Option<i64> {
        match self {
            RollupPeriod::Second => Some(2 * MINUTE),
            RollupPeriod::Minute => Some(2 * DAY),
            RollupPeriod::Hour => Some(90 * DAY),
            RollupPeriod::Day => None,
        }
    }

    /// Whether the rollup that contains `time` is still stored at `now`.
    pub(crate) fn is_retained(self, time: i64, now: i64) -> bool {
        self.retention().is_none_or(|retention| self.floor(time) >= now.saturating_sub(retention))
    }

    /// The start of the period that contains `time`.
    pub(crate) const fn floor(self, time: i64) -> i64 {
        time - time.rem_euclid(self.length())
    }

    /// The first start of a period at or after `time`.
    pub(crate) const fn ceil(self, time: i64) -> i64 {
        self.floor(time + self.length() - 1)
    }
}

/// A timestamp in microseconds since 1970. `None`: it is invalid or earlier.
pub(crate) fn micros(time: &Timestamp) -> Option<i64> {
    let is_valid =
        (0..=LAST_SECOND).contains(&time.seconds) && (0..1_000_000_000).contains(&time.nanos);
    is_valid.then(|| time.seconds * SECOND + i64::from(time.nanos / 1_000))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use hapa_core::timestamps::day;
    use hapa_core::timestamps::timestamp;

    use super::*;

    #[test]
    fn days_start_at_midnight_utc() {
        let new_years_eve = micros(&Timestamp { seconds: 1_798_761_540, nanos: 0 }).unwrap();
        assert_eq!(day(new_years_eve), "2026-12-31");
        assert_eq!(day(RollupPeriod::Day.ceil(new_years_eve)), "2027-01-01");
        assert_eq!(micros(&Timestamp { seconds: -1, nanos: 0 }), None);
        assert_eq!(micros(&Timestamp { seconds: 0, nanos: -1 }), None);
    }

    proptest! {
        #[test]
        fn periods_contain_their_times(time in 0..4_000_000_000_000_000i64) {
            prop_assert_eq!(micros(&timestamp(time)), Some(time));
            for span in RollupPeriod::ALL {
                let (floor, ceil) = (span.floor(time), span.ceil(time));
                prop_assert!(floor <= time && time <= ceil && ceil - floor <= span.length());
                prop_assert_eq!((span.floor(floor), span.ceil(ceil)), (floor, ceil));
            }
        }
    }
}
