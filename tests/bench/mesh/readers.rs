//! The effect of stalled readers on a reader of the same connection. Sections with and without them alternate,
//! so that other load of the machine affects both.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use tokio::time::sleep;

use crate::caller::{Caller, Way};
use crate::engine::Play;
use crate::report::{Table, ms, times, verdict};
use crate::samples::Samples;
use crate::stage::Stage;

const WAYS: [Way; 2] = [Way::Mesh, Way::Gateway];
const STALLED: usize = 50;
/// About 2.4 KB of text.
const TOKENS: u32 = 200;
const TARGET: f64 = 1.5;
/// For windows to fill up: an endless answer is three times as long as a client's.
const SETTLE_PERIOD: Duration = Duration::from_millis(700);

pub(crate) async fn measure(
    stage: &mut Stage,
    sections: usize,
    rounds: usize,
) -> anyhow::Result<Table> {
    let mut seen = WAYS.map(|_| [(); 2].map(|()| Samples::default()));
    for _ in 0..sections {
        for (way, [alone, beside]) in WAYS.into_iter().zip(&mut seen) {
            read(stage, way, 0, (rounds / sections, alone)).await?;
            read(stage, way, STALLED, (rounds / sections, beside)).await?;
        }
    }
    let title = format!(
        "Answers of {TOKENS} tokens beside {STALLED} who stopped reading, {rounds} rounds, in ms"
    );
    let head = ["", "alone", "p99", "beside them", "p99", "p99 to p99", "target"];
    let mut table = Table::new(title, &head);
    for (way, [alone, beside]) in WAYS.iter().zip(&seen) {
        let ratio = beside.p99() / alone.p99();
        table.row([
            way.name().to_owned(),
            ms(alone.median()),
            ms(alone.p99()),
            ms(beside.median()),
            ms(beside.p99()),
            times(ratio),
            verdict(ratio, "<=", TARGET, "x"),
        ]);
    }
    Ok(table)
}

/// Whole answers, one after the other, on one connection with the stalled readers.
async fn read(
    stage: &mut Stage,
    way: Way,
    stalled: usize,
    (rounds, times): (usize, &mut Samples),
) -> anyhow::Result<()> {
    let mut callers = Caller::many(stage, way, 1 + stalled).await?;
    let mut reader = callers.pop().context("no caller")?;
    stage.engine.play(Play::endless(Duration::ZERO)).await?;
    for stalled in &mut callers {
        stalled.ask().await?;
        stalled.tokens().await?.context("an answer without a token")?;
    }
    sleep(SETTLE_PERIOD).await;
    stage.engine.play(Play { tokens: TOKENS as usize, gap: Duration::ZERO, silence: None }).await?;
    for round in 0..rounds + rounds / 10 {
        let (from, mut tokens) = (Instant::now(), 0);
        reader.ask().await?;
        while let Some(more) = reader.tokens().await? {
            tokens += more;
        }
        ensure!(tokens == TOKENS, "{tokens} tokens came");
        // The first tenth warms up.
        if round >= rounds / 10 {
            times.push(from.elapsed());
        }
    }
    for stalled in &mut callers {
        stalled.tokens().await?.context("who stood still lost its answer")?;
    }
    drop((callers, reader));
    stage.engine.idle().await
}
