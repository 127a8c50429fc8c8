//! Processor time of this process and all its descendants, including ended ones. Callers and mesh run in this
//! process, PostgreSQL below it. Other load of the machine changes it little, but changes every rate.

use std::collections::HashMap;
use std::fs;
use std::time::Duration;

use anyhow::Context as _;

/// The kernel's clock tick, which is 10 ms on every supported platform.
const TICK_PERIOD: Duration = Duration::from_millis(10);

/// What was used until now by this process, and by those below it.
pub(crate) fn used() -> anyhow::Result<(Duration, Duration)> {
    let own = fs::read_link("/proc/self")?;
    let own: u32 = own.to_str().and_then(|name| name.parse().ok()).context("no process id")?;
    let mut processes = HashMap::new();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else { continue };
        // A process may end between the listing and the reading.
        let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { continue };
        if let Some(read) = parse(&stat) {
            processes.insert(pid, read);
        }
    }
    let (mut here, mut below) = (0, 0);
    for (pid, (_, ticks)) in &processes {
        if *pid == own {
            here += ticks;
        } else if is_below(*pid, own, &processes) {
            below += ticks;
        }
    }
    Ok((TICK_PERIOD * here, TICK_PERIOD * below))
}

/// A process's parent and ticks.
type Read = (u32, u32);

fn is_below(pid: u32, own: u32, processes: &HashMap<u32, Read>) -> bool {
    let parents = std::iter::successors(Some(pid), |pid| Some(processes.get(pid)?.0));
    parents.take_while(|pid| *pid > 1).any(|pid| pid == own)
}

fn parse(stat: &str) -> Option<Read> {
    // Its name, in brackets, may have anything in it.
    let fields: Vec<_> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let number = |at: usize| fields.get(at)?.parse::<u32>().ok();
    // Its own time, and that of its reaped children.
    let ticks = number(11)? + number(12)? + number(13)? + number(14)?;
    Some((number(1)?, ticks))
}
