//! The cost of many open streams. All numbers of streams get the same tokens a second in sum, so that only the number
//! differs. Each begins with a new HAPA, because freed memory is reused without being visible.

use std::path::Path;
use std::time::Duration;

use rustix::process::{Resource, getrlimit};

use crate::compare::measure::{Meter, load, undisturbed};
use crate::compare::results::Run;
use crate::compare::stage::{Programs, Stage};
use crate::compare::system::System;
use crate::compare::workload::Workload;
use crate::spec::{LoadShape, SimSettings};

const STREAMS: [u32; 4] = [100, 1_000, 5_000, 10_000];
/// Tokens a second, of all streams.
const TOKEN_RATE: u32 = 2_500;
const HOLD_PERIOD: Duration = Duration::from_secs(8);
/// Between the opening of two streams.
const START_INTERVAL: Duration = Duration::from_micros(1_500);
/// As many as HAPA allows: no stream ends during the measurement.
const MAX_TOKENS: u64 = 4_096;
/// File descriptors of a process besides one for each stream. Clients share connections.
const OTHER_FILES: u64 = 2_000;

pub(super) fn measure(meter: &mut Meter, programs: &Programs, folder: &Path) -> anyhow::Result<()> {
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    for streams in STREAMS {
        if limit < u64::from(streams) + OTHER_FILES {
            let reason = format!("the limit of {limit} file descriptors is too low");
            left_out(meter, streams, reason);
            continue;
        }
        match undisturbed(|| open_streams(programs, folder, streams)) {
            Ok(run) => {
                meter.say(&format!(
                    "{streams} open streams: {:.1} us a token, {:.1} KB a stream",
                    run.cpu_per_token().unwrap_or(f64::NAN),
                    run.bytes_per_stream().unwrap_or(f64::NAN) / 1e3,
                ));
                meter.add(run)?;
            }
            Err(error) => left_out(meter, streams, format!("{error:#}")),
        }
    }
    Ok(())
}

fn left_out(meter: &mut Meter, streams: u32, reason: String) {
    meter.say(&format!("{streams} open streams are left out: {reason}"));
    meter.results.missing.insert(format!("{streams} open streams"), reason);
}

fn open_streams(programs: &Programs, folder: &Path, streams: u32) -> anyhow::Result<Run> {
    let stage = Stage::start(programs, folder, &[System::Hapa], true)?;
    let interval = Duration::from_secs(1) * streams / TOKEN_RATE;
    stage.set_upstream(SimSettings { interval, ..SimSettings::default() })?;
    let shape = LoadShape {
        tokens: MAX_TOKENS,
        concurrency: usize::try_from(streams)?,
        count: u64::MAX,
        warm_up: 0,
        spread: START_INTERVAL * streams,
        hold: Some(HOLD_PERIOD),
        ..Workload::Scale.shape()
    };
    let report = load(programs, &stage.spec(0, shape))?;
    let idle_bytes = stage.running[0].idle_bytes;
    let (workload, system) = (Workload::Scale, System::Hapa);
    Ok(Run { round: 0, workload, system, streams: shape.concurrency, idle_bytes, report })
}
