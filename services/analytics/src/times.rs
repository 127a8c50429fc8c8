//! Times as the store keeps them (microseconds since 1970) and as the wire shows them, and the
//! spans of UTC by which events are summed up.

use std::time::{SystemTime, UNIX_EPOCH};

use prost_types::Timestamp;
use time::OffsetDateTime;

const MICROS: i64 = 1_000_000;
/// A second, a minute, an hour, a day.
pub(crate) const SECOND: i64 = MICROS;
pub(crate) const MINUTE: i64 = 60 * SECOND;
pub(crate) const HOUR: i64 = 60 * MINUTE;
pub(crate) const DAY: i64 = 24 * HOUR;
/// The last second that RFC 3339 can write.
const LATEST: i64 = 253_402_300_799;

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

/// Now.
pub(crate) fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_micros()).unwrap_or(i64::MAX)
}

pub(crate) fn timestamp(micros: i64) -> Timestamp {
    let nanos = i32::try_from(micros.rem_euclid(MICROS) * 1_000).unwrap_or_default();
    Timestamp { seconds: micros.div_euclid(MICROS), nanos }
}

/// Of a valid time from 1970 on.
pub(crate) fn micros(time: &Timestamp) -> Option<i64> {
    let valid = (0..=LATEST).contains(&time.seconds) && (0..1_000_000_000).contains(&time.nanos);
    valid.then(|| time.seconds * MICROS + i64::from(time.nanos / 1_000))
}

/// The day of a moment, as 2026-01-31.
pub(crate) fn day(micros: i64) -> String {
    let time = OffsetDateTime::from_unix_timestamp(micros.div_euclid(MICROS));
    let date = time.unwrap_or(OffsetDateTime::UNIX_EPOCH).date();
    format!("{:04}-{:02}-{:02}", date.year(), u8::from(date.month()), date.day())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

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
