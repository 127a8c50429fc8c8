//! Costs of the mesh in comparison with the engine itself and with a plain Envoy, in one run on one
//! machine. Ratios therefore carry over where absolute numbers do not. Authentication, an active
//! rate limit, logs at info level and metrics are on.
//!
//! `make bench` builds what it needs and runs it.

mod cached;
mod caller;
mod completion;
mod cost;
mod decisions;
mod engine;
mod first_token;
mod gauge;
mod hostile_clients;
mod http;
mod leaving;
mod open;
mod outbox;
mod readers;
mod report;
mod route;
mod samples;
mod share;
mod shared_limit;
mod stage;
mod streams;
mod traces;

use std::io::Write as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use clap::{Parser, ValueEnum};
use tokio::signal::unix::{SignalKind, signal};

use crate::cost::Pace;
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
    FirstToken,
    Cost,
    Leaving,
    Admission,
    Traces,
    Route,
    Spool,
    Cache,
    Completion,
    Readers,
    Strangers,
    Open,
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
    section: Duration,
    hold: Duration,
    drops: usize,
}

const FULL: Extent = Extent {
    rounds: 3_000,
    sections: 4,
    section: Duration::from_secs(3),
    hold: Duration::from_secs(8),
    drops: 300,
};
const QUICK: Extent = Extent {
    rounds: 300,
    sections: 1,
    section: Duration::from_millis(1_200),
    hold: Duration::from_millis(1_200),
    drops: 30,
};

const ABOUT: &str = "\
All on one machine, over loopback, with a simulated engine. On in the mesh: keys, a limit that
counts (1,000,000 a minute), logs at info, metrics. Answers are fresh ones, each kept as the next
would find it, where nothing else is said. Compare within this run, not with others.
";

const PACED: Pace = Pace { streams: 50, gap: Duration::from_millis(20) };
const UNPACED: Pace = Pace { streams: 4, gap: Duration::ZERO };
/// Numbers of open streams. The gaps are so long that two cores do not limit the streams.
const OPEN: [Pace; 2] = [
    Pace { streams: 200, gap: Duration::from_millis(50) },
    Pace { streams: 1_000, gap: Duration::from_millis(100) },
];

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
    say(from, "starting the engine, the mesh, the gateway and a plain Envoy");
    let binaries = binaries(args)?;
    let mut stage = Stage::start(&binaries, None).await?;
    if wanted(Section::FirstToken) {
        say(from, "first token");
        add(first_token::measure(&mut stage, extent.rounds).await?);
    }
    if wanted(Section::Cost) {
        costs(&mut stage, extent, from, &mut add).await?;
    }
    if wanted(Section::Leaving) {
        say(from, "clients who leave");
        add(leaving::measure(&mut stage, extent.drops).await?);
    }
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
    if wanted(Section::Open) {
        open_streams(&binaries, extent, from, &mut add).await?;
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
    if wanted(Section::Cache) {
        say(from, "known answers");
        add(cached::measure(stage, extent.rounds).await?);
    }
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

async fn costs(
    stage: &mut Stage,
    extent: Extent,
    from: Instant,
    add: &mut impl FnMut(Table),
) -> anyhow::Result<()> {
    for pace in [PACED, UNPACED] {
        say(from, "processor time per token");
        add(cost::measure(stage, pace, extent.sections, extent.section).await?);
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

async fn open_streams(
    binaries: &Binaries,
    extent: Extent,
    from: Instant,
    add: &mut impl FnMut(Table),
) -> anyhow::Result<()> {
    for Pace { streams, gap } in OPEN {
        say(from, &format!("{streams} open streams, with everything started anew"));
        let mut stage = Stage::start(binaries, None).await?;
        add(open::measure(&mut stage, streams, gap, extent.hold).await?);
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
