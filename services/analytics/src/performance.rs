//! How calls went in a window: the RPC's part that decides which rollups, and what they say.

use std::collections::BTreeMap;

use hapa_core::timestamps::{DAY, HOUR, MINUTE, SECOND, now, timestamp};
use hapa_core::violations::Violations;
use hapa_proto::analytics::v1::get_performance_response::{AiModelUsage, Group, Percentiles};
use hapa_proto::analytics::v1::{GetPerformanceRequest, GetPerformanceResponse};
use prost_types::Timestamp;

use crate::error::Error;
use crate::rollup::Tally;
use crate::sketch::{Sketch, float};
use crate::store::{Store, Which};
use crate::times::{Span, micros};

/// Groups in a reply that have their own names.
const MOST_GROUPS: usize = 50;
/// The name of what all others add up to.
const OTHER: &str = "other";
/// Longest window that is summed up from minutes, and from hours: with what rounding adds, so that
/// who asks for the last 2 hours by its own clock gets minutes.
const OF_MINUTES: i64 = 2 * HOUR + MINUTE;
const OF_HOURS: i64 = 7 * DAY + HOUR;
const LONGEST_FILTER: usize = 200;
const NONE: &str = "there were no calls in this window";

/// The report that a request asks for.
pub(crate) async fn report(
    store: &Store,
    request: GetPerformanceRequest,
) -> Result<GetPerformanceResponse, Error> {
    check_filters(&[("model", &request.model), ("method", &request.method)])?;
    let now = now();
    let (start, end) = window(request.start_time, request.end_time, HOUR, now)?;
    let span = span(start, end, now);
    let which = Which {
        span,
        start: span.floor(start),
        end: span.ceil(end),
        model: request.model,
        method: request.method,
    };
    Ok(summed_up(store.tallies(&which).await?, which.start, which.end.min(now)))
}

/// The report of the last minute.
pub(crate) async fn last_minute(
    store: &Store,
    model: &str,
    method: &str,
) -> Result<GetPerformanceResponse, Error> {
    let now = now();
    let which = Which {
        span: Span::Second,
        start: Span::Second.floor(now) - MINUTE + SECOND,
        // Clocks that are a little ahead count too.
        end: now + SECOND,
        model: model.to_owned(),
        method: method.to_owned(),
    };
    Ok(summed_up(store.tallies(&which).await?, which.start, now))
}

/// Checks what a request filters by; none is longer than what is stored.
pub(crate) fn check_filters(filters: &[(&'static str, &str)]) -> Result<(), Violations> {
    let mut found = Violations::default();
    for (field, text) in filters {
        if text.chars().count() > LONGEST_FILTER || text.contains('\0') {
            found.wrong(*field, "must be at most 200 characters, none of them NUL");
        }
    }
    found.check()
}

/// A window as a request asks for it; `length`: where it names no start.
pub(crate) fn window(
    start: Option<Timestamp>,
    end: Option<Timestamp>,
    length: i64,
    now: i64,
) -> Result<(i64, i64), Violations> {
    let mut found = Violations::default();
    let mut read = |field, time: Option<Timestamp>| {
        let read = time.as_ref().map(micros);
        if read == Some(None) {
            found.wrong(field, "must be a valid time from 1970 on");
        }
        read.flatten()
    };
    let (asked_start, asked_end) = (read("start_time", start), read("end_time", end));
    let end = asked_end.unwrap_or(now);
    let start = asked_start.unwrap_or(end.saturating_sub(length).max(0));
    if start >= end && found.count() == 0 {
        found.wrong("start_time", "must be before end_time");
    }
    found.check()?;
    Ok((start, end))
}

/// The finest that is kept of a window, and fine enough for it.
fn span(start: i64, end: i64, now: i64) -> Span {
    let length = end - start;
    if length <= OF_MINUTES && Span::Minute.has(start, now) {
        Span::Minute
    } else if length <= OF_HOURS && Span::Hour.has(start, now) {
        Span::Hour
    } else {
        Span::Day
    }
}

fn summed_up(
    tallies: BTreeMap<(String, String), Tally>,
    start: i64,
    end: i64,
) -> GetPerformanceResponse {
    let (mut all, mut models, mut methods) = (Tally::default(), BTreeMap::new(), BTreeMap::new());
    for ((method, model), tally) in tallies {
        all.add(&tally);
        methods.entry(method).or_insert_with(Tally::default).add(&tally);
        if !model.is_empty() {
            models.entry(model).or_insert_with(Tally::default).add(&tally);
        }
    }
    let end = end.max(start);
    let minutes = float((end - start).unsigned_abs()) / float(MINUTE.unsigned_abs());
    GetPerformanceResponse {
        avg_response_time: ratio(all.duration_us, all.requests) / float(SECOND.unsigned_abs()),
        requests_per_minute: if minutes > 0.0 { number(all.requests) / minutes } else { 0.0 },
        cache_hit_rate: ratio(all.cached, all.cacheable),
        ai_model_usage: Some(AiModelUsage {
            total_tokens: number(all.tokens),
            avg_tokens_per_request: ratio(all.tokens, all.token_requests),
        }),
        requests: count(all.requests),
        error_rate: ratio(all.errors, all.requests),
        response_time: Some(percentiles(&all.sketches.durations)),
        time_to_first_token: Some(percentiles(&all.sketches.first_tokens)),
        inter_token_time: Some(percentiles(&all.sketches.gaps)),
        models: groups(models),
        methods: groups(methods),
        start_time: Some(timestamp(start)),
        end_time: Some(timestamp(end)),
        note: if all.requests == 0 { NONE.to_owned() } else { String::new() },
    }
}

/// Most calls first, and what is beyond the most in one.
fn groups(tallies: BTreeMap<String, Tally>) -> Vec<Group> {
    let mut tallies: Vec<_> = tallies.into_iter().collect();
    tallies.sort_by(|(a, one), (b, other)| other.requests.cmp(&one.requests).then(a.cmp(b)));
    let rest = tallies.split_off(tallies.len().min(MOST_GROUPS));
    if !rest.is_empty() {
        let mut other = Tally::default();
        for (_, tally) in &rest {
            other.add(tally);
        }
        tallies.push((OTHER.to_owned(), other));
    }
    let group = |(name, tally): (String, Tally)| Group {
        name,
        requests: count(tally.requests),
        error_rate: ratio(tally.errors, tally.requests),
        total_tokens: number(tally.tokens),
        response_time: Some(percentiles(&tally.sketches.durations)),
        time_to_first_token: Some(percentiles(&tally.sketches.first_tokens)),
    };
    tallies.into_iter().map(group).collect()
}

/// In seconds.
fn percentiles(sketch: &Sketch) -> Percentiles {
    let seconds = |part| sketch.quantile(part) / float(SECOND.unsigned_abs());
    Percentiles {
        p50: seconds(0.5),
        p95: seconds(0.95),
        p99: seconds(0.99),
        count: u32::try_from(sketch.count()).unwrap_or(u32::MAX),
    }
}

/// 0 of none is 0.
fn ratio(part: i64, whole: i64) -> f64 {
    if whole > 0 { number(part) / number(whole) } else { 0.0 }
}

/// Of what is never negative.
pub(crate) fn number(count: i64) -> f64 {
    float(u64::try_from(count).unwrap_or_default())
}

fn count(number: i64) -> u32 {
    u32::try_from(number.max(0)).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: i64 = 1_800_000_000_000_000;

    #[test]
    fn a_window_is_summed_up_from_the_finest_that_is_kept_and_fits() {
        let cases = [
            (HOUR, 0, Span::Minute),
            (2 * HOUR, 0, Span::Minute),
            (2 * HOUR + MINUTE + 1, 0, Span::Hour),
            (HOUR, 3 * DAY, Span::Hour),
            (7 * DAY, 0, Span::Hour),
            (7 * DAY + HOUR + 1, 0, Span::Day),
            (HOUR, 91 * DAY, Span::Day),
        ];
        for (length, ago, expected) in cases {
            assert_eq!(span(NOW - ago - length, NOW - ago, NOW), expected, "{length} {ago}");
        }
    }

    #[test]
    fn a_window_has_defaults_and_an_order() {
        let at = |time| Some(timestamp(time));
        assert_eq!(window(None, None, HOUR, NOW).unwrap(), (NOW - HOUR, NOW));
        assert_eq!(window(at(5), at(6), HOUR, NOW).unwrap(), (5, 6));
        let wrong = |start, end| window(start, end, HOUR, NOW).unwrap_err().fields();
        assert_eq!(wrong(at(6), at(6)), ["start_time"]);
        assert_eq!(wrong(None, at(-1)), ["end_time"]);
        assert_eq!(wrong(None, at(0)), ["start_time"]);
        let filters = [("model", "m"), ("method", "a\0b")];
        assert_eq!(check_filters(&filters).unwrap_err().fields(), ["method"]);
    }

    #[test]
    fn a_window_without_calls_says_so_and_has_no_rates() {
        let report = summed_up(BTreeMap::new(), NOW, NOW);
        assert_eq!((report.requests, report.note.as_str()), (0, NONE));
        assert_eq!((report.requests_per_minute, report.error_rate), (0.0, 0.0));
    }

    #[test]
    fn what_is_beyond_the_most_groups_is_summed_up_in_one() {
        let tally = |requests| Tally { requests, ..Tally::default() };
        let all = |count: i64| (1..=count).map(|at| (format!("m{at:02}"), tally(at))).collect();
        assert_eq!(groups(all(50)).len(), 50);
        let found = groups(all(53));
        assert_eq!((found[0].name.as_str(), found[0].requests), ("m53", 53));
        let last = found.last().unwrap();
        assert_eq!((found.len(), last.name.as_str(), last.requests), (51, "other", 1 + 2 + 3));
    }
}
