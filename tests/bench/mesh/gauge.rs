//! Processor time and memory of a process, from the kernel.

use std::fs;
use std::time::Duration;

use anyhow::Context as _;

/// Processor time of all threads, to the nanosecond. Ended threads are not counted, so no thread may
/// end between two readings.
pub(crate) fn cpu(pid: u32) -> anyhow::Result<Duration> {
    let mut nanos = 0;
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        // A thread may end between the listing and the reading.
        let Ok(text) = fs::read_to_string(thread?.path().join("schedstat")) else { continue };
        nanos += text.split(' ').next().and_then(|word| word.parse().ok()).unwrap_or(0);
    }
    Ok(Duration::from_nanos(nanos))
}

/// Memory that is resident, in bytes.
pub(crate) fn memory(pid: u32) -> anyhow::Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    Ok(kib.context("no VmRSS")? * 1024)
}

/// Busy time and total time of the machine's processors since its start, in ticks.
pub(crate) fn machine() -> anyhow::Result<(u64, u64)> {
    let stat = fs::read_to_string("/proc/stat")?;
    let line = stat.lines().next().context("/proc/stat is empty")?;
    let ticks: Vec<u64> = line.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    // user nice system idle iowait irq softirq steal; the guests' are in user already.
    let ticks = ticks.get(..8).context("/proc/stat is too short")?;
    let all: u64 = ticks.iter().sum();
    Ok((all - ticks[3] - ticks[4], all))
}

/// The busy share of the machine's processors between two readings.
pub(crate) fn busy(from: (u64, u64), to: (u64, u64)) -> f64 {
    ratio(to.0 - from.0, (to.1 - from.1).max(1))
}

/// The ratio of two counts. All counts are far below 2^52, so their conversion is exact.
#[expect(clippy::cast_precision_loss, reason = "a measurement is not that exact")]
pub(crate) fn ratio(a: u64, b: u64) -> f64 {
    a as f64 / b as f64
}
