//! Runs loads, and repeats those that other processes disturbed.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpStream};
use std::path::PathBuf;
use std::process::Stdio;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};

use crate::compare::results::{Results, Run};
use crate::compare::stage::{Programs, Stage, tied};
use crate::compare::workload::Workload;
use crate::process::{self, float};
use crate::spec::{LoadReport, LoadSpec};
use crate::upstream::UpstreamState;

/// Processors that other processes may use before a load begins.
const MAX_QUIET_CORES: f64 = 0.2;
/// Wait for other processes before a load begins anyway.
const QUIET_TIMEOUT: Duration = Duration::from_secs(10);
const QUIET_PERIOD: Duration = Duration::from_millis(300);
/// The least disturbed of these counts.
const MAX_TRIES: usize = 3;
/// Wait for streams that a system has not aborted.
const REST_TIMEOUT: Duration = Duration::from_secs(2);

/// Collects the results of a run.
pub(crate) struct Meter {
    pub(crate) begin: Instant,
    pub(crate) results: Results,
    /// Has all loads so far, so that an interrupted run keeps them.
    pub(crate) file: PathBuf,
}

impl Meter {
    /// A line of progress.
    pub(crate) fn say(&self, text: &str) {
        eprintln!("[{:>4} s] {text}", self.begin.elapsed().as_secs());
    }

    /// Runs a workload on the system at an index of the stage.
    pub(crate) fn run(
        &mut self,
        stage: &Stage<'_>,
        at: usize,
        workload: Workload,
        round: usize,
    ) -> anyhow::Result<()> {
        let running = &stage.running[at];
        if workload == Workload::Cached && !running.system.has_cache() {
            return Ok(());
        }
        stage.set_upstream(workload.settings())?;
        let spec = stage.spec(at, workload.shape());
        let (system, idle_bytes, streams) =
            (running.system, running.idle_bytes, spec.shape.concurrency);
        let run = undisturbed(|| {
            let report = load(stage.programs, &spec)?;
            Ok(Run { round, workload, system, streams, idle_bytes, report })
        });
        match run {
            Ok(run) => self.record(run)?,
            Err(error) => {
                let reason = format!("{}: {error:#}", workload.name());
                self.say(&format!("{} failed: {reason}", running.system.title()));
                self.results.missing.insert(running.system.title().to_owned(), reason);
            }
        }
        end_streams(stage)
    }

    fn record(&mut self, run: Run) -> anyhow::Result<()> {
        let report = &run.report;
        let rate = float(report.complete + report.left) / report.seconds;
        self.say(&format!(
            "round {} {:<5} {:<26} {rate:>8.0} answers/s, {} errors, others {:.2} cores",
            run.round + 1,
            run.workload.name(),
            run.system.title(),
            report.error_count(),
            report.foreign_cores,
        ));
        self.add(run)
    }

    /// Keeps the results of a load.
    pub(crate) fn add(&mut self, run: Run) -> anyhow::Result<()> {
        self.results.runs.push(run);
        Ok(fs::write(&self.file, serde_json::to_string_pretty(&self.results.runs)?)?)
    }
}

/// Runs a load, and again if other processes used the processors meanwhile.
pub(crate) fn undisturbed(mut load: impl FnMut() -> anyhow::Result<Run>) -> anyhow::Result<Run> {
    let mut best: Option<Run> = None;
    let noise = |run: &Run| run.report.foreign_cores + run.report.stolen_cores;
    for _ in 0..MAX_TRIES {
        wait_quiet();
        let run = load()?;
        let is_quiet = run.is_quiet();
        if best.as_ref().is_none_or(|best| noise(&run) < noise(best)) {
            best = Some(run);
        }
        if is_quiet {
            break;
        }
    }
    best.context("no load was run")
}

/// Runs the load generator.
pub(crate) fn load(programs: &Programs, spec: &LoadSpec) -> anyhow::Result<LoadReport> {
    let mut child = tied(&programs.own)
        .arg("load")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("starting the load generator")?;
    let mut input = child.stdin.take().context("no input")?;
    input.write_all(serde_json::to_string(spec)?.as_bytes())?;
    drop(input);
    let done = child.wait_with_output()?;
    ensure!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr).trim());
    Ok(serde_json::from_slice(&done.stdout)?)
}

/// The body of a reply with status 200.
pub(crate) fn http(port: u16, method: &str, path: &str, body: &str) -> anyhow::Result<String> {
    let mut socket = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    socket.set_read_timeout(Some(Duration::from_secs(5)))?;
    let length = body.len();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}"
    );
    socket.write_all(request.as_bytes())?;
    let mut reply = String::new();
    socket.read_to_string(&mut reply)?;
    let (head, body) = reply.split_once("\r\n\r\n").context("a short reply")?;
    ensure!(head.starts_with("HTTP/1.1 200"), "{method} {path}: {head}");
    Ok(body.to_owned())
}

fn wait_quiet() {
    let begin = Instant::now();
    while begin.elapsed() < QUIET_TIMEOUT {
        let before = process::machine();
        sleep(QUIET_PERIOD);
        let busy = process::machine().busy.saturating_sub(before.busy);
        if busy.as_secs_f64() / QUIET_PERIOD.as_secs_f64() < MAX_QUIET_CORES {
            return;
        }
    }
}

/// Ends the streams that a system left open, so that they do not disturb the next load.
fn end_streams(stage: &Stage<'_>) -> anyhow::Result<()> {
    let begin = Instant::now();
    while begin.elapsed() < REST_TIMEOUT {
        let counters: UpstreamState =
            serde_json::from_str(&http(stage.upstream_port, "GET", "/state", "")?)?;
        if counters.in_flight == 0 {
            return Ok(());
        }
        sleep(Duration::from_millis(100));
    }
    http(stage.upstream_port, "POST", "/end", "").map(drop)
}
