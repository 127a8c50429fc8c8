//! The processor time of admission in a streamed answer. Answers to a key pass all of it; the same answers to
//! the mesh token pass by credential, scope and limit.
//!
//! The tokens of a key are also accounted at the end of an answer, which is not part of admission. Answers are
//! therefore measured twice: up to their last token, where the engine stops without an end, and up to their
//! end. Many short sections alternate, because the difference is small.

use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::caller::{Caller, Way};
use crate::engine::Play;
use crate::gauge::{self, ratio};
use crate::report::{Table, verdict};
use crate::stage::Stage;

/// Tokens of an answer: a page of code.
pub(crate) const ANSWER: usize = 200;
const TARGET: f64 = 5.0;
/// Delay for the remaining work of the previous section, and of this one.
const SETTLE_PERIOD: Duration = Duration::from_millis(100);
/// With a key and without: up to the last token, and to the end.
const KINDS: [Kind; 4] = [
    Kind { name: "to the last token, with a key", way: Way::Mesh, ends: false },
    Kind { name: "to the last token, with the mesh's token", way: Way::MeshToken, ends: false },
    Kind { name: "ended and accounted, with a key", way: Way::Mesh, ends: true },
    Kind { name: "ended, with the mesh's token", way: Way::MeshToken, ends: true },
];

/// A whole answer, and all that follows from it.
pub(crate) const FOLLOWED: Kind = KINDS[2];

#[derive(Clone, Copy, Debug)]
pub(crate) struct Kind {
    name: &'static str,
    way: Way,
    ends: bool,
}

/// Answers of a section.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Load {
    pub(crate) streams: usize,
    /// One after the other, on each stream.
    answers: usize,
    pub(crate) gap: Duration,
}

impl Load {
    /// Answers of a section.
    pub(crate) fn all(self) -> usize {
        self.streams * self.answers
    }
}

pub(crate) const LOADS: [Load; 2] = [
    Load { streams: 20, answers: 1, gap: Duration::from_millis(4) },
    Load { streams: 4, answers: 25, gap: Duration::ZERO },
];

pub(crate) async fn measure(
    stage: &mut Stage,
    load: Load,
    sections: usize,
) -> anyhow::Result<Table> {
    let mut costs = KINDS.map(|_| Vec::new());
    for section in 0..sections {
        for turn in 0..KINDS.len() {
            let at = (section + turn) % KINDS.len();
            costs[at].push(answer(stage, load, KINDS[at]).await?);
        }
    }
    Ok(table(load, &costs))
}

/// Processor time of an answer, in microseconds.
pub(crate) async fn answer(stage: &mut Stage, load: Load, kind: Kind) -> anyhow::Result<f64> {
    let silence = (!kind.ends).then_some(ANSWER);
    let tokens = if kind.ends { ANSWER } else { ANSWER + 1 };
    stage.engine.play(Play { tokens, gap: load.gap, silence }).await?;
    let mut callers = Caller::many(stage, kind.way, load.all()).await?;
    sleep(SETTLE_PERIOD).await;

    let (mut tasks, hapa) = (JoinSet::new(), stage.hapa.pid()?);
    let before = gauge::cpu(hapa)?;
    while !callers.is_empty() {
        tasks
            .spawn(one_after_the_other(callers.split_off(callers.len() - load.answers), kind.ends));
    }
    let mut open = Vec::new();
    while let Some(callers) = tasks.join_next().await {
        open.push(callers??);
    }
    sleep(SETTLE_PERIOD).await;
    let cpu = gauge::cpu(hapa)?.saturating_sub(before);

    drop(open);
    stage.engine.idle().await?;
    Ok(cpu.as_secs_f64() * 1e6 / ratio(load.all() as u64, 1))
}

/// Returns the callers. Their answers continue until they are dropped.
async fn one_after_the_other(mut callers: Vec<Caller>, ends: bool) -> anyhow::Result<Vec<Caller>> {
    for caller in &mut callers {
        caller.ask().await?;
        let mut tokens = 0;
        while tokens < ANSWER
            && let Some(more) = caller.tokens().await?
        {
            tokens += more as usize;
        }
        if ends {
            caller.drain().await?;
        }
    }
    Ok(callers)
}

pub(crate) fn pace(gap: Duration) -> String {
    if gap == Duration::ZERO {
        "as fast as they go".to_owned()
    } else {
        format!("a token every {gap:?}")
    }
}

fn table(load: Load, costs: &[Vec<f64>; 4]) -> Table {
    let Load { streams, gap, .. } = load;
    let title = format!(
        "Processor time of an answer of {ANSWER} tokens, {streams} streams, {}, median of {} sections",
        pace(gap),
        costs[0].len(),
    );
    let head = ["", "us an answer", "share of the key", "give or take", "target"];
    let mut table = Table::new(title, &head);
    for (at, Kind { name, way, ends }) in KINDS.into_iter().enumerate() {
        let mut cells = [const { String::new() }; 3];
        if way == Way::Mesh {
            let pairs = costs[at].iter().zip(&costs[at + 1]);
            let shares: Vec<_> = pairs.map(|(key, token)| (1.0 - token / key) * 100.0).collect();
            // Consecutive sections are compared, because other load of the machine is similar in both.
            let [low, share, high] = [1, 2, 3].map(|n| quarter(&shares, n));
            let error = (high - low) / ratio(shares.len() as u64, 1).sqrt();
            let target = match (share - TARGET).abs() {
                _ if ends => String::new(),
                distance if distance < error => format!("< {TARGET}%: too uneven to say"),
                _ => verdict(share, "<", TARGET, "%"),
            };
            cells = [format!("{share:.1}%"), format!("{error:.1}%"), target];
        }
        let [share, error, target] = cells;
        table.row([
            name.to_owned(),
            format!("{:.0}", quarter(&costs[at], 2)),
            share,
            error,
            target,
        ]);
    }
    table
}

/// The `n`-th quartile of the values.
pub(crate) fn quarter(values: &[f64], n: usize) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    sorted.get(sorted.len() * n / 4).copied().unwrap_or(f64::NAN)
}
