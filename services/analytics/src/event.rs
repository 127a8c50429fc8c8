//! Events as they come in: checked all together, so that a batch is taken whole or not at all.

use std::collections::BTreeSet;

use hapa_core::timestamps::HOUR;
use hapa_core::violations::Violations;
use hapa_proto::analytics::v1::UsageEvent;
use uuid::Uuid;

use crate::sketch::LONGEST;
use crate::times::micros;

const MOST: usize = 1_000;
/// Wrong fields that are named; one who sends more has enough to do.
const MOST_NAMED: usize = 20;
const LONGEST_METHOD: usize = 200;
const LONGEST_NAME: usize = 100;
/// How far ahead the clock of who saw a call may be.
const AHEAD: i64 = HOUR;

/// One call.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Event {
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
    pub(crate) time_to_first_token_us: Option<i64>,
    pub(crate) inter_token_us: Option<i64>,
    pub(crate) cache: Cache,
}

/// What a cache did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Cache {
    Unasked = 0,
    Missed = 1,
    Answered = 2,
}

impl Event {
    pub(crate) fn failed(&self) -> bool {
        !self.error_code.is_empty()
    }

    pub(crate) fn tokens(&self) -> i64 {
        self.prompt_tokens.saturating_add(self.completion_tokens)
    }
}

/// Checks a batch. By id, each once: rows are always locked in one order.
pub(crate) fn events(batch: Vec<UsageEvent>, now: i64) -> Result<Vec<Event>, Violations> {
    if !(1..=MOST).contains(&batch.len()) {
        return Err(Violations::one("events", "must be 1 to 1000"));
    }
    let mut found = Violations::default();
    let mut events = Vec::with_capacity(batch.len());
    for (index, event) in batch.into_iter().enumerate() {
        match checked(event, now) {
            Ok(event) => events.push(event),
            Err(problems) => {
                for (field, problem) in problems {
                    found.wrong(format!("events[{index}].{field}"), problem);
                }
            }
        }
        if found.count() >= MOST_NAMED {
            break;
        }
    }
    found.check()?;
    let mut seen = BTreeSet::new();
    events.retain(|event| seen.insert(event.id.clone()));
    events.sort_unstable();
    Ok(events)
}

fn checked(event: UsageEvent, now: i64) -> Result<Event, Vec<(&'static str, &'static str)>> {
    let mut found = Vec::new();
    let mut check = |holds: bool, field, problem| {
        if !holds {
            found.push((field, problem));
        }
    };
    let id = Uuid::try_parse(&event.event_id).ok().filter(|id| id.get_version_num() == 7);
    check(id.is_some(), "event_id", "must be a UUID of version 7");
    let time = event.time.as_ref().and_then(micros);
    check(event.time.is_some(), "time", "is required");
    let in_time = time.is_some_and(|time| time <= now.saturating_add(AHEAD));
    let problem = "must be after 1970 and at most an hour ahead";
    check(event.time.is_none() || in_time, "time", problem);
    let method = is_method(&event.method);
    check(method, "method", "must be /package.Service/Method of at most 200 characters");
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
        // PostgreSQL stores no NUL.
        let fits = text.chars().count() <= LONGEST_NAME && !text.contains('\0');
        check(fits, field, "must be at most 100 characters, none of them NUL");
    }
    let micros = [
        ("duration_us", Some(event.duration_us)),
        ("time_to_first_token_us", event.time_to_first_token_us),
        ("inter_token_us", event.inter_token_us),
    ];
    for (field, micros) in micros {
        check(micros.is_none_or(|micros| micros >= 0), field, "must be 0 or more");
    }
    check(event.cacheable || !event.cached, "cached", "needs cacheable");
    let (Some(id), Some(time), true) = (id, time, found.is_empty()) else { return Err(found) };
    Ok(taken(event, id, time))
}

fn taken(event: UsageEvent, id: Uuid, time: i64) -> Event {
    Event {
        // One spelling, whatever it came in.
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
        duration_us: event.duration_us.min(LONGEST),
        time_to_first_token_us: event.time_to_first_token_us.map(|time| time.min(LONGEST)),
        inter_token_us: event.inter_token_us.map(|time| time.min(LONGEST)),
        cache: match (event.cacheable, event.cached) {
            (false, _) => Cache::Unasked,
            (true, false) => Cache::Missed,
            (true, true) => Cache::Answered,
        },
    }
}

fn is_method(text: &str) -> bool {
    let plain = |part: &str| {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._".contains(&byte);
        !part.is_empty() && part.bytes().all(plain)
    };
    let parts = text.strip_prefix('/').and_then(|rest| rest.split_once('/'));
    let whole = parts.is_some_and(|(service, method)| plain(service) && plain(method));
    whole && text.len() <= LONGEST_METHOD
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
        events(batch, NOW).err().unwrap_or_default().fields()
    }

    #[test]
    fn an_event_counts_once_however_its_id_is_spelt() {
        let mut again = good(1);
        again.event_id = again.event_id.to_lowercase();
        let taken = events(vec![good(2), good(1), again], NOW).unwrap();
        let ids: Vec<_> = taken.iter().map(|event| &event.id[30..]).collect();
        assert_eq!(ids, ["f8ad01", "f8ad02"]);
    }

    #[test]
    fn every_wrong_field_of_a_batch_is_named_with_its_place() {
        assert_eq!(wrong(Vec::new()), ["events"]);
        assert_eq!(wrong(vec![good(1); 1_001]), ["events"]);
        let far = UsageEvent { time: Some(timestamp(NOW + AHEAD + 1)), ..good(3) };
        assert_eq!(wrong(vec![good(1), good(2), good(3), far]), ["events[3].time"]);
        let bad = UsageEvent {
            event_id: "0190163d-8694-439b-aea5-966c26f8ad91".to_owned(),
            time: None,
            method: "a.B/C".to_owned(),
            owner: "x".repeat(101),
            model: "a\0b".to_owned(),
            duration_us: -1,
            inter_token_us: Some(-1),
            cached: true,
            ..UsageEvent::default()
        };
        let fields = "event_id time method owner model duration_us inter_token_us cached";
        let named: Vec<_> = fields.split(' ').map(|field| format!("events[0].{field}")).collect();
        assert_eq!(wrong(vec![bad.clone()]), named);
        assert!(wrong(vec![bad; 1_000]).len() < 2 * MOST_NAMED);
        assert!(!is_method("/a.B/C/D") && !is_method("//C") && !is_method("/a.B/"));
    }
}
