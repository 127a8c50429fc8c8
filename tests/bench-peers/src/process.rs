//! Processor time and memory of processes with all their descendants, and of the machine, from /proc.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// The monotonic clock in nanoseconds, which all processes of a machine share.
pub(crate) fn now() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    let (seconds, nanos) = (u64::try_from(now.tv_sec), u64::try_from(now.tv_nsec));
    seconds.unwrap_or_default() * 1_000_000_000 + nanos.unwrap_or_default()
}

/// A count as a number for ratios. All counts are far below 2^52.
#[expect(clippy::cast_precision_loss, reason = "a measurement is not that exact")]
pub(crate) fn float(count: u64) -> f64 {
    count as f64
}

/// Processor time of the machine since its start.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MachineTime {
    /// Time of all processes and of the kernel.
    pub(crate) busy: Duration,
    /// Time that the hypervisor gave to other machines.
    pub(crate) stolen: Duration,
}

fn ticks(count: u64) -> Duration {
    let per_second = rustix::param::clock_ticks_per_second().max(1);
    Duration::from_nanos(1_000_000_000 / per_second * count)
}

/// The fields of /proc/PID/stat after the name.
fn stat(pid: u32) -> Option<Vec<u64>> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = text.rsplit_once(") ")?;
    Some(fields.split_ascii_whitespace().map(|field| field.parse().unwrap_or(0)).collect())
}

/// The processes and their descendants.
pub(crate) fn trees(roots: &[u32]) -> Vec<u32> {
    let mut children: BTreeMap<u64, Vec<u32>> = BTreeMap::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let pid = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok());
        if let Some(pid) = pid
            && let Some(parent) = stat(pid).and_then(|fields| fields.get(1).copied())
        {
            children.entry(parent).or_default().push(pid);
        }
    }
    let (mut found, mut at) = (roots.to_vec(), 0);
    while at < found.len() {
        found.extend(children.get(&u64::from(found[at])).into_iter().flatten());
        at += 1;
    }
    found
}

/// User and system time of processes, and of their children that have ended.
pub(crate) fn cpu(pids: &[u32]) -> Duration {
    let all = pids.iter().filter_map(|pid| stat(*pid));
    ticks(all.map(|fields| fields.iter().skip(11).take(4).sum::<u64>()).sum())
}

/// Resident memory of processes, in bytes.
pub(crate) fn memory(pids: &[u32]) -> u64 {
    let all = pids.iter().filter_map(|pid| fs::read_to_string(format!("/proc/{pid}/statm")).ok());
    let pages = all.filter_map(|text| text.split_ascii_whitespace().nth(1)?.parse::<u64>().ok());
    pages.sum::<u64>() * u64::try_from(rustix::param::page_size()).unwrap_or_default()
}

/// The processor time of the machine.
pub(crate) fn machine() -> MachineTime {
    let text = fs::read_to_string("/proc/stat").unwrap_or_default();
    let fields = text.lines().next().unwrap_or_default().split_ascii_whitespace().skip(1);
    let fields: Vec<u64> = fields.map(|field| field.parse().unwrap_or(0)).collect();
    // user nice system idle iowait irq softirq steal
    let at = |index: usize| fields.get(index).copied().unwrap_or_default();
    MachineTime { busy: ticks(at(0) + at(1) + at(2) + at(5) + at(6)), stolen: ticks(at(7)) }
}
