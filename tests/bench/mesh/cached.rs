//! The latency of a cached answer: the first frame with text, and the whole answer, one call at a time.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};

use crate::caller::{Caller, Way};
use crate::engine::Play;
use crate::report::{Table, ms, verdict};
use crate::samples::Samples;
use crate::stage::Stage;

const WAYS: [Way; 3] = [Way::Mesh, Way::Gateway, Way::GatewayJson];
/// About 2.4 KB of text.
const TOKENS: u32 = 200;
const TARGET: f64 = 1.0;

pub(crate) async fn measure(stage: &mut Stage, rounds: usize) -> anyhow::Result<Table> {
    stage.engine.play(Play { tokens: TOKENS as usize, gap: Duration::ZERO, silence: None }).await?;
    let mut callers = Vec::new();
    for way in WAYS {
        callers.push((
            Caller::who_takes_known(stage, way).await?,
            [(); 2].map(|()| Samples::default()),
        ));
    }
    // From here on it is known; a second engine call would be silent, and hang.
    callers[0].0.ask().await?;
    callers[0].0.drain().await?;
    stage.engine.play(Play::endless(Duration::from_hours(1))).await?;
    for round in 0..rounds + rounds / 10 {
        for turn in 0..WAYS.len() {
            // The order changes, so that no case always follows the same one.
            let (caller, [first, whole]) = &mut callers[(round + turn) % WAYS.len()];
            let times = read(caller).await?;
            // The first tenth warms up.
            if round >= rounds / 10 {
                first.push(times.0);
                whole.push(times.1);
            }
        }
    }
    let mut table = Table::new(
        format!("Answers of {TOKENS} tokens that are known, {rounds} rounds, in ms"),
        &["", "first text", "p99", "whole", "p99", "target"],
    );
    for (way, (_, [first, whole])) in WAYS.iter().zip(&callers) {
        let target = match way {
            Way::Mesh => verdict(first.median(), "<", TARGET, " ms to the first text"),
            _ => String::new(),
        };
        let [first, whole] = [first, whole].map(|times| [ms(times.median()), ms(times.p99())]);
        let ([first, first_p99], [whole, whole_p99]) = (first, whole);
        table.row([way.name().to_owned(), first, first_p99, whole, whole_p99, target]);
    }
    Ok(table)
}

/// Until the first text, and until the end.
async fn read(caller: &mut Caller) -> anyhow::Result<(Duration, Duration)> {
    let from = Instant::now();
    caller.ask().await?;
    let mut tokens = caller.tokens().await?.context("an answer without a token")?;
    let first = from.elapsed();
    while let Some(more) = caller.tokens().await? {
        tokens += more;
    }
    ensure!(tokens == TOKENS, "{tokens} tokens came");
    Ok((first, from.elapsed()))
}
