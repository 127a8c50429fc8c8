//! Costs of single parts of the mesh, each in comparison with the same run without it. Ratios therefore carry over
//! where absolute numbers do not. Authentication, an active rate limit, logs at info level and metrics are on.
//!
//! `make bench-mesh` builds what it needs and runs it. `make bench` compares the whole with its peers.

mod caller;
mod completion;
mod decisions;
mod engine;
mod gauge;
mod hostile_clients;
mod http;
mod outbox;
mod readers;
mod report;
mod route;
mod samples;
mod share;
mod shared_limit;
mod stage;
mod traces;

use std::io::Write as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use clap::{Parser, ValueEnum};
use tokio::signal::unix::{SignalKind, signal};

use crate::report::Table;
use crate::stage::{Stage, repository};

/// Maximum duration of a run.
const RUN_TIMEOUT: Duration = Duration::from_mins(15);

/// Measures what the mesh costs.
#[derive(Debug, Parser)]
struct Args {
    /// Measures a tenth of everything: for a quick check, not for conclusions.
    #[arg(long)]
    quick: bool,
    /// One part alone.
    #[arg(long, value_enum)]
    only: Option<Section>,
    /// The release binary; default: where cargo puts it.
    #[arg(long, env = "HAPA_BIN")]
    hapa: Option<PathBuf>,
    /// Envoy; default: where the tool installer puts it.
    #[arg(long, env = "ENVOY_BIN")]
    envoy: Option<PathBuf>,
    /// Passed by cargo.
    #[arg(long, hide = true)]
    bench: bool,
    /// Runs as the engine process.
    #[arg(long, hide = true)]
    as_engine: bool,
}

/// What can be measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Section {
    Admission,
    Traces,
    Route,
    Spool,
    Completion,
    Readers,
    Strangers,
}

/// What is measured.
#[derive(Debug)]
pub(crate) struct Binaries {
    hapa: PathBuf,
    envoy: PathBuf,
}

/// Numbers of rounds and durations of the sections.
#[derive(Clone, Copy, Debug)]
struct Extent {
    rounds: usize,
    sections: usize,
}

const FULL: Extent = Extent { rounds: 3_000, sections: 4 };
const QUICK: Extent = Extent { rounds: 300, sections: 1 };

const ABOUT: &str = "\
All on one machine, over loopback, with a simulated engine. On in the mesh: keys, a limit that
counts (1,000,000 a minute), logs at info, metrics. Answers are fresh ones, each kept as the next
would find it, where nothing else is said. Compare within this run, not with others.
";

/// One thread, so that the load generator does not take cores from the measured processes.
#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    if args.as_engine {
        return engine::serve().await;
    }
    let (mut interrupt, mut terminate) =
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    // Whichever branch completes first, the drop of the first future ends the processes that it started.
    let report = tokio::select! {
        report = tokio::time::timeout(RUN_TIMEOUT, bench(&args)) => report.context("it hung")??,
        _ = interrupt.recv() => bail!("interrupted"),
        _ = terminate.recv() => bail!("terminated"),
    };
    Ok(std::io::stdout().write_all(report.as_bytes())?)
}

async fn bench(args: &Args) -> anyhow::Result<String> {
    let from = Instant::now();
    let extent = if args.quick { QUICK } else { FULL };
    let wanted = |part| args.only.is_none_or(|only| only == part);
    let mut report = ABOUT.to_owned();
    let mut add = |table: Table| {
        eprint!("{table}");
        report += &table.to_string();
    };
    alone(&wanted, extent, from, &mut add).await?;
    if matches!(args.only, Some(Section::Route | Section::Spool)) {
        return Ok(report);
    }
    say(from, "starting the engine, the mesh and the gateway");
    let binaries = binaries(args)?;
    let mut stage = Stage::start(&binaries, None).await?;
    if wanted(Section::Admission) {
        admission(&mut stage, extent, from, &mut add).await?;
    }
    answers(&wanted, &mut stage, extent, from, &mut add).await?;
    drop(stage);
    if wanted(Section::Traces) {
        say(from, "calls that are followed");
        let tables = traces::measure(&binaries, share::LOADS, extent.sections * 5).await?;
        tables.into_iter().for_each(&mut add);
    }
    say(from, "done");
    Ok(report)
}

async fn answers(
    wanted: &impl Fn(Section) -> bool,
    stage: &mut Stage,
    extent: Extent,
    from: Instant,
    add: &mut impl FnMut(Table),
) -> anyhow::Result<()> {
    if wanted(Section::Completion) {
        say(from, "completions");
        add(completion::measure(stage, extent.rounds).await?);
    }
    if wanted(Section::Readers) {
        say(from, "readers who stand still");
        add(readers::measure(stage, extent.sections, extent.rounds).await?);
    }
    if wanted(Section::Strangers) {
        say(from, "strangers at the door");
        add(hostile_clients::measure(stage, extent.sections, extent.rounds).await?);
    }
    Ok(())
}

/// Sections that need no running mesh.
async fn alone(
    wanted: &impl Fn(Section) -> bool,
    extent: Extent,
    from: Instant,
    add: &mut impl FnMut(Table),
) -> anyhow::Result<()> {
    if wanted(Section::Route) {
        say(from, "the choice of an engine");
        add(route::measure(extent.rounds / 10)?);
    }
    if wanted(Section::Spool) {
        say(from, "remembering calls");
        add(outbox::measure(extent.rounds).await?);
    }
    Ok(())
}

async fn admission(
    stage: &mut Stage,
    extent: Extent,
    from: Instant,
    add: &mut impl FnMut(Table),
) -> anyhow::Result<()> {
    say(from, "decisions of admission");
    add(decisions::measure(stage, extent.rounds / 10).await?);
    add(shared_limit::measure(extent.rounds).await?);
    for load in share::LOADS {
        say(from, "admission's share of an answer");
        add(share::measure(stage, load, extent.sections * 10).await?);
    }
    Ok(())
}

fn binaries(args: &Args) -> anyhow::Result<Binaries> {
    let built = || {
        let own = std::env::current_exe()?;
        // .../release/deps/mesh-<hash> stands below .../release/hapa
        let folder = own.ancestors().nth(2).context("this binary stands nowhere")?;
        anyhow::Ok(folder.join("hapa"))
    };
    let hapa = args.hapa.clone().map_or_else(built, Ok)?;
    let envoy = args.envoy.clone().unwrap_or_else(|| repository(".tools/bin/envoy"));
    for (file, remedy) in [(&hapa, "cargo build --release"), (&envoy, "infra/tools/install run")] {
        ensure!(file.exists(), "{} is missing; type: {remedy}", file.display());
    }
    Ok(Binaries { hapa, envoy })
}

fn say(from: Instant, words: &str) {
    eprintln!("[{:>3} s] {words}", from.elapsed().as_secs());
}
