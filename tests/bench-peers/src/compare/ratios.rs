//! The ratios of HAPA to the floor of the same run. They carry over to other machines, where figures do not.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context as _, ensure};

use crate::compare::results::Results;
use crate::compare::system::System;
use crate::compare::table::{Mark, Row, Table, figure};
use crate::compare::workload::Workload;

/// A ratio may be worse than the recorded one by this factor.
const MAX_CHANGE: f64 = 1.15;

/// Of each ratio, a higher one is worse.
fn ratios(results: &Results) -> BTreeMap<String, f64> {
    let request = |workload| move |system| results.cpu_per_request(workload, system);
    let token = |workload| move |system| results.cpu_per_token(workload, system);
    let ratio = |value: &dyn Fn(System) -> Option<f64>| {
        Some(value(System::Hapa)? / value(System::Floor).filter(|floor| *floor > 0.0)?)
    };
    let abort = |workload| move |system| results.abort(workload, system, |times| times.p50);
    let found = [
        ("W1a added first token", ratio(&|system| results.added(system, |times| times.p50))),
        ("W1a CPU a request", ratio(&request(Workload::W1a))),
        ("W1b CPU a request", ratio(&request(Workload::W1b))),
        ("W2 CPU a token", ratio(&token(Workload::W2))),
        ("W2 time a token", ratio(&|system| results.tokens_per_second(system).map(f64::recip))),
        ("W3 CPU a token", ratio(&token(Workload::W3))),
        ("W3 memory a stream", ratio(&|system| results.memory_per_stream(system))),
        ("W4 CPU a request", ratio(&request(Workload::W4))),
        ("W4 time a call", ratio(&|system| results.calls_per_second(system).map(f64::recip))),
        ("W5 abort", ratio(&abort(Workload::W5))),
        ("W5h abort", ratio(&abort(Workload::W5h))),
        ("idle memory", ratio(&|system| results.idle(system))),
    ];
    found.into_iter().filter_map(|(name, ratio)| Some((name.to_owned(), ratio?))).collect()
}

/// Writes the ratios of this run to a file.
pub(crate) fn record(results: &Results, file: &Path) -> anyhow::Result<ExitCode> {
    let ratios =
        ratios(results).into_iter().map(|(name, ratio)| (name, (ratio * 100.0).round() / 100.0));
    let ratios: BTreeMap<_, _> = ratios.collect();
    fs::write(file, serde_json::to_string_pretty(&ratios)? + "\n")?;
    Ok(ExitCode::SUCCESS)
}

/// Compares the ratios of this run with those of a file, and fails if one is worse.
pub(crate) fn check(results: &Results, file: &Path) -> anyhow::Result<ExitCode> {
    let missing = || format!("reading {}; `make bench-record` writes it", file.display());
    let text = fs::read_to_string(file).with_context(missing)?;
    let recorded: BTreeMap<String, f64> = serde_json::from_str(&text)?;
    let (table, worse) = compared(&recorded, &ratios(results));
    ensure!(!table.rows.is_empty(), "no recorded ratio was measured");
    anstream::stdout().write_all(table.terminal().as_bytes())?;
    if worse.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!("\nmore than 15 % worse than recorded: {}", worse.join(", "));
    Ok(ExitCode::FAILURE)
}

/// The table of both, and the names of those that are worse.
fn compared(
    recorded: &BTreeMap<String, f64>,
    measured: &BTreeMap<String, f64>,
) -> (Table, Vec<String>) {
    let (mut rows, mut worse) = (Vec::new(), Vec::new());
    for (name, recorded) in recorded {
        let Some(measured) = measured.get(name) else { continue };
        let is_worse = *measured > recorded * MAX_CHANGE;
        let cells = [name.clone(), figure(Some(*recorded)), figure(Some(*measured))];
        let verdict = if is_worse { "WORSE" } else { "as recorded or better" };
        let cells = cells.into_iter().chain([verdict.to_owned()]).collect();
        rows.push(Row { cells, mark: if is_worse { Mark::NotMet } else { Mark::Met } });
        if is_worse {
            worse.push(name.clone());
        }
    }
    let heads = vec!["HAPA to the floor", "recorded", "measured", ""];
    (Table { title: "Ratios".to_owned(), heads, rows }, worse)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_ratio_that_is_more_than_15_percent_worse_fails() {
        let all = |values: [f64; 3]| {
            let names = ["better", "near", "worse"].map(str::to_owned);
            names.into_iter().zip(values).collect::<BTreeMap<_, _>>()
        };
        let (table, worse) = compared(&all([2.0, 2.0, 2.0]), &all([1.0, 2.2, 2.4]));
        assert_eq!(worse, ["worse"]);
        assert_eq!(table.rows.len(), 3);
    }
}
