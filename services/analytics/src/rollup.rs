//! Aggregates of events. A batch is aggregated in memory first, so that it updates each row of the
//! store once. Totals of parts add up exactly to the total of the whole.

use std::collections::BTreeMap;

use anyhow::Context as _;

use crate::event::{CacheOutcome, CallEvent};
use crate::latency_histogram::LatencyHistogram;
use crate::rollup_period::RollupPeriod;

/// The prefix of stored histograms. A later encoding must use another letter.
const ENCODING: &str = "h:";

/// The totals of the calls of one period, method and model.
#[derive(Clone, Debug, Default)]
#[cfg_attr(test, derive(PartialEq))]
pub(crate) struct RollupTotals {
    pub(crate) requests: i64,
    pub(crate) errors: i64,
    pub(crate) tokens: i64,
    pub(crate) token_requests: i64,
    pub(crate) cacheable: i64,
    pub(crate) cached: i64,
    pub(crate) duration_us: i64,
    pub(crate) latencies: RollupLatencies,
}

/// The latency histograms of a rollup, stored as one text in the column `sketches`.
#[derive(Clone, Debug, Default)]
#[cfg_attr(test, derive(PartialEq))]
pub(crate) struct RollupLatencies {
    pub(crate) duration: LatencyHistogram,
    pub(crate) time_to_first_token: LatencyHistogram,
    pub(crate) inter_token: LatencyHistogram,
}

/// The usage totals of a day.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct UsageTotals {
    pub(crate) requests: i64,
    pub(crate) errors: i64,
    pub(crate) prompt_tokens: i64,
    pub(crate) completion_tokens: i64,
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
        self.token_requests += i64::from(event.tokens() > 0);
        self.cacheable += i64::from(event.cache != CacheOutcome::NotConsulted);
        self.cached += i64::from(event.cache == CacheOutcome::Hit);
        self.duration_us += event.duration_us;
        self.latencies.duration.record(event.duration_us);
        if let Some(time) = event.time_to_first_token_us {
            self.latencies.time_to_first_token.record(time);
        }
        if let Some(time) = event.inter_token_us {
            self.latencies.inter_token.record(time);
        }
    }

    pub(crate) fn merge(&mut self, other: &RollupTotals) {
        self.requests += other.requests;
        self.errors += other.errors;
        self.tokens += other.tokens;
        self.token_requests += other.token_requests;
        self.cacheable += other.cacheable;
        self.cached += other.cached;
        self.duration_us += other.duration_us;
        self.latencies.duration.merge(&other.latencies.duration);
        self.latencies.time_to_first_token.merge(&other.latencies.time_to_first_token);
        self.latencies.inter_token.merge(&other.latencies.inter_token);
    }
}

impl RollupLatencies {
    /// Encodes the three histograms as one text.
    pub(crate) fn encode(&self) -> anyhow::Result<String> {
        let mut text = String::with_capacity(1_024);
        text.push_str(ENCODING);
        self.duration.encode_into(&mut text)?;
        text.push('.');
        self.time_to_first_token.encode_into(&mut text)?;
        text.push('.');
        self.inter_token.encode_into(&mut text)?;
        Ok(text)
    }

    /// Adds the values of an encoded text. "" has none.
    pub(crate) fn add_encoded(&mut self, text: &str) -> anyhow::Result<()> {
        if text.is_empty() {
            return Ok(());
        }
        let advice = "another version wrote these rollups; delete the rows of performance_rollups with sketches that do not begin with h:";
        let text = text.strip_prefix(ENCODING).context(advice)?;
        let mut parts = text.splitn(3, '.');
        for histogram in [&mut self.duration, &mut self.time_to_first_token, &mut self.inter_token]
        {
            histogram.add_encoded(parts.next().unwrap_or_default())?;
        }
        Ok(())
    }
}

impl UsageTotals {
    fn record(&mut self, event: &CallEvent) {
        self.requests += 1;
        self.errors += i64::from(event.has_failed());
        self.prompt_tokens += event.prompt_tokens;
        self.completion_tokens += event.completion_tokens;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_encoding_gives_an_error_with_advice() {
        let mut latencies = RollupLatencies::default();
        latencies.duration.record(7);
        let text = latencies.encode().unwrap();
        let mut decoded = RollupLatencies::default();
        decoded.add_encoded(&text).unwrap();
        decoded.add_encoded("").unwrap();
        assert_eq!(decoded, latencies);
        let error = decoded.add_encoded("ABBC4WBpYC..").unwrap_err().to_string();
        assert!(error.contains("delete the rows"), "{error}");
    }
}
