//! Parses the `Retry-After` header of an engine, or of a proxy in front of it, and bounds its value.
//! <https://www.rfc-editor.org/rfc/rfc9110#field.retry-after>

use std::time::{Duration, SystemTime};

use reqwest::header::{HeaderMap, RETRY_AFTER};

/// A more precise delay, in milliseconds, as OpenAI and Azure send it.
const RETRY_AFTER_MS: &str = "retry-after-ms";
/// Lower bound: 0 would make clients retry in a loop.
const MIN_RETRY_AFTER: Duration = Duration::from_secs(1);
/// Upper bound.
const MAX_RETRY_AFTER: Duration = Duration::from_mins(10);

/// The delay that the headers of a response ask for.
pub(super) fn from_headers(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let precise = text(RETRY_AFTER_MS).and_then(parse_milliseconds);
    precise.or_else(|| text(RETRY_AFTER.as_str()).and_then(|text| parse(text, now)))
}

/// Parses milliseconds, rounded up to seconds.
fn parse_milliseconds(text: &str) -> Option<Duration> {
    let wait = seconds(text.trim())?.as_secs().div_ceil(1_000);
    Some(Duration::from_secs(wait).clamp(MIN_RETRY_AFTER, MAX_RETRY_AFTER))
}

/// Parses seconds or an HTTP date. `None` for anything else, such as a negative number.
fn parse(text: &str, now: SystemTime) -> Option<Duration> {
    let text = text.trim();
    let wait = seconds(text).or_else(|| {
        let until = httpdate::parse_http_date(text).ok()?;
        // A date in the past means now.
        Some(until.duration_since(now).unwrap_or_default())
    });
    wait.map(|wait| wait.clamp(MIN_RETRY_AFTER, MAX_RETRY_AFTER))
}

/// Whole seconds, as in the standard, or with a fraction, as some proxies send. Rounds up.
fn seconds(text: &str) -> Option<Duration> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, "0"));
    let is_number = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    if !is_number(whole) || !is_number(fraction) {
        return None;
    }
    let more = u64::from(fraction.bytes().any(|byte| byte != b'0'));
    // Only digits, so a failure means overflow.
    let whole: u64 = whole.parse().unwrap_or(u64::MAX);
    Some(Duration::from_secs(whole.saturating_add(more)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Sun, 06 Nov 1994 08:49:37 GMT.
    fn now() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777)
    }

    #[test]
    fn seconds_and_dates_of_every_form_are_parsed_and_bounded() {
        for (text, expected) in [
            ("7", Some(7)),
            (" 7 ", Some(7)),
            ("1.5", Some(2)),
            ("0", Some(1)),
            ("600", Some(600)),
            ("601", Some(600)),
            ("86400", Some(600)),
            ("99999999999999999999999999", Some(600)),
            ("99999999999999999999999999.5", Some(600)),
            ("Sun, 06 Nov 1994 08:50:07 GMT", Some(30)),
            ("Sunday, 06-Nov-94 08:50:07 GMT", Some(30)),
            ("Sun Nov  6 08:50:07 1994", Some(30)),
            ("Fri, 31 Dec 9999 23:59:59 GMT", Some(600)),
            ("Sun, 06 Nov 1994 08:00:00 GMT", Some(1)),
            ("-5", None),
            ("-99999999999999999999", None),
            ("1e9", None),
            ("inf", None),
            ("NaN", None),
            ("soon", None),
            ("", None),
            (".", None),
            ("5.", None),
        ] {
            let expected = expected.map(Duration::from_secs);
            assert_eq!(parse(text, now()), expected, "{text}");
        }
    }

    #[test]
    fn milliseconds_are_preferred_rounded_up_and_bounded() {
        for (milliseconds, seconds, expected) in [
            (Some("1500"), Some("9"), Some(2)),
            (Some("20.5"), None, Some(1)),
            (Some("999999999999999999999"), None, Some(600)),
            (Some("soon"), Some("9"), Some(9)),
            (Some("-5"), None, None),
            (None, Some("9"), Some(9)),
            (None, None, None),
        ] {
            let mut headers = HeaderMap::new();
            for (name, value) in [(RETRY_AFTER_MS, milliseconds), ("retry-after", seconds)] {
                value.map(|value| headers.insert(name, value.parse().unwrap()));
            }
            let expected = expected.map(Duration::from_secs);
            assert_eq!(from_headers(&headers, now()), expected, "{milliseconds:?} {seconds:?}");
        }
    }

    proptest! {
        #[test]
        fn every_parsed_value_is_within_bounds(text in "\\PC{0,40}", number in any::<i128>()) {
            for text in [text, number.to_string()] {
                let wait = parse(&text, now());
                prop_assert!(wait.is_none_or(|wait| (MIN_RETRY_AFTER..=MAX_RETRY_AFTER).contains(&wait)));
            }
        }
    }
}
