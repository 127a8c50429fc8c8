//! Checks of a batch of occurrences. A batch is taken whole or not at all, and the first fields that
//! are wrong are named, as `occurrences[3].time`.

use hapa_core::call::is_request_id;
use hapa_core::rpc_error::ErrorCode;
use hapa_core::timestamps::{MINUTE, micros};
use hapa_core::violations::Violations;
use hapa_proto::errors::v1::Occurrence;
use prost_types::{Duration, Timestamp};
use uuid::{Uuid, Version};

const MOST: usize = 1_000;
/// Fields that one refusal names: its details travel in a header.
const MOST_NAMED: usize = 20;
const LONGEST_METHOD: usize = 200;
const LONGEST_MESSAGE: usize = 2_000;
const MOST_CAUSES: usize = 20;
const LONGEST_CAUSE: usize = 500;
const LONGEST_NAME: usize = 100;
const LONGEST_VERSION: usize = 50;
const LONGEST_ACTOR: usize = 200;
/// How far the clocks of a mesh may be apart.
const AHEAD: i64 = 10 * MINUTE;
/// A year, in seconds.
const LONGEST_DURATION: i64 = 31_536_000;

const REQUIRED: &str = "is required";

/// Whether all of a batch can be taken.
pub(crate) fn batch(occurrences: &[Occurrence], now: i64) -> Result<(), Violations> {
    let mut found = Violations::default();
    if occurrences.is_empty() {
        found.missing("occurrences");
    } else if occurrences.len() > MOST {
        return Err(Violations::one("occurrences", "takes at most 1000"));
    }
    for (index, occurrence) in occurrences.iter().enumerate() {
        let mut find = |field: &str, problem: &'static str| {
            let field = format!("occurrences[{index}].{field}");
            match problem {
                _ if found.count() >= MOST_NAMED => {}
                REQUIRED => found.missing(field),
                _ => found.wrong(field, problem),
            }
        };
        names(occurrence, &mut find);
        texts(occurrence, &mut find);
        moments(occurrence, now, &mut find);
    }
    found.check()
}

/// Takes a field and what is wrong with it.
type Find<'a> = &'a mut dyn FnMut(&str, &'static str);

fn names(occurrence: &Occurrence, find: Find<'_>) {
    if occurrence.event_id.is_empty() {
        find("event_id", REQUIRED);
    } else if !is_event_id(&occurrence.event_id) {
        find("event_id", "must be a UUID of version 7");
    }
    if !occurrence.incident_id.is_empty() && !is_incident_id(&occurrence.incident_id) {
        find("incident_id", "must be INC-YYYYMMDD-XXXXXXXX or nothing");
    }
    if occurrence.error_code.is_empty() {
        find("error_code", REQUIRED);
    } else if !is_code(&occurrence.error_code) {
        find("error_code", "must be one of the published codes");
    }
    if !occurrence.request_id.is_empty() && !is_request_id(&occurrence.request_id) {
        find("request_id", "must be at most 128 letters, digits and -_. or nothing");
    }
    let trace = &occurrence.trace_id;
    let is_trace = trace.len() == 32 && trace.bytes().all(|byte| byte.is_ascii_hexdigit());
    if !trace.is_empty() && !is_trace {
        find("trace_id", "must be 32 hex digits or nothing");
    }
}

fn texts(occurrence: &Occurrence, find: Find<'_>) {
    let fits = |text: &str, most| text.len() <= most || text.chars().count() <= most;
    let plain = |text: &str, most| fits(text, most) && !text.chars().any(char::is_control);
    if occurrence.method.is_empty() {
        find("method", REQUIRED);
    } else if !plain(&occurrence.method, LONGEST_METHOD) {
        find("method", "must be at most 200 characters without control characters");
    }
    if !fits(&occurrence.message, LONGEST_MESSAGE) {
        find("message", "must be at most 2000 characters");
    }
    let long = occurrence.causes.iter().any(|cause| !fits(cause, LONGEST_CAUSE));
    if occurrence.causes.len() > MOST_CAUSES || long {
        find("causes", "takes at most 20 of at most 500 characters");
    }
    for (field, text) in [("service", &occurrence.service), ("owner", &occurrence.owner)] {
        if !plain(text, LONGEST_NAME) {
            find(field, "must be at most 100 characters without control characters");
        }
    }
    if !plain(&occurrence.version, LONGEST_VERSION) {
        find("version", "must be at most 50 characters without control characters");
    }
    if !plain(&occurrence.actor, LONGEST_ACTOR) {
        find("actor", "must be at most 200 characters without control characters");
    }
}

fn moments(occurrence: &Occurrence, now: i64, find: Find<'_>) {
    match &occurrence.time {
        None => find("time", REQUIRED),
        Some(time) if !is_time(time) => find("time", "must be a valid time since 1970"),
        Some(time) if micros(time) > now + AHEAD => {
            find("time", "must not be more than 10 minutes ahead");
        }
        Some(_) => {}
    }
    let valid = |duration: &Duration| {
        (0..=LONGEST_DURATION).contains(&duration.seconds)
            && (0..1_000_000_000).contains(&duration.nanos)
    };
    if !occurrence.duration.as_ref().is_none_or(valid) {
        find("duration", "must be a valid duration from 0 to a year");
    }
}

fn is_time(time: &Timestamp) -> bool {
    time.seconds >= 0 && (0..1_000_000_000).contains(&time.nanos)
}

/// In the one spelling in which two of them can be told to be the same.
fn is_event_id(text: &str) -> bool {
    let id = Uuid::try_parse(text).ok();
    id.is_some_and(|id| {
        id.get_version() == Some(Version::SortRand)
            && id.hyphenated().encode_lower(&mut Uuid::encode_buffer()) == text
    })
}

fn is_code(text: &str) -> bool {
    ErrorCode::ALL.iter().any(|code| code.entry().name == text)
}

/// A filter by code.
pub(crate) fn code_or_none(text: &str, found: &mut Violations) {
    if !text.is_empty() && !is_code(text) {
        found.wrong("error_code", "must be one of the published codes, or nothing");
    }
}

/// Whether this names something that a user was shown.
pub(crate) fn is_incident_id(text: &str) -> bool {
    let hex = |byte: u8| matches!(byte, b'0'..=b'9' | b'A'..=b'F');
    let rest = text.strip_prefix("INC-").and_then(|rest| rest.split_once('-'));
    rest.is_some_and(|(day, tail)| {
        day.len() == 8
            && day.bytes().all(|byte| byte.is_ascii_digit())
            && tail.len() == 8
            && tail.bytes().all(hex)
    })
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use hapa_core::rpc_error::Fault;
    use hapa_core::timestamps::now;
    use hapa_core::timestamps::timestamp;
    use proptest::prelude::*;

    use super::*;

    fn good() -> Occurrence {
        Occurrence {
            event_id: Uuid::now_v7().to_string(),
            incident_id: "INC-20260101-0123ABCD".to_owned(),
            time: Some(timestamp(now())),
            error_code: "E5006".to_owned(),
            method: "/a.B/C".to_owned(),
            ..Occurrence::default()
        }
    }

    fn fields(occurrences: &[Occurrence]) -> Vec<Cow<'static, str>> {
        batch(occurrences, now()).err().unwrap_or_default().fields()
    }

    #[test]
    fn every_wrong_field_is_named_with_its_place() {
        assert_eq!(fields(&[good()]), Vec::<String>::new());
        assert_eq!(fields(&[]), ["occurrences"]);
        assert_eq!(fields(&vec![good(); 1_001]), ["occurrences"]);
        let missing = ["event_id", "error_code", "method", "time"];
        let missing = missing.map(|field| format!("occurrences[1].{field}"));
        assert_eq!(fields(&[good(), Occurrence::default()]), missing);
        let wrong = Occurrence {
            event_id: Uuid::nil().to_string(),
            incident_id: "INC-1".to_owned(),
            error_code: "E9999".to_owned(),
            request_id: "a b".to_owned(),
            trace_id: "x".to_owned(),
            method: "m".repeat(201),
            message: "m".repeat(2_001),
            causes: vec![String::new(); 21],
            service: "a\nb".to_owned(),
            owner: "o".repeat(101),
            version: "v".repeat(51),
            actor: "a".repeat(201),
            time: Some(timestamp(now() + 11 * MINUTE)),
            duration: Some(Duration { seconds: -1, nanos: 0 }),
            ..Occurrence::default()
        };
        assert_eq!(fields(&[wrong]).len(), 14);
    }

    #[test]
    fn what_is_only_missing_has_a_code_of_its_own() {
        let code = |occurrence| Fault::from(batch(&[occurrence], now()).unwrap_err()).code();
        assert_eq!(code(Occurrence { time: None, ..good() }), ErrorCode::MissingField);
        let wrong = Occurrence { time: None, trace_id: "x".to_owned(), ..good() };
        assert_eq!(code(wrong), ErrorCode::InvalidInput);
        assert_eq!(fields(&vec![Occurrence::default(); 1_000]).len(), MOST_NAMED);
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "\\PC{0,60}", seconds: i64, nanos: i32) {
            let time = Some(Timestamp { seconds, nanos });
            let id = text.clone();
            let odd = Occurrence { event_id: id.clone(), incident_id: id, time, ..good() };
            let _ = batch(&[odd], now());
        }
    }
}
