//! GetPerformance and WatchPerformance: selects the rollups of a window and builds the response.

use std::collections::BTreeMap;

use hapa_core::timestamps::{DAY, HOUR, MINUTE, SECOND, now, timestamp};
use hapa_core::violations::Violations;
use hapa_proto::analytics::v1::get_performance_response::{AiModelUsage, Group, Percentiles};
use hapa_proto::analytics::v1::{GetPerformanceRequest, GetPerformanceResponse};
use prost_types::Timestamp;

use crate::error::Error;
use crate::latency_histogram::{LatencyHistogram, to_f64};
use crate::rollup::RollupTotals;
use crate::rollup_period::{RollupPeriod, micros};
use crate::store::{RollupFilter, Store};

/// Most named groups in a response.
const MAX_GROUP_COUNT: usize = 50;
/// The name of the group that sums up all others.
const OTHER_GROUP: &str = "other";
/// Longest windows that are read from minute and from hour rollups. The extra minute and hour allow
/// for rounding, so that a client that asks for the last 2 hours by its own clock gets minutes.
const MAX_MINUTE_WINDOW: i64 = 2 * HOUR + MINUTE;
const MAX_HOUR_WINDOW: i64 = 7 * DAY + HOUR;
const MAX_FILTER_LEN: usize = 200;
const NO_CALLS_NOTE: &str = "there were no calls in this window";

/// The performance in the requested window.
pub(crate) async fn report(
    store: &Store,
    request: GetPerformanceRequest,
) -> Result<GetPerformanceResponse, Error> {
    check_filters(&[("model", &request.model), ("method", &request.method)])?;
    let now = now();
    let (start, end) = resolve_window(request.start_time, request.end_time, HOUR, now)?;
    let period = choose_period(start, end, now);
    let filter = RollupFilter {
        period,
        start: period.floor(start),
        end: period.ceil(end),
        model: request.model,
        method: request.method,
    };
    Ok(to_response(store.rollup_totals(&filter).await?, filter.start, filter.end.min(now)))
}

/// The performance in the last minute.
pub(crate) async fn last_minute(
    store: &Store,
    model: &str,
    method: &str,
) -> Result<GetPerformanceResponse, Error> {
    let now = now();
    let filter = RollupFilter {
        period: RollupPeriod::Second,
        start: RollupPeriod::Second.floor(now) - MINUTE + SECOND,
        // Includes the calls of replicas with clocks slightly ahead.
        end: now + SECOND,
        model: model.to_owned(),
        method: method.to_owned(),
    };
    Ok(to_response(store.rollup_totals(&filter).await?, filter.start, now))
}

/// Validates the filters of a request.
pub(crate) fn check_filters(filters: &[(&'static str, &str)]) -> Result<(), Violations> {
    let mut violations = Violations::default();
    for (field, text) in filters {
        if text.chars().count() > MAX_FILTER_LEN || text.contains('\0') {
            violations.add_invalid(*field, "must be at most 200 characters, none of them NUL");
        }
    }
    violations.check()
}

/// Validates a requested window. Defaults: it ends now and is `default_length` long.
pub(crate) fn resolve_window(
    start: Option<Timestamp>,
    end: Option<Timestamp>,
    default_length: i64,
    now: i64,
) -> Result<(i64, i64), Violations> {
    let mut violations = Violations::default();
    let mut read = |field, time: Option<Timestamp>| {
        let read = time.as_ref().map(micros);
        if read == Some(None) {
            violations.add_invalid(field, "must be a valid time from 1970 on");
        }
        read.flatten()
    };
    let (given_start, given_end) = (read("start_time", start), read("end_time", end));
    let end = given_end.unwrap_or(now);
    let start = given_start.unwrap_or(end.saturating_sub(default_length).max(0));
    if start >= end && violations.count() == 0 {
        violations.add_invalid("start_time", "must be before end_time");
    }
    violations.check()?;
    Ok((start, end))
}

/// The finest period that is stored for the whole window and suits its length.
fn choose_period(start: i64, end: i64, now: i64) -> RollupPeriod {
    let length = end - start;
    if length <= MAX_MINUTE_WINDOW && RollupPeriod::Minute.is_retained(start, now) {
        RollupPeriod::Minute
    } else if length <= MAX_HOUR_WINDOW && RollupPeriod::Hour.is_retained(start, now) {
        RollupPeriod::Hour
    } else {
        RollupPeriod::Day
    }
}

fn to_response(
    rollups: BTreeMap<(String, String), RollupTotals>,
    start: i64,
    end: i64,
) -> GetPerformanceResponse {
    let mut all = RollupTotals::default();
    let (mut models, mut methods) = (BTreeMap::new(), BTreeMap::new());
    for ((method, model), totals) in rollups {
        all.merge(&totals);
        methods.entry(method).or_insert_with(RollupTotals::default).merge(&totals);
        if !model.is_empty() {
            models.entry(model).or_insert_with(RollupTotals::default).merge(&totals);
        }
    }
    let end = end.max(start);
    let minutes = to_f64((end - start).unsigned_abs()) / to_f64(MINUTE.unsigned_abs());
    GetPerformanceResponse {
        avg_response_time: ratio(all.duration_us, all.requests) / to_f64(SECOND.unsigned_abs()),
        requests_per_minute: if minutes > 0.0 { count_as_f64(all.requests) / minutes } else { 0.0 },
        cache_hit_rate: ratio(all.cached, all.cacheable),
        ai_model_usage: Some(AiModelUsage {
            total_tokens: count_as_f64(all.tokens),
            avg_tokens_per_request: ratio(all.tokens, all.token_requests),
            reasoning_tokens: count_as_f64(all.reasoning_tokens),
        }),
        requests: saturating_u32(all.requests),
        error_rate: ratio(all.errors, all.requests),
        response_time: Some(percentiles(&all.latencies.duration)),
        time_to_first_token: Some(percentiles(&all.latencies.time_to_first_token)),
        time_to_first_answer_token: Some(percentiles(all.latencies.time_to_first_answer_token())),
        inter_token_time: Some(percentiles(&all.latencies.inter_token)),
        models: groups(models),
        methods: groups(methods),
        start_time: Some(timestamp(start)),
        end_time: Some(timestamp(end)),
        note: if all.requests == 0 { NO_CALLS_NOTE.to_owned() } else { String::new() },
    }
}

/// The groups with the most calls, and one that sums up the others.
fn groups(rollups: BTreeMap<String, RollupTotals>) -> Vec<Group> {
    let mut rollups: Vec<_> = rollups.into_iter().collect();
    rollups.sort_by(|(a, one), (b, other)| other.requests.cmp(&one.requests).then(a.cmp(b)));
    let rest = rollups.split_off(rollups.len().min(MAX_GROUP_COUNT));
    if !rest.is_empty() {
        let mut other = RollupTotals::default();
        for (_, totals) in &rest {
            other.merge(totals);
        }
        rollups.push((OTHER_GROUP.to_owned(), other));
    }
    let group = |(name, totals): (String, RollupTotals)| Group {
        name,
        requests: saturating_u32(totals.requests),
        error_rate: ratio(totals.errors, totals.requests),
        total_tokens: count_as_f64(totals.tokens),
        response_time: Some(percentiles(&totals.latencies.duration)),
        time_to_first_token: Some(percentiles(&totals.latencies.time_to_first_token)),
        time_to_first_answer_token: Some(percentiles(
            totals.latencies.time_to_first_answer_token(),
        )),
    };
    rollups.into_iter().map(group).collect()
}

/// The percentiles in seconds.
fn percentiles(histogram: &LatencyHistogram) -> Percentiles {
    let seconds = |fraction| histogram.quantile(fraction) / to_f64(SECOND.unsigned_abs());
    Percentiles {
        p50: seconds(0.5),
        p95: seconds(0.95),
        p99: seconds(0.99),
        count: u32::try_from(histogram.count()).unwrap_or(u32::MAX),
    }
}

/// `part / whole`, or 0 if `whole` is 0.
fn ratio(part: i64, whole: i64) -> f64 {
    if whole > 0 { count_as_f64(part) / count_as_f64(whole) } else { 0.0 }
}

/// A count, which is never negative, as a float.
pub(crate) fn count_as_f64(count: i64) -> f64 {
    to_f64(u64::try_from(count).unwrap_or_default())
}

fn saturating_u32(number: i64) -> u32 {
    u32::try_from(number.max(0)).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: i64 = 1_800_000_000_000_000;

    #[test]
    fn a_window_is_read_from_the_finest_stored_period_that_suits_it() {
        let cases = [
            (HOUR, 0, RollupPeriod::Minute),
            (2 * HOUR, 0, RollupPeriod::Minute),
            (2 * HOUR + MINUTE + 1, 0, RollupPeriod::Hour),
            (HOUR, 3 * DAY, RollupPeriod::Hour),
            (7 * DAY, 0, RollupPeriod::Hour),
            (7 * DAY + HOUR + 1, 0, RollupPeriod::Day),
            (HOUR, 91 * DAY, RollupPeriod::Day),
        ];
        for (length, ago, expected) in cases {
            assert_eq!(
                choose_period(NOW - ago - length, NOW - ago, NOW),
                expected,
                "{length} {ago}"
            );
        }
    }

    #[test]
    fn a_window_has_defaults_and_must_start_before_its_end() {
        let at = |time| Some(timestamp(time));
        assert_eq!(resolve_window(None, None, HOUR, NOW).unwrap(), (NOW - HOUR, NOW));
        assert_eq!(resolve_window(at(5), at(6), HOUR, NOW).unwrap(), (5, 6));
        let wrong = |start, end| resolve_window(start, end, HOUR, NOW).unwrap_err().fields();
        assert_eq!(wrong(at(6), at(6)), ["start_time"]);
        assert_eq!(wrong(None, at(-1)), ["end_time"]);
        assert_eq!(wrong(None, at(0)), ["start_time"]);
        let filters = [("model", "m"), ("method", "a\0b")];
        assert_eq!(check_filters(&filters).unwrap_err().fields(), ["method"]);
    }

    #[test]
    fn a_window_without_calls_has_a_note_and_no_rates() {
        let report = to_response(BTreeMap::new(), NOW, NOW);
        assert_eq!((report.requests, report.note.as_str()), (0, NO_CALLS_NOTE));
        assert_eq!((report.requests_per_minute, report.error_rate), (0.0, 0.0));
    }

    #[test]
    fn groups_beyond_the_maximum_are_summed_up_in_one() {
        let totals = |requests| RollupTotals { requests, ..RollupTotals::default() };
        let all = |count: i64| (1..=count).map(|at| (format!("m{at:02}"), totals(at))).collect();
        assert_eq!(groups(all(50)).len(), 50);
        let found = groups(all(53));
        assert_eq!((found[0].name.as_str(), found[0].requests), ("m53", 53));
        let last = found.last().unwrap();
        assert_eq!((found.len(), last.name.as_str(), last.requests), (51, "other", 1 + 2 + 3));
    }
}
