//! Spans and moments as people type them: `90s`, `24h`, `7d`, `2026-01-31T12:00:00Z`.

use std::time::SystemTime;

use prost_types::Timestamp;

/// When a key ends.
#[derive(Clone, Copy, Debug)]
pub(super) enum End {
    At(Timestamp),
    Never,
}

/// Seconds, from a number with s, m, h or d behind it; 0 needs none.
pub(super) fn span(text: &str) -> Result<u32, String> {
    let parse = || {
        if text == "0" {
            return Some(0);
        }
        let (at, unit) = text.char_indices().last()?;
        let unit: u32 = match unit {
            's' => 1,
            'm' => 60,
            'h' => 3_600,
            'd' => 86_400,
            _ => return None,
        };
        let number = &text[..at];
        let digits = number.bytes().all(|byte| byte.is_ascii_digit());
        number.parse::<u32>().ok().filter(|_| digits)?.checked_mul(unit)
    };
    parse().ok_or_else(|| "is not like 90s, 30m, 24h or 7d".to_owned())
}

/// A time in RFC 3339, or so long ago.
pub(super) fn moment(text: &str) -> Result<Timestamp, String> {
    match (text.parse(), span(text)) {
        (Ok(time), _) => Ok(time),
        (Err(_), Ok(seconds)) => Ok(from_now(-i64::from(seconds))),
        (Err(_), Err(_)) => {
            Err("is not like 2026-01-31T12:00:00Z, nor like 24h or 7d (so long ago)".to_owned())
        }
    }
}

/// A time in RFC 3339, or never.
pub(super) fn end(text: &str) -> Result<End, String> {
    match text.parse() {
        _ if text == "never" => Ok(End::Never),
        Ok(time) => Ok(End::At(time)),
        Err(_) => Err("is not like 2026-01-31T12:00:00Z, nor never".to_owned()),
    }
}

/// After so many days.
pub(super) fn in_days(days: u32) -> Timestamp {
    from_now(i64::from(days) * 86_400)
}

pub(super) fn from_now(seconds: i64) -> Timestamp {
    let now = Timestamp::from(SystemTime::now());
    Timestamp { seconds: now.seconds.saturating_add(seconds), ..now }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_read_and_what_is_none_is_refused() {
        let cases = [("0", 0), ("90s", 90), ("30m", 1_800), ("24h", 86_400), ("7d", 604_800)];
        for (text, seconds) in cases {
            assert_eq!(span(text), Ok(seconds));
        }
        for text in ["", "7", "d", "-1d", "+1d", "1.5h", "1w", "1 d", "99999999d", "1分"] {
            assert!(span(text).is_err(), "{text}");
        }
    }

    #[test]
    fn moments_are_times_or_so_long_ago() {
        let time = moment("2026-01-31T12:00:00+09:00").unwrap();
        assert_eq!(time.to_string(), "2026-01-31T03:00:00Z");
        let ago = from_now(0).seconds - moment("1h").unwrap().seconds;
        assert!((3_600..3_602).contains(&ago), "{ago}");
        assert!(moment("yesterday").is_err());
    }

    #[test]
    fn an_end_is_a_time_or_never() {
        assert!(matches!(end("never"), Ok(End::Never)));
        assert!(matches!(end("2030-01-01T00:00:00Z"), Ok(End::At(_))));
        assert!(end("7d").is_err());
    }
}
