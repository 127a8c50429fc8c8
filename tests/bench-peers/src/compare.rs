//! The comparison: rounds in which every workload runs on every system, so that a slower machine affects all of them.
//!
//! Each round starts every process anew. The memory of a stream is therefore measured in processes that have no
//! freed memory to reuse.

mod measure;
mod ratios;
mod report;
mod results;
mod scale;
mod stage;
mod system;
mod table;
mod targets;
mod workload;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Context as _;
use clap::{Args, ValueEnum as _};

use crate::compare::measure::Meter;
use crate::compare::results::Results;
use crate::compare::stage::{Programs, Stage};
use crate::compare::system::System;
use crate::compare::workload::Workload;

/// The arguments of the comparison.
#[derive(Debug, Args)]
pub(crate) struct CompareArgs {
    /// Rounds; each runs every workload on every system.
    #[arg(long, default_value_t = 3, value_name = "N")]
    rounds: usize,
    /// Workloads, comma-separated [default: all].
    #[arg(long, value_enum, value_delimiter = ',', ignore_case = true)]
    workloads: Vec<Workload>,
    /// Systems beside the upstream and HAPA, comma-separated [default: all].
    #[arg(long, value_enum, value_delimiter = ',', ignore_case = true)]
    peers: Vec<System>,
    /// Compares the ratios of HAPA to the floor with a file, and fails if one is more than 15 % worse.
    #[arg(long, value_name = "FILE", conflicts_with = "record")]
    check: Option<PathBuf>,
    /// Writes the ratios of HAPA to the floor to a file.
    #[arg(long, value_name = "FILE")]
    record: Option<PathBuf>,
    /// Prints the tables of earlier runs together, from their results.json, and runs nothing.
    #[arg(long, value_name = "FILE", value_delimiter = ',')]
    merge: Vec<PathBuf>,
    /// Folder of the results [default: target/bench].
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
}

/// Runs the comparison and prints its tables.
pub(crate) fn run(args: &CompareArgs) -> anyhow::Result<ExitCode> {
    let programs = Programs::find()?;
    let out = args.out.clone().unwrap_or_else(|| programs.target.join("bench"));
    std::fs::create_dir_all(&out).with_context(|| format!("creating {}", out.display()))?;
    let mut results = Results::default();
    if args.merge.is_empty() {
        raise_file_limit();
        results = compare(args, &programs, &out)?;
    }
    for file in &args.merge {
        results.merge(file)?;
    }
    report::write(&results, &out)?;
    report::print(&results)?;
    match (&args.check, &args.record) {
        (Some(file), _) => ratios::check(&results, file),
        (None, Some(file)) => ratios::record(&results, file),
        (None, None) => Ok(ExitCode::SUCCESS),
    }
}

fn compare(args: &CompareArgs, programs: &Programs, out: &Path) -> anyhow::Result<Results> {
    let mut meter = Meter {
        begin: Instant::now(),
        results: Results::default(),
        file: out.join(report::RESULTS_FILE),
    };
    let is_wanted =
        |workload: &&Workload| args.workloads.is_empty() || args.workloads.contains(workload);
    let workloads: Vec<_> = Workload::value_variants().iter().filter(is_wanted).copied().collect();
    let systems = systems(&args.peers);
    let folder = out.join("run");
    let in_rounds: Vec<_> = workloads.iter().filter(|workload| workload.is_in_rounds()).collect();
    for round in 0..args.rounds {
        if in_rounds.is_empty() {
            break;
        }
        meter.say(&format!("round {} of {}: starting the systems", round + 1, args.rounds));
        let mut stage = Stage::start(programs, &folder, &systems, false)?;
        meter.results.missing.append(&mut stage.missing);
        for workload in &in_rounds {
            for turn in 0..stage.running.len() {
                let at = (round + turn) % stage.running.len();
                meter.run(&stage, at, **workload, round)?;
            }
        }
    }
    if workloads.contains(&Workload::Scale) {
        scale::measure(&mut meter, programs, &folder)?;
    }
    meter.say("done");
    Ok(meter.results)
}

/// The systems of a run: those that were asked for, in the order of the table.
fn systems(peers: &[System]) -> Vec<System> {
    let is_wanted = |system: &&System| {
        peers.is_empty()
            || peers.contains(system)
            || matches!(system, System::Upstream | System::Hapa)
    };
    System::value_variants().iter().filter(is_wanted).copied().collect()
}

/// Sockets of thousands of streams need more file descriptors than a shell's default.
fn raise_file_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // Without it, the largest scale is left out.
    let _ = setrlimit(Resource::Nofile, limit);
}
