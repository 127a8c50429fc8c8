//! Validates a batch of occurrences. A batch is accepted or rejected as a whole. The reply names
//! the first invalid fields, such as `occurrences[3].time`.

use hapa_core::call::is_request_id;
use hapa_core::rpc_error::ErrorCode;
use hapa_core::timestamps::{MINUTE, micros};
use hapa_core::violations::Violations;
use hapa_proto::errors::v1::Occurrence;
use prost_types::{Duration, Timestamp};
use uuid::{Uuid, Version};

const MAX_BATCH_SIZE: usize = 1_000;
/// Most violations that one reply names: its details travel in a header.
const MAX_VIOLATION_COUNT: usize = 20;
const MAX_METHOD_LEN: usize = 200;
const MAX_MESSAGE_LEN: usize = 2_000;
const MAX_CAUSE_COUNT: usize = 20;
const MAX_CAUSE_LEN: usize = 500;
const MAX_NAME_LEN: usize = 100;
const MAX_VERSION_LEN: usize = 50;
const MAX_ACTOR_LEN: usize = 200;
/// How far ahead of this clock a reporter's clock may be.
const MAX_CLOCK_SKEW: i64 = 10 * MINUTE;
/// A year.
const MAX_DURATION_SECONDS: i64 = 31_536_000;

const REQUIRED: &str = "is required";

/// Validates all occurrences of a batch.
pub(crate) fn validate_batch(occurrences: &[Occurrence], now: i64) -> Result<(), Violations> {
    let mut violations = Violations::default();
    if occurrences.is_empty() {
        violations.add_missing("occurrences");
    } else if occurrences.len() > MAX_BATCH_SIZE {
        return Err(Violations::single("occurrences", "must have at most 1000 entries"));
    }
    for (index, occurrence) in occurrences.iter().enumerate() {
        let mut report = |field: &str, problem: &'static str| {
            let field = format!("occurrences[{index}].{field}");
            match problem {
                _ if violations.count() >= MAX_VIOLATION_COUNT => {}
                REQUIRED => violations.add_missing(field),
                _ => violations.add_invalid(field, problem),
            }
        };
        validate_ids(occurrence, &mut report);
        validate_texts(occurrence, &mut report);
        validate_times(occurrence, now, &mut report);
    }
    violations.check()
}

/// Called with the field and the problem of each violation.
type Report<'a> = &'a mut dyn FnMut(&str, &'static str);

fn validate_ids(occurrence: &Occurrence, report: Report<'_>) {
    if occurrence.event_id.is_empty() {
        report("event_id", REQUIRED);
    } else if !is_event_id(&occurrence.event_id) {
        report("event_id", "must be a UUID of version 7");
    }
    if !occurrence.incident_id.is_empty() && !is_incident_id(&occurrence.incident_id) {
        report("incident_id", "must be INC-YYYYMMDD-XXXXXXXX or empty");
    }
    if occurrence.error_code.is_empty() {
        report("error_code", REQUIRED);
    } else if !is_published_code(&occurrence.error_code) {
        report("error_code", "must be one of the published codes");
    }
    if !occurrence.request_id.is_empty() && !is_request_id(&occurrence.request_id) {
        report("request_id", "must be at most 128 letters, digits and -_. or empty");
    }
    let trace = &occurrence.trace_id;
    let is_trace_id = trace.len() == 32 && trace.bytes().all(|byte| byte.is_ascii_hexdigit());
    if !trace.is_empty() && !is_trace_id {
        report("trace_id", "must be 32 hexadecimal digits or empty");
    }
}

fn validate_texts(occurrence: &Occurrence, report: Report<'_>) {
    let fits = |text: &str, max| text.len() <= max || text.chars().count() <= max;
    let is_plain = |text: &str, max| fits(text, max) && !text.chars().any(char::is_control);
    if occurrence.method.is_empty() {
        report("method", REQUIRED);
    } else if !is_plain(&occurrence.method, MAX_METHOD_LEN) {
        report("method", "must be at most 200 characters without control characters");
    }
    if !fits(&occurrence.message, MAX_MESSAGE_LEN) {
        report("message", "must be at most 2000 characters");
    }
    let has_long_cause = occurrence.causes.iter().any(|cause| !fits(cause, MAX_CAUSE_LEN));
    if occurrence.causes.len() > MAX_CAUSE_COUNT || has_long_cause {
        report("causes", "must have at most 20 entries of at most 500 characters");
    }
    for (field, text) in [("service", &occurrence.service), ("owner", &occurrence.owner)] {
        if !is_plain(text, MAX_NAME_LEN) {
            report(field, "must be at most 100 characters without control characters");
        }
    }
    if !is_plain(&occurrence.version, MAX_VERSION_LEN) {
        report("version", "must be at most 50 characters without control characters");
    }
    if !is_plain(&occurrence.actor, MAX_ACTOR_LEN) {
        report("actor", "must be at most 200 characters without control characters");
    }
}

fn validate_times(occurrence: &Occurrence, now: i64, report: Report<'_>) {
    match &occurrence.time {
        None => report("time", REQUIRED),
        Some(time) if !is_time(time) => report("time", "must be a valid time since 1970"),
        Some(time) if micros(time) > now + MAX_CLOCK_SKEW => {
            report("time", "must not be more than 10 minutes ahead");
        }
        Some(_) => {}
    }
    let is_valid = |duration: &Duration| {
        (0..=MAX_DURATION_SECONDS).contains(&duration.seconds)
            && (0..1_000_000_000).contains(&duration.nanos)
    };
    if !occurrence.duration.as_ref().is_none_or(is_valid) {
        report("duration", "must be a valid duration from 0 to a year");
    }
}

fn is_time(time: &Timestamp) -> bool {
    time.seconds >= 0 && (0..1_000_000_000).contains(&time.nanos)
}

/// Accepts the lower-case hyphenated spelling only, so that equal ids are equal texts.
fn is_event_id(text: &str) -> bool {
    let id = Uuid::try_parse(text).ok();
    id.is_some_and(|id| {
        id.get_version() == Some(Version::SortRand)
            && id.hyphenated().encode_lower(&mut Uuid::encode_buffer()) == text
    })
}

fn is_published_code(text: &str) -> bool {
    ErrorCode::ALL.iter().any(|code| code.entry().name == text)
}

/// The meaning of a published error code; "" for any other text.
pub(crate) fn published_meaning(text: &str) -> &'static str {
    let entries = ErrorCode::ALL.iter().map(|code| code.entry());
    entries.into_iter().find(|entry| entry.name == text).map_or("", |entry| entry.meaning)
}

/// Validates the error code of a list filter; "" filters nothing.
pub(crate) fn validate_code_filter(text: &str, violations: &mut Violations) {
    if !text.is_empty() && !is_published_code(text) {
        violations.add_invalid("error_code", "must be one of the published codes or empty");
    }
}

/// Whether a text has the form of an incident id, INC-YYYYMMDD-XXXXXXXX.
pub(crate) fn is_incident_id(text: &str) -> bool {
    let is_upper_hex = |byte: u8| matches!(byte, b'0'..=b'9' | b'A'..=b'F');
    let parts = text.strip_prefix("INC-").and_then(|rest| rest.split_once('-'));
    parts.is_some_and(|(day, suffix)| {
        day.len() == 8
            && day.bytes().all(|byte| byte.is_ascii_digit())
            && suffix.len() == 8
            && suffix.bytes().all(is_upper_hex)
    })
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use hapa_core::rpc_error::RpcError;
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
        validate_batch(occurrences, now()).err().unwrap_or_default().fields()
    }

    #[test]
    fn every_invalid_field_is_named_with_its_index() {
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
    fn missing_fields_alone_give_the_missing_field_code() {
        let code =
            |occurrence| RpcError::from(validate_batch(&[occurrence], now()).unwrap_err()).code();
        assert_eq!(code(Occurrence { time: None, ..good() }), ErrorCode::MissingField);
        let wrong = Occurrence { time: None, trace_id: "x".to_owned(), ..good() };
        assert_eq!(code(wrong), ErrorCode::InvalidInput);
        assert_eq!(fields(&vec![Occurrence::default(); 1_000]).len(), MAX_VIOLATION_COUNT);
    }

    proptest! {
        #[test]
        fn validation_never_panics(text in "\\PC{0,60}", seconds: i64, nanos: i32) {
            let time = Some(Timestamp { seconds, nanos });
            let id = text.clone();
            let odd = Occurrence { event_id: id.clone(), incident_id: id, time, ..good() };
            let _ = validate_batch(&[odd], now());
        }
    }
}
