//! The tables of a run, as text, Markdown and JSON.

use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::path::Path;

use crate::compare::results::{Results, median};
use crate::compare::system::System;
use crate::compare::table::{Mark, Row, Table, figure, pair};
use crate::compare::targets;
use crate::compare::workload::Workload;
use crate::spec::Quantiles;

/// All loads of a run, in the folder of the results.
pub(crate) const RESULTS_FILE: &str = "results.json";

/// A column: its head, and its cell for a system.
type Column = (&'static str, fn(&Results, System) -> String);

const P50: fn(&Quantiles) -> f64 = |times| times.p50;
const P99: fn(&Quantiles) -> f64 = |times| times.p99;

const COLUMNS: [Column; 13] = [
    ("W1a first token\nadded us p50/p99", |results, system| {
        pair(results.added(system, P50), results.added(system, P99))
    }),
    ("W1a CPU\nus/request", |results, system| {
        figure(results.cpu_per_request(Workload::W1a, system))
    }),
    ("W1b CPU\nus/request", |results, system| {
        figure(results.cpu_per_request(Workload::W1b, system))
    }),
    ("W2 CPU\nus/token", |results, system| figure(results.cpu_per_token(Workload::W2, system))),
    ("W2\ntokens/s", |results, system| figure(results.tokens_per_second(system))),
    ("W3 CPU\nus/token", |results, system| figure(results.cpu_per_token(Workload::W3, system))),
    ("W3\nKB/stream", |results, system| figure(results.memory_per_stream(system))),
    ("W4\nreq/s", |results, system| figure(results.calls_per_second(system))),
    ("W4 CPU\nus/req", |results, system| figure(results.cpu_per_request(Workload::W4, system))),
    ("W5 abort\nms p50/p99", |results, system| aborts(results, Workload::W5, system)),
    ("W5h abort\nms p50/p99", |results, system| aborts(results, Workload::W5h, system)),
    ("idle\nMB", |results, system| figure(results.idle(system))),
    ("cached\nus", |results, system| figure(results.cached(system))),
];

fn aborts(results: &Results, workload: Workload, system: System) -> String {
    let time = |at| results.abort(workload, system, at);
    pair(time(P50), time(P99))
}

fn systems(results: &Results) -> Table {
    let row = |system: System| {
        let cells = COLUMNS.iter().map(|(_, cell)| cell(results, system));
        let mark = if system.has_cache() { Mark::Ours } else { Mark::None };
        Row { cells: [system.title().to_owned()].into_iter().chain(cells).collect(), mark }
    };
    let heads = ["system"].into_iter().chain(COLUMNS.iter().map(|(head, _)| *head));
    let (heads, rows) = (heads.collect(), results.systems().into_iter().map(row).collect());
    let title = "Systems, medians of the rounds";
    Table { title: title.to_owned(), heads, rows }
}

fn target_table(results: &Results) -> Option<Table> {
    let row = |target: targets::Target| {
        let (verdict, mark) =
            if target.is_met { ("met", Mark::Met) } else { ("NOT MET", Mark::NotMet) };
        Row { cells: vec![target.name, target.bound, target.measured, verdict.to_owned()], mark }
    };
    let rows: Vec<_> = targets::evaluate(results).into_iter().map(row).collect();
    let heads = vec!["target", "bound", "measured", ""];
    (!rows.is_empty()).then(|| Table { title: "Targets".to_owned(), heads, rows })
}

/// What the tables leave out: failures, and how much other processes disturbed the run.
fn remarks(results: &Results) -> Vec<String> {
    let mut found: Vec<_> =
        results.missing.iter().map(|(name, reason)| format!("Not run: {name}: {reason}")).collect();
    for system in results.systems() {
        let runs = results.runs.iter().filter(|run| run.system == system);
        let count: u64 = runs.clone().map(|run| run.report.error_count()).sum();
        let missed = runs.clone().filter_map(|run| run.report.aborts).map(|aborts| aborts.missed);
        let missed: u64 = missed.sum();
        if missed > 0 {
            found.push(format!("{}: {missed} drops caused no abort within 1 s", system.title()));
        }
        if let Some(kind) = runs.flat_map(|run| run.report.errors.keys()).next() {
            found.push(format!("{}: {count} errors, such as: {kind}", system.title()));
        }
    }
    for run in results.runs.iter().filter(|run| !run.is_quiet()) {
        found.push(format!(
            "Disturbed: {} of {}: other processes used {} processors, the hypervisor {}",
            run.workload.name(),
            run.system.title(),
            figure(Some(run.report.foreign_cores)),
            figure(Some(run.report.stolen_cores)),
        ));
    }
    let foreign = median(results.runs.iter().map(|run| run.report.foreign_cores));
    let stolen = median(results.runs.iter().map(|run| run.report.stolen_cores));
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    found.push(format!(
        "{} loads on {cores} processors; other processes used {}, the hypervisor {}; medians",
        results.runs.len(),
        figure(foreign),
        figure(stolen),
    ));
    found
}

pub(crate) fn print(results: &Results) -> anyhow::Result<()> {
    let mut text = systems(results).terminal();
    if let Some(table) = target_table(results) {
        text += &table.terminal();
    }
    let _ = writeln!(text);
    for remark in remarks(results) {
        let _ = writeln!(text, "{remark}");
    }
    // It removes the colours where standard output is no terminal.
    Ok(anstream::stdout().write_all(text.as_bytes())?)
}

/// Writes all loads and the tables.
pub(crate) fn write(results: &Results, out: &Path) -> anyhow::Result<()> {
    fs::write(out.join(RESULTS_FILE), serde_json::to_string_pretty(&results.runs)?)?;
    let tables = [Some(systems(results)), target_table(results)];
    let mut text: Vec<_> = tables.iter().flatten().map(Table::markdown).collect();
    text.push(format!("* {}\n", remarks(results).join("\n* ")));
    Ok(fs::write(out.join("report.md"), text.join("\n"))?)
}
