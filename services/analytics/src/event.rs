//! Usage events as RecordEvents receives them. A batch is accepted or rejected as a whole.

use std::collections::BTreeSet;

use hapa_core::timestamps::HOUR;
use hapa_core::violations::Violations;
use hapa_proto::analytics::v1::UsageEvent;
use uuid::Uuid;

use crate::latency_histogram::MAX_DURATION_US;
use crate::rollup_period::micros;

const MAX_BATCH_SIZE: usize = 1_000;
/// After this many violations validation stops: the reply names the first ones only.
const MAX_VIOLATION_COUNT: usize = 20;
const MAX_METHOD_LEN: usize = 200;
const MAX_NAME_LEN: usize = 100;
/// How far ahead of this clock the clock of the reporting service may be, in microseconds.
const MAX_CLOCK_SKEW: i64 = HOUR;

/// The event of one call. Times are microseconds.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct CallEvent {
    pub(crate) id: String,
    pub(crate) time: i64,
    pub(crate) service: String,
    pub(crate) method: String,
    pub(crate) error_code: String,
    pub(crate) grpc_status: String,
    pub(crate) key_id: String,
    pub(crate) user_id: String,
    pub(crate) owner: String,
    pub(crate) model: String,
    pub(crate) task: String,
    pub(crate) prompt_tokens: i64,
    pub(crate) completion_tokens: i64,
    pub(crate) duration_us: i64,
    /// As reported. Reports use [`CallEvent::first_answer_token_us`].
    pub(crate) time_to_first_answer_token_us: Option<i64>,
    /// Part of `completion_tokens`.
    pub(crate) reasoning_tokens: i64,
    pub(crate) time_to_first_token_us: Option<i64>,
    pub(crate) inter_token_us: Option<i64>,
    pub(crate) cache: CacheOutcome,
}

/// The result of the call's cache lookup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum CacheOutcome {
    NotConsulted = 0,
    Miss = 1,
    Hit = 2,
}

impl CallEvent {
    pub(crate) fn has_failed(&self) -> bool {
        !self.error_code.is_empty()
    }

    pub(crate) fn tokens(&self) -> i64 {
        self.prompt_tokens.saturating_add(self.completion_tokens)
    }

    /// The time to the first token of the answer. Without reasoning it is the first token. `None`:
    /// there was no token, or the model reasoned and did not answer.
    pub(crate) fn first_answer_token_us(&self) -> Option<i64> {
        let first = self.time_to_first_token_us.filter(|_| self.reasoning_tokens == 0);
        self.time_to_first_answer_token_us.or(first)
    }
}

/// Validates a batch. Returns its events sorted by id and without duplicates, so that all writers
/// lock rows in one order.
pub(crate) fn validate_batch(
    batch: Vec<UsageEvent>,
    now: i64,
) -> Result<Vec<CallEvent>, Violations> {
    if !(1..=MAX_BATCH_SIZE).contains(&batch.len()) {
        return Err(Violations::single("events", "must have 1 to 1000 entries"));
    }
    let mut violations = Violations::default();
    let mut events = Vec::with_capacity(batch.len());
    for (index, event) in batch.into_iter().enumerate() {
        match validate_event(event, now) {
            Ok(event) => events.push(event),
            Err(problems) => {
                for (field, problem) in problems {
                    violations.add_invalid(format!("events[{index}].{field}"), problem);
                }
            }
        }
        if violations.count() >= MAX_VIOLATION_COUNT {
            break;
        }
    }
    violations.check()?;
    let mut seen = BTreeSet::new();
    events.retain(|event| seen.insert(event.id.clone()));
    events.sort_unstable();
    Ok(events)
}

fn validate_event(
    event: UsageEvent,
    now: i64,
) -> Result<CallEvent, Vec<(&'static str, &'static str)>> {
    let mut violations = Vec::new();
    let mut check = |is_valid: bool, field, problem| {
        if !is_valid {
            violations.push((field, problem));
        }
    };
    let id = Uuid::try_parse(&event.event_id).ok().filter(|id| id.get_version_num() == 7);
    check(id.is_some(), "event_id", "must be a UUID of version 7");
    let time = event.time.as_ref().and_then(micros);
    check(event.time.is_some(), "time", "is required");
    let is_in_range = time.is_some_and(|time| time <= now.saturating_add(MAX_CLOCK_SKEW));
    let problem = "must be after 1970 and at most an hour ahead";
    check(event.time.is_none() || is_in_range, "time", problem);
    let problem = "must be /package.Service/Method of at most 200 characters";
    check(is_method(&event.method), "method", problem);
    let names = [
        ("error_code", &event.error_code),
        ("grpc_status", &event.grpc_status),
        ("key_id", &event.key_id),
        ("user_id", &event.user_id),
        ("owner", &event.owner),
        ("model", &event.model),
        ("task", &event.task),
        ("service", &event.service),
    ];
    for (field, text) in names {
        // PostgreSQL rejects NUL in TEXT values.
        let fits = text.chars().count() <= MAX_NAME_LEN && !text.contains('\0');
        check(fits, field, "must be at most 100 characters, none of them NUL");
    }
    check_numbers(&event, check);
    let (Some(id), Some(time), true) = (id, time, violations.is_empty()) else {
        return Err(violations);
    };
    Ok(to_call_event(event, id, time))
}

fn check_numbers(event: &UsageEvent, mut check: impl FnMut(bool, &'static str, &'static str)) {
    let micros = [
        ("duration_us", Some(event.duration_us)),
        ("time_to_first_token_us", event.time_to_first_token_us),
        ("inter_token_us", event.inter_token_us),
    ];
    for (field, micros) in micros {
        check(micros.is_none_or(|micros| micros >= 0), field, "must be 0 or more");
    }
    let is_later = event
        .time_to_first_answer_token_us
        .is_none_or(|answer| event.time_to_first_token_us.is_some_and(|first| answer >= first));
    let problem = "requires time_to_first_token_us and must not be less";
    check(is_later, "time_to_first_answer_token_us", problem);
    let is_part = event.reasoning_tokens <= event.completion_tokens;
    check(is_part, "reasoning_tokens", "must be at most completion_tokens");
    check(event.cacheable || !event.cached, "cached", "requires cacheable");
}

fn to_call_event(event: UsageEvent, id: Uuid, time: i64) -> CallEvent {
    let bounded = |time: i64| time.min(MAX_DURATION_US);
    CallEvent {
        // The canonical spelling, so that equal ids are equal texts.
        id: id.hyphenated().to_string(),
        time,
        service: event.service,
        method: event.method,
        error_code: event.error_code,
        grpc_status: event.grpc_status,
        key_id: event.key_id,
        user_id: event.user_id,
        owner: event.owner,
        model: event.model,
        task: event.task,
        prompt_tokens: event.prompt_tokens.into(),
        completion_tokens: event.completion_tokens.into(),
        reasoning_tokens: event.reasoning_tokens.into(),
        duration_us: event.duration_us.min(MAX_DURATION_US),
        time_to_first_token_us: event.time_to_first_token_us.map(bounded),
        time_to_first_answer_token_us: event.time_to_first_answer_token_us.map(bounded),
        inter_token_us: event.inter_token_us.map(bounded),
        cache: match (event.cacheable, event.cached) {
            (false, _) => CacheOutcome::NotConsulted,
            (true, false) => CacheOutcome::Miss,
            (true, true) => CacheOutcome::Hit,
        },
    }
}

fn is_method(text: &str) -> bool {
    let is_name = |part: &str| {
        let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._".contains(&byte);
        !part.is_empty() && part.bytes().all(is_allowed)
    };
    let parts = text.strip_prefix('/').and_then(|rest| rest.split_once('/'));
    let is_path = parts.is_some_and(|(service, method)| is_name(service) && is_name(method));
    is_path && text.len() <= MAX_METHOD_LEN
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use hapa_core::timestamps::timestamp;

    use super::*;

    const NOW: i64 = 1_800_000_000_000_000;

    fn good(number: u8) -> UsageEvent {
        UsageEvent {
            event_id: format!("0190163D-8694-739B-aea5-966c26f8ad{number:02x}"),
            time: Some(timestamp(NOW)),
            method: "/a.B/C".to_owned(),
            ..UsageEvent::default()
        }
    }

    fn wrong(batch: Vec<UsageEvent>) -> Vec<Cow<'static, str>> {
        validate_batch(batch, NOW).err().unwrap_or_default().fields()
    }

    #[test]
    fn an_event_counts_once_in_any_spelling_of_its_id() {
        let mut again = good(1);
        again.event_id = again.event_id.to_lowercase();
        let taken = validate_batch(vec![good(2), good(1), again], NOW).unwrap();
        let ids: Vec<_> = taken.iter().map(|event| &event.id[30..]).collect();
        assert_eq!(ids, ["f8ad01", "f8ad02"]);
    }

    #[test]
    fn every_invalid_field_of_a_batch_is_named_with_its_index() {
        assert_eq!(wrong(Vec::new()), ["events"]);
        assert_eq!(wrong(vec![good(1); 1_001]), ["events"]);
        let far = UsageEvent { time: Some(timestamp(NOW + MAX_CLOCK_SKEW + 1)), ..good(3) };
        assert_eq!(wrong(vec![good(1), good(2), good(3), far]), ["events[3].time"]);
        let bad = UsageEvent {
            event_id: "0190163d-8694-439b-aea5-966c26f8ad91".to_owned(),
            time: None,
            method: "a.B/C".to_owned(),
            owner: "x".repeat(101),
            model: "a\0b".to_owned(),
            duration_us: -1,
            inter_token_us: Some(-1),
            time_to_first_answer_token_us: Some(1),
            reasoning_tokens: 1,
            cached: true,
            ..UsageEvent::default()
        };
        let fields = "event_id time method owner model duration_us inter_token_us \
                      time_to_first_answer_token_us reasoning_tokens cached";
        let named: Vec<_> = fields.split(' ').map(|field| format!("events[0].{field}")).collect();
        assert_eq!(wrong(vec![bad.clone()]), named);
        assert!(wrong(vec![bad; 1_000]).len() < 2 * MAX_VIOLATION_COUNT);
        assert!(!is_method("/a.B/C/D") && !is_method("//C") && !is_method("/a.B/"));
    }

    #[test]
    fn the_first_answer_token_is_the_first_token_unless_the_model_reasoned() {
        let answer = |first, answer, reasoning_tokens| {
            let event = UsageEvent {
                time_to_first_token_us: first,
                time_to_first_answer_token_us: answer,
                reasoning_tokens,
                completion_tokens: 9,
                ..good(1)
            };
            validate_batch(vec![event], NOW).unwrap()[0].first_answer_token_us()
        };
        assert_eq!(answer(Some(5), Some(5), 0), Some(5));
        assert_eq!(answer(Some(5), Some(7), 3), Some(7));
        assert_eq!(answer(Some(5), None, 0), Some(5));
        assert_eq!(answer(Some(5), None, 9), None, "it reasoned and did not answer");
        assert_eq!(answer(None, None, 0), None);
        assert_eq!(answer(Some(5), Some(i64::MAX), 3), Some(MAX_DURATION_US));
        let early = UsageEvent {
            time_to_first_token_us: Some(5),
            time_to_first_answer_token_us: Some(4),
            ..good(1)
        };
        assert_eq!(wrong(vec![early]), ["events[0].time_to_first_answer_token_us"]);
    }
}
