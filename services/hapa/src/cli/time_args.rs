//! Durations and times as arguments: `90s`, `24h`, `7d`, `2026-01-31T12:00:00Z`.
//!
//! The duration grammar is deliberately narrower than humantime's and jiff's, which also accept `1.5h`, `1w` and
//! `1 day`.

use std::time::SystemTime;

use prost_types::Timestamp;

/// When a key expires.
#[derive(Clone, Copy, Debug)]
pub(super) enum KeyExpiry {
    At(Timestamp),
    Never,
}

/// Parses a number with the unit s, m, h or d into seconds; 0 needs no unit.
pub(super) fn parse_duration(text: &str) -> Result<u32, String> {
    let parse = || {
        if text == "0" {
            return Some(0);
        }
        let (index, unit) = text.char_indices().last()?;
        let unit: u32 = match unit {
            's' => 1,
            'm' => 60,
            'h' => 3_600,
            'd' => 86_400,
            _ => return None,
        };
        let number = &text[..index];
        let is_number = number.bytes().all(|byte| byte.is_ascii_digit());
        number.parse::<u32>().ok().filter(|_| is_number)?.checked_mul(unit)
    };
    parse().ok_or_else(|| "is not a duration such as 90s, 30m, 24h or 7d".to_owned())
}

/// Parses an RFC 3339 time, or a duration before the current time.
pub(super) fn parse_time(text: &str) -> Result<Timestamp, String> {
    match (text.parse(), parse_duration(text)) {
        (Ok(time), _) => Ok(time),
        (Err(_), Ok(seconds)) => Ok(seconds_from_now(-i64::from(seconds))),
        (Err(_), Err(_)) => {
            Err("is not a time such as 2026-01-31T12:00:00Z, nor a duration before \
                                 the current time such as 24h or 7d"
                .to_owned())
        }
    }
}

/// Parses an RFC 3339 time, or `never`.
pub(super) fn parse_expiry(text: &str) -> Result<KeyExpiry, String> {
    match text.parse() {
        _ if text == "never" => Ok(KeyExpiry::Never),
        Ok(time) => Ok(KeyExpiry::At(time)),
        Err(_) => Err("is not a time such as 2026-01-31T12:00:00Z, nor never".to_owned()),
    }
}

pub(super) fn days_from_now(days: u32) -> Timestamp {
    seconds_from_now(i64::from(days) * 86_400)
}

pub(super) fn seconds_from_now(seconds: i64) -> Timestamp {
    let now = Timestamp::from(SystemTime::now());
    Timestamp { seconds: now.seconds.saturating_add(seconds), ..now }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_parsed_and_anything_else_is_refused() {
        let cases = [("0", 0), ("90s", 90), ("30m", 1_800), ("24h", 86_400), ("7d", 604_800)];
        for (text, seconds) in cases {
            assert_eq!(parse_duration(text), Ok(seconds));
        }
        for text in ["", "7", "d", "-1d", "+1d", "1.5h", "1w", "1 d", "99999999d", "1分"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_time_is_absolute_or_a_duration_before_now() {
        let time = parse_time("2026-01-31T12:00:00+09:00").unwrap();
        assert_eq!(time.to_string(), "2026-01-31T03:00:00Z");
        let ago = seconds_from_now(0).seconds - parse_time("1h").unwrap().seconds;
        assert!((3_600..3_602).contains(&ago), "{ago}");
        assert!(parse_time("yesterday").is_err());
    }

    #[test]
    fn an_expiry_is_a_time_or_never() {
        assert!(matches!(parse_expiry("never"), Ok(KeyExpiry::Never)));
        assert!(matches!(parse_expiry("2030-01-01T00:00:00Z"), Ok(KeyExpiry::At(_))));
        assert!(parse_expiry("7d").is_err());
    }
}
