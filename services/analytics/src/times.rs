//! The spans of UTC by which events are summed up, and the times that an event can have.

use hapa_core::timestamps::{DAY, HOUR, LAST_SECOND, MINUTE, SECOND};
use prost_types::Timestamp;

/// What a rollup sums up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Span {
    Second,
    Minute,
    Hour,
    Day,
}

impl Span {
    pub(crate) const ALL: [Span; 4] = [Span::Second, Span::Minute, Span::Hour, Span::Day];

    pub(crate) const fn length(self) -> i64 {
        match self {
            Span::Second => SECOND,
            Span::Minute => MINUTE,
            Span::Hour => HOUR,
            Span::Day => DAY,
        }
    }

    /// That of which a longer window is made, where it is summed up from this one at its ends.
    pub(crate) const fn coarser(self) -> Option<Span> {
        match self {
            Span::Minute => Some(Span::Hour),
            Span::Hour => Some(Span::Day),
            // The last minute has no whole one, and there is none of days.
            Span::Second | Span::Day => None,
        }
    }

    /// How the store names it.
    pub(crate) const fn seconds(self) -> i64 {
        self.length() / SECOND
    }

    /// How long its rollups are kept and added to; none: for ever.
    pub(crate) const fn kept(self) -> Option<i64> {
        match self {
            Span::Second => Some(2 * MINUTE),
            Span::Minute => Some(2 * DAY),
            Span::Hour => Some(90 * DAY),
            Span::Day => None,
        }
    }

    /// Whether the rollup of a time is there at `now`.
    pub(crate) fn has(self, time: i64, now: i64) -> bool {
        self.kept().is_none_or(|kept| self.floor(time) >= now.saturating_sub(kept))
    }

    /// When the one that has a time began.
    pub(crate) const fn floor(self, time: i64) -> i64 {
        time - time.rem_euclid(self.length())
    }

    /// When the next begins, unless one begins now.
    pub(crate) const fn ceil(self, time: i64) -> i64 {
        self.floor(time + self.length() - 1)
    }
}

/// Of a valid time from 1970 on.
pub(crate) fn micros(time: &Timestamp) -> Option<i64> {
    let valid =
        (0..=LAST_SECOND).contains(&time.seconds) && (0..1_000_000_000).contains(&time.nanos);
    valid.then(|| time.seconds * SECOND + i64::from(time.nanos / 1_000))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use hapa_core::timestamps::day;
    use hapa_core::timestamps::timestamp;

    use super::*;

    #[test]
    fn days_are_those_of_utc() {
        let new_years_eve = micros(&Timestamp { seconds: 1_798_761_540, nanos: 0 }).unwrap();
        assert_eq!(day(new_years_eve), "2026-12-31");
        assert_eq!(day(Span::Day.ceil(new_years_eve)), "2027-01-01");
        assert_eq!(micros(&Timestamp { seconds: -1, nanos: 0 }), None);
        assert_eq!(micros(&Timestamp { seconds: 0, nanos: -1 }), None);
    }

    proptest! {
        #[test]
        fn spans_hold_their_times(time in 0..4_000_000_000_000_000i64) {
            prop_assert_eq!(micros(&timestamp(time)), Some(time));
            for span in Span::ALL {
                let (floor, ceil) = (span.floor(time), span.ceil(time));
                prop_assert!(floor <= time && time <= ceil && ceil - floor <= span.length());
                prop_assert_eq!((span.floor(floor), span.ceil(ceil)), (floor, ceil));
            }
        }
    }
}
