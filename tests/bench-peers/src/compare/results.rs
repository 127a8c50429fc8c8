//! The results of all loads, and the figures of the tables: medians over the rounds.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Context as _;
use clap::ValueEnum as _;
use serde::{Deserialize, Serialize};

use crate::compare::system::System;
use crate::compare::workload::Workload;
use crate::process::float;
use crate::spec::{LoadReport, Quantiles};

/// Beyond these processors of others a load is disturbed, and is repeated.
const MAX_FOREIGN_CORES: f64 = 0.25;
const MAX_STOLEN_CORES: f64 = 0.05;

/// One load on one system.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Run {
    pub(crate) round: usize,
    pub(crate) workload: Workload,
    pub(crate) system: System,
    pub(crate) streams: usize,
    pub(crate) idle_bytes: u64,
    pub(crate) report: LoadReport,
}

/// All loads of a run.
#[derive(Debug, Default)]
pub(crate) struct Results {
    pub(crate) runs: Vec<Run>,
    /// What did not run, with the reasons.
    pub(crate) missing: BTreeMap<String, String>,
    /// Rounds of merged results, which are numbered on.
    rounds: usize,
}

impl Run {
    pub(crate) fn is_quiet(&self) -> bool {
        self.report.foreign_cores <= MAX_FOREIGN_CORES
            && self.report.stolen_cores <= MAX_STOLEN_CORES
    }

    pub(crate) fn cpu_per_token(&self) -> Option<f64> {
        per(self.report.cpu_us, self.report.tokens)
    }

    pub(crate) fn bytes_per_stream(&self) -> Option<f64> {
        let grown = self.report.peak_bytes.saturating_sub(self.idle_bytes);
        per(float(grown), u64::try_from(self.streams).ok()?)
    }
}

/// None where nothing was counted, or where no process was measured.
fn per(sum: f64, count: u64) -> Option<f64> {
    (count > 0 && sum > 0.0).then(|| sum / float(count))
}

pub(crate) fn median(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<_> = values.into_iter().collect();
    values.sort_unstable_by(f64::total_cmp);
    let middle = values.len() / 2;
    let upper = values.get(middle).copied()?;
    let is_even = values.len().is_multiple_of(2);
    Some(if is_even { f64::midpoint(values[middle - 1], upper) } else { upper })
}

impl Results {
    /// Adds the runs of a results.json.
    pub(crate) fn merge(&mut self, file: &Path) -> anyhow::Result<()> {
        let text =
            std::fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?;
        let mut runs: Vec<Run> = serde_json::from_str(&text)?;
        for run in &mut runs {
            run.round += self.rounds;
        }
        self.rounds = runs.iter().map(|run| run.round + 1).max().unwrap_or(self.rounds);
        self.runs.append(&mut runs);
        Ok(())
    }

    pub(crate) fn systems(&self) -> Vec<System> {
        let has_run = |system: &&System| self.runs.iter().any(|run| run.system == **system);
        System::value_variants().iter().filter(has_run).copied().collect()
    }

    pub(crate) fn of(&self, workload: Workload, system: System) -> impl Iterator<Item = &Run> {
        self.runs.iter().filter(move |run| run.workload == workload && run.system == system)
    }

    fn figure(
        &self,
        workload: Workload,
        system: System,
        value: impl Fn(&Run) -> Option<f64>,
    ) -> Option<f64> {
        median(self.of(workload, system).filter_map(value))
    }

    /// The first text of W1a later than that of the upstream in the same round, in microseconds.
    pub(crate) fn added(&self, system: System, at: fn(&Quantiles) -> f64) -> Option<f64> {
        let first = |run: &Run| run.report.first_text.as_ref().map(at);
        self.figure(Workload::W1a, system, |run| {
            let mut direct = self.of(Workload::W1a, System::Upstream);
            let direct = direct.find(|direct| direct.round == run.round)?;
            (system != System::Upstream).then_some(first(run)? - first(direct)?)
        })
    }

    /// Microseconds of processor time for each answer.
    pub(crate) fn cpu_per_request(&self, workload: Workload, system: System) -> Option<f64> {
        self.figure(workload, system, |run| per(run.report.cpu_us, run.report.complete))
    }

    /// Microseconds of processor time for each token.
    pub(crate) fn cpu_per_token(&self, workload: Workload, system: System) -> Option<f64> {
        self.figure(workload, system, Run::cpu_per_token)
    }

    pub(crate) fn tokens_per_second(&self, system: System) -> Option<f64> {
        self.figure(Workload::W2, system, |run| Some(float(run.report.tokens) / run.report.seconds))
    }

    pub(crate) fn calls_per_second(&self, system: System) -> Option<f64> {
        self.figure(Workload::W4, system, |run| {
            Some(float(run.report.complete) / run.report.seconds)
        })
    }

    /// Kilobytes that each stream of W3 adds to the idle memory.
    pub(crate) fn memory_per_stream(&self, system: System) -> Option<f64> {
        let memory = self.figure(Workload::W3, system, Run::bytes_per_stream);
        memory.map(|bytes| bytes / 1e3)
    }

    /// Milliseconds from a client's drop to the abort in the upstream.
    pub(crate) fn abort(
        &self,
        workload: Workload,
        system: System,
        at: fn(&Quantiles) -> f64,
    ) -> Option<f64> {
        let time = |run: &Run| run.report.aborts.and_then(|aborts| aborts.time);
        self.figure(workload, system, |run| Some(at(&time(run)?) / 1e3))
    }

    /// Megabytes after start and a few streams.
    pub(crate) fn idle(&self, system: System) -> Option<f64> {
        let in_rounds =
            self.runs.iter().filter(|run| run.system == system && run.workload.is_in_rounds());
        let idle = median(in_rounds.map(|run| float(run.idle_bytes) / 1e6));
        idle.filter(|megabytes| *megabytes > 0.0)
    }

    /// Microseconds to the first text of a cached answer.
    pub(crate) fn cached(&self, system: System) -> Option<f64> {
        self.figure(Workload::Cached, system, |run| Some(run.report.first_text?.p50))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_is_the_middle_value_or_the_mean_of_two() {
        assert_eq!(median([3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median([4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(median([]), None);
    }
}
