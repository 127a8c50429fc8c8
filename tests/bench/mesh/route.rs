//! The choice of an engine from a snapshot of 64, which every call waits for. Nothing waits in it, so
//! wall-clock time is processor time.

use std::hint::black_box;
use std::time::Instant;

use anyhow::ensure;
use hapa_codegen::upstream::pool::balancer::{Candidate, affinity, choose};

use crate::report::{Table, verdict};
use crate::samples::Samples;

const TARGET: f64 = 5.0;
const ENGINES: u32 = 64;
/// Choices of one measured batch. A batch's milliseconds are a choice's microseconds.
const BATCH: usize = 1_000;

pub(crate) fn measure(batches: usize) -> anyhow::Result<Table> {
    let title =
        format!("The choice among {ENGINES} engines, {batches} batches of {BATCH}, in us each");
    let mut table = Table::new(title, &["", "median", "p99", "target"]);
    let prompt = vec![b'x'; 16 * 1024];
    for (name, resident, session, prompt) in [
        ("two drawn at random", false, "", &b""[..]),
        ("an adapter that a quarter has", true, "", b""),
        ("a session, with its hash", false, "an-editor-that-is-open", b""),
        ("a long prompt, with its hash", false, "", &prompt[..]),
    ] {
        let samples = timed(batches, resident, session, prompt)?;
        let (median, p99) = (samples.median(), samples.p99());
        let target = verdict(median, "<", TARGET, " us");
        table.row([name.to_owned(), format!("{median:.3}"), format!("{p99:.3}"), target]);
    }
    Ok(table)
}

fn timed(batches: usize, resident: bool, session: &str, prompt: &[u8]) -> anyhow::Result<Samples> {
    let mut state = 1_u64;
    // A linear congruential generator is cheap, and random enough for the choice.
    let mut random = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        state >> 16
    };
    let engine = |number: u32| Candidate {
        id: u64::from(number).wrapping_mul(0x9e37_79b9_7f4a_7c15),
        waiting: number % 5,
        running: number % 17,
        in_flight: number % 11,
        in_flight_at_probe: number % 7,
        cache_usage: 0.5,
        is_resident: resident && number.is_multiple_of(4),
    };
    let engines: Vec<_> = (0..ENGINES).map(engine).collect();
    let mut samples = Samples::default();
    for batch in 0..batches + batches / 10 {
        let (from, mut all) = (Instant::now(), true);
        for _ in 0..BATCH {
            let key = affinity("tenant", black_box(session), black_box(prompt));
            all &= choose(black_box(&engines), key, &mut random).is_some();
        }
        let took = from.elapsed();
        ensure!(all, "nobody was chosen");
        // The first tenth warms up.
        if batch >= batches / 10 {
            samples.push(took);
        }
    }
    Ok(samples)
}
