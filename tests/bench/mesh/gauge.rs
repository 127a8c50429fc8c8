//! Processor time of a process, from the kernel.

use std::fs;
use std::time::Duration;

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

/// The ratio of two counts. All counts are far below 2^52, so their conversion is exact.
#[expect(clippy::cast_precision_loss, reason = "a measurement is not that exact")]
pub(crate) fn ratio(a: u64, b: u64) -> f64 {
    a as f64 / b as f64
}
