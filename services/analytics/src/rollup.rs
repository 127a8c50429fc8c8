//! Aggregates of events. A batch is aggregated in memory first, so that it updates each row of the
//! store once. Totals of parts add up exactly to the total of the whole.

use std::collections::BTreeMap;

use anyhow::Context as _;

use crate::event::{CacheOutcome, CallEvent};
use crate::latency_histogram::LatencyHistogram;
use crate::rollup_period::RollupPeriod;

/// The prefix of stored histograms. A later encoding must use another letter, or another column as
/// long as the previous version reads and writes this one.
const ENCODING: &str = "h:";

/// The totals of the calls of one period, method and model.
#[derive(Clone, Debug, Default)]
#[cfg_attr(test, derive(PartialEq))]
pub(crate) struct RollupTotals {
    pub(crate) requests: i64,
    pub(crate) errors: i64,
    pub(crate) tokens: i64,
    /// Part of `tokens`.
    pub(crate) reasoning_tokens: i64,
    pub(crate) token_requests: i64,
    pub(crate) cacheable: i64,
    pub(crate) cached: i64,
    pub(crate) duration_us: i64,
    pub(crate) latencies: RollupLatencies,
}

/// The latency histograms of a rollup.
#[derive(Clone, Debug, Default)]
pub(crate) struct RollupLatencies {
    pub(crate) duration: LatencyHistogram,
    pub(crate) time_to_first_token: LatencyHistogram,
    pub(crate) inter_token: LatencyHistogram,
    /// Times to the first answer token of all calls. `None`: no call reasoned, so they equal the
    /// times to the first token. Most rollups then need neither a second histogram nor its storage.
    pub(crate) separate_answer: Option<LatencyHistogram>,
}

/// The latency histograms of a rollup as the store has them.
#[derive(Clone, Debug, Default)]
pub(crate) struct EncodedLatencies {
    /// Durations, times to the first token and times between tokens.
    pub(crate) sketches: String,
    /// Times to the first answer token. "": equal to the times to the first token. Rows of versions
    /// that did not measure them have "" too.
    pub(crate) answer_sketch: String,
}

/// The usage totals of a day.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct UsageTotals {
    pub(crate) requests: i64,
    pub(crate) errors: i64,
    pub(crate) prompt_tokens: i64,
    pub(crate) completion_tokens: i64,
    /// Part of `completion_tokens`.
    pub(crate) reasoning_tokens: i64,
}

/// A rollup's length in seconds, its start, method and model. Rows are locked in the order of this
/// key.
pub(crate) type RollupKey<'e> = (i64, i64, &'e str, &'e str);
/// A day, owner, key, user and model.
pub(crate) type UsageKey<'e> = (i64, &'e str, &'e str, &'e str, &'e str);

/// The totals of a batch of events.
#[derive(Debug, Default)]
pub(crate) struct BatchTotals<'e> {
    pub(crate) rollups: BTreeMap<RollupKey<'e>, RollupTotals>,
    pub(crate) usage: BTreeMap<UsageKey<'e>, UsageTotals>,
}

impl<'e> BatchTotals<'e> {
    /// Aggregates events. Late events count in the periods of their own time, as far as these are
    /// stored.
    pub(crate) fn from_events(events: impl Iterator<Item = &'e CallEvent>, now: i64) -> Self {
        let mut totals = BatchTotals::default();
        for event in events {
            let periods = RollupPeriod::ALL.into_iter();
            for period in periods.filter(|period| period.is_retained(event.time, now)) {
                let (seconds, start) = (period.seconds(), period.floor(event.time));
                let key = (seconds, start, event.method.as_str(), event.model.as_str());
                totals.rollups.entry(key).or_default().record(event);
            }
            let day = RollupPeriod::Day.floor(event.time);
            let key: UsageKey<'e> =
                (day, &event.owner, &event.key_id, &event.user_id, &event.model);
            totals.usage.entry(key).or_default().record(event);
        }
        totals
    }
}

impl RollupTotals {
    fn record(&mut self, event: &CallEvent) {
        self.requests += 1;
        self.errors += i64::from(event.has_failed());
        self.tokens += event.tokens();
        self.reasoning_tokens += event.reasoning_tokens;
        self.token_requests += i64::from(event.tokens() > 0);
        self.cacheable += i64::from(event.cache != CacheOutcome::NotConsulted);
        self.cached += i64::from(event.cache == CacheOutcome::Hit);
        self.duration_us += event.duration_us;
        self.latencies.duration.record(event.duration_us);
        let (first, answer) = (event.time_to_first_token_us, event.first_answer_token_us());
        self.latencies.record_first_tokens(first, answer);
        if let Some(time) = event.inter_token_us {
            self.latencies.inter_token.record(time);
        }
    }

    pub(crate) fn merge(&mut self, other: &RollupTotals) {
        self.requests += other.requests;
        self.errors += other.errors;
        self.tokens += other.tokens;
        self.reasoning_tokens += other.reasoning_tokens;
        self.token_requests += other.token_requests;
        self.cacheable += other.cacheable;
        self.cached += other.cached;
        self.duration_us += other.duration_us;
        self.latencies.merge(&other.latencies);
    }
}

impl RollupLatencies {
    /// The times to the first answer token.
    pub(crate) fn time_to_first_answer_token(&self) -> &LatencyHistogram {
        self.separate_answer.as_ref().unwrap_or(&self.time_to_first_token)
    }

    /// Must be called before a first token is added that differs from its first answer token.
    fn separate_answer(&mut self) {
        self.separate_answer.get_or_insert_with(|| self.time_to_first_token.clone());
    }

    fn record_first_tokens(&mut self, first: Option<i64>, answer: Option<i64>) {
        if answer != first {
            self.separate_answer();
        }
        if let Some(time) = first {
            self.time_to_first_token.record(time);
        }
        if let (Some(histogram), Some(time)) = (&mut self.separate_answer, answer) {
            histogram.record(time);
        }
    }

    fn merge(&mut self, other: &RollupLatencies) {
        if other.separate_answer.is_some() {
            self.separate_answer();
        }
        if let Some(answer) = &mut self.separate_answer {
            answer.merge(other.time_to_first_answer_token());
        }
        self.duration.merge(&other.duration);
        self.time_to_first_token.merge(&other.time_to_first_token);
        self.inter_token.merge(&other.inter_token);
    }

    /// Encodes the histograms.
    pub(crate) fn encode(&self) -> anyhow::Result<EncodedLatencies> {
        let mut sketches = String::with_capacity(1_024);
        sketches.push_str(ENCODING);
        self.duration.encode_into(&mut sketches)?;
        sketches.push('.');
        self.time_to_first_token.encode_into(&mut sketches)?;
        sketches.push('.');
        self.inter_token.encode_into(&mut sketches)?;
        let mut answer_sketch = String::new();
        if let Some(answer) = &self.separate_answer {
            // The prefix distinguishes an empty histogram, of calls without an answer, from "".
            answer_sketch.push_str(ENCODING);
            answer.encode_into(&mut answer_sketch)?;
        }
        Ok(EncodedLatencies { sketches, answer_sketch })
    }

    /// Adds the values of encoded histograms, the texts of [`EncodedLatencies`]. If both are "",
    /// there are none.
    pub(crate) fn add_encoded(
        &mut self,
        sketches: &str,
        answer_sketch: &str,
    ) -> anyhow::Result<()> {
        if sketches.is_empty() {
            return Ok(());
        }
        let mut parts = strip_encoding(sketches)?.splitn(3, '.');
        let mut part = || parts.next().unwrap_or_default();
        let (duration, first_token, inter_token) = (part(), part(), part());
        if !answer_sketch.is_empty() {
            self.separate_answer();
        }
        if let Some(answer) = &mut self.separate_answer {
            let is_equal = answer_sketch.is_empty();
            answer.add_encoded(if is_equal {
                first_token
            } else {
                strip_encoding(answer_sketch)?
            })?;
        }
        self.duration.add_encoded(duration)?;
        self.time_to_first_token.add_encoded(first_token)?;
        self.inter_token.add_encoded(inter_token)
    }
}

fn strip_encoding(text: &str) -> anyhow::Result<&str> {
    let advice = "another version wrote these rollups; delete the rows of performance_rollups with sketches that do not begin with h:";
    text.strip_prefix(ENCODING).context(advice)
}

#[cfg(test)]
impl PartialEq for RollupLatencies {
    fn eq(&self, other: &RollupLatencies) -> bool {
        let histograms = |latencies: &RollupLatencies| {
            let RollupLatencies { duration, time_to_first_token, inter_token, .. } = latencies;
            let answer = latencies.time_to_first_answer_token();
            [duration, time_to_first_token, inter_token, answer].map(Clone::clone)
        };
        histograms(self) == histograms(other)
    }
}

impl UsageTotals {
    fn record(&mut self, event: &CallEvent) {
        self.requests += 1;
        self.errors += i64::from(event.has_failed());
        self.prompt_tokens += event.prompt_tokens;
        self.completion_tokens += event.completion_tokens;
        self.reasoning_tokens += event.reasoning_tokens;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The histograms of calls, by their times to the first token and to the first answer token.
    fn latencies(calls: &[(i64, Option<i64>)]) -> RollupLatencies {
        let mut latencies = RollupLatencies::default();
        for (first, answer) in calls {
            latencies.record_first_tokens(Some(*first), *answer);
        }
        latencies
    }

    fn add(latencies: &mut RollupLatencies, encoded: &EncodedLatencies) {
        latencies.add_encoded(&encoded.sketches, &encoded.answer_sketch).unwrap();
    }

    #[test]
    fn an_unknown_encoding_gives_an_error_with_advice() {
        let mut latencies = RollupLatencies::default();
        latencies.duration.record(7);
        let encoded = latencies.encode().unwrap();
        let mut decoded = RollupLatencies::default();
        add(&mut decoded, &encoded);
        add(&mut decoded, &EncodedLatencies::default());
        assert_eq!(decoded, latencies);
        for (sketches, answer) in [("ABBC4WBpYC..", ""), ("h:..", "ABBC4WBpYC")] {
            let error = decoded.add_encoded(sketches, answer).unwrap_err().to_string();
            assert!(error.contains("delete the rows"), "{error}");
        }
    }

    #[test]
    fn rows_of_the_previous_version_have_equal_first_and_answer_tokens() {
        // Written by the version without the column `answer_sketch`.
        let histogram = "HISTEwAAAAgAAAAAAAAAAgAAAAAAAAABAAAD//////8/8AAAAAAAAAIE4xsCwSoE";
        let mut stored = RollupLatencies::default();
        stored.add_encoded(&format!("h:{histogram}.{histogram}."), "").unwrap();
        assert_eq!(stored.time_to_first_token.count(), 6);
        assert_eq!(stored.time_to_first_answer_token(), &stored.time_to_first_token);
        let old = latencies(&[(5, Some(5)), (9, Some(9))]).encode().unwrap();
        assert_eq!(old.answer_sketch, "", "without reasoning the previous version reads all");
        let mut row = RollupLatencies::default();
        add(&mut row, &old);
        assert_eq!(row.time_to_first_answer_token().count(), 2);
        add(&mut row, &latencies(&[(1, Some(30))]).encode().unwrap());
        add(&mut row, &old);
        let times = [5, 9, 5, 9].map(|time| (time, Some(time)));
        assert_eq!(row, latencies(&[&times[..], &[(1, Some(30))]].concat()));
        assert!((row.time_to_first_answer_token().quantile(1.0) - 30.0).abs() < 1.0);
        assert!((row.time_to_first_token.quantile(1.0) - 9.0).abs() < 1.0);
    }

    #[test]
    fn calls_that_reason_without_an_answer_have_a_first_token_only() {
        let silent = latencies(&[(5, None)]);
        assert_eq!(silent.time_to_first_answer_token().count(), 0);
        let mut decoded = RollupLatencies::default();
        add(&mut decoded, &silent.encode().unwrap());
        assert_eq!((decoded.time_to_first_token.count(), &decoded), (1, &silent));
    }

    #[test]
    fn merged_parts_equal_the_whole_in_any_order() {
        let parts =
            [&[(1, Some(1)), (2, Some(2))][..], &[(3, Some(8)), (4, None)], &[(5, Some(5))]];
        let whole = latencies(&parts.concat());
        for order in [[0, 1, 2], [1, 0, 2], [2, 0, 1]] {
            let (mut merged, mut read) = (RollupLatencies::default(), RollupLatencies::default());
            for part in order.map(|index| latencies(parts[index])) {
                merged.merge(&part);
                add(&mut read, &part.encode().unwrap());
            }
            assert_eq!((&merged, &read), (&whole, &whole), "{order:?}");
        }
    }
}
