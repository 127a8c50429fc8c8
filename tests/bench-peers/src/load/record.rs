//! Results of clients.

use std::collections::BTreeMap;

use crate::load::watch::Readings;
use crate::process::float;
use crate::spec::{LoadReport, Quantiles};

const MAX_ERROR_KINDS: usize = 20;
const MAX_ERROR_LEN: usize = 160;

/// Results of one client, or of several.
#[derive(Debug, Default)]
pub(crate) struct Record {
    /// Times in nanoseconds.
    pub(crate) first_texts: Vec<u64>,
    pub(crate) totals: Vec<u64>,
    pub(crate) complete: u64,
    pub(crate) tokens: u64,
    /// Numbers of the dropped requests, and when each was dropped.
    pub(crate) drops: Vec<(u64, u64)>,
    errors: BTreeMap<String, u64>,
}

impl Record {
    pub(crate) fn merge(&mut self, other: Record) {
        self.first_texts.extend(other.first_texts);
        self.totals.extend(other.totals);
        self.complete += other.complete;
        self.tokens += other.tokens;
        self.drops.extend(other.drops);
        for (kind, count) in other.errors {
            *self.errors.entry(kind).or_default() += count;
        }
    }

    /// Counts an error. Ids would make every error a kind of its own, so long numbers are left out.
    pub(crate) fn error(&mut self, error: &str) {
        let is_id = |word: &&str| word.chars().filter(char::is_ascii_digit).count() > 5;
        let words: Vec<_> = error.split(' ').filter(|word| !is_id(word)).collect();
        let kind: String = words.join(" ").chars().take(MAX_ERROR_LEN).collect();
        if self.errors.len() < MAX_ERROR_KINDS || self.errors.contains_key(&kind) {
            *self.errors.entry(kind).or_default() += 1;
        }
    }

    pub(crate) fn report(&self, readings: &Readings) -> LoadReport {
        LoadReport {
            complete: self.complete,
            left: u64::try_from(self.drops.len()).unwrap_or_default(),
            tokens: self.tokens,
            errors: self.errors.clone(),
            seconds: readings.seconds,
            first_text: quantiles(self.first_texts.clone()),
            total: quantiles(self.totals.clone()),
            aborts: None,
            cpu_us: readings.cpu_us,
            peak_bytes: readings.peak_bytes,
            foreign_cores: readings.foreign_cores,
            stolen_cores: readings.stolen_cores,
        }
    }
}

/// The quantiles of times in nanoseconds, if there are any.
pub(crate) fn quantiles(mut times: Vec<u64>) -> Option<Quantiles> {
    times.sort_unstable();
    let at = |percent: usize| {
        let index = (times.len() * percent / 100).min(times.len().saturating_sub(1));
        times.get(index).map(|nanos| float(*nanos) / 1e3)
    };
    Some(Quantiles { p50: at(50)?, p99: at(99)?, max: at(100)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_taken_from_the_sorted_times() {
        let found = quantiles((1..=200).rev().map(|micros| micros * 1_000).collect()).unwrap();
        assert_eq!((found.p50, found.p99, found.max), (101.0, 199.0, 200.0));
        assert!(quantiles(Vec::new()).is_none());
    }

    #[test]
    fn errors_that_differ_in_ids_are_one_kind() {
        let mut record = Record::default();
        record.error("stream 0123456789ab failed");
        record.error("stream 0123456789ac failed");
        assert_eq!(record.errors.get("stream failed"), Some(&2));
    }
}
