//! The delay of the first token in comparison with the engine itself. It makes one call at a time on each path
//! in turn, so that a slower machine affects all paths.

use std::time::{Duration, Instant};

use anyhow::Context as _;

use crate::caller::{Caller, Way};
use crate::engine::Play;
use crate::report::{Table, ms, times, verdict};
use crate::samples::Samples;
use crate::stage::Stage;

/// The engine first, then Envoy: they are what the others are compared with.
const WAYS: [Way; 5] = [Way::Direct, Way::PlainEnvoy, Way::Mesh, Way::Gateway, Way::GatewayJson];
const TOKENS: usize = 8;
const MESH_TARGET: f64 = 0.5;
const GATEWAY_TARGET: f64 = 1.0;

pub(crate) async fn measure(stage: &mut Stage, rounds: usize) -> anyhow::Result<Table> {
    let play = Play { tokens: TOKENS, gap: Duration::ZERO, silence: None };
    stage.engine.play(play).await?;
    let mut callers = Vec::new();
    for way in WAYS {
        callers.push((Caller::one(stage, way).await?, Samples::default()));
    }
    for round in 0..rounds + rounds / 10 {
        for turn in 0..WAYS.len() {
            // The order changes, so that no path always follows the same one.
            let (caller, samples) = &mut callers[(round + turn) % WAYS.len()];
            let time = first_token(caller).await?;
            // The first tenth warms up.
            if round >= rounds / 10 {
                samples.push(time);
            }
        }
    }
    let samples: Vec<_> = callers.into_iter().map(|(_, samples)| samples).collect();
    Ok(table(&samples, rounds))
}

async fn first_token(caller: &mut Caller) -> anyhow::Result<Duration> {
    let from = Instant::now();
    caller.ask().await?;
    caller.tokens().await?.context("an answer without a token")?;
    let time = from.elapsed();
    caller.drain().await?;
    Ok(time)
}

fn table(samples: &[Samples], rounds: usize) -> Table {
    let mut table = Table::new(
        format!("First token, one call at a time, {rounds} rounds, in ms"),
        &["", "median", "p99", "added median", "to Envoy's", "added p99", "target"],
    );
    let direct = &samples[0];
    let envoy = samples[1].beyond(direct).median();
    for (way, samples) in WAYS.iter().zip(samples) {
        let added = samples.beyond(direct).median();
        let target = match way {
            Way::Mesh => verdict(added, "<", MESH_TARGET, " ms added"),
            Way::Gateway | Way::GatewayJson => verdict(added, "<", GATEWAY_TARGET, " ms added"),
            Way::Direct | Way::PlainEnvoy | Way::MeshToken => String::new(),
        };
        let (added, to_envoy, added_p99) = match way {
            Way::Direct => (String::new(), String::new(), String::new()),
            _ => (ms(added), times(added / envoy), ms(samples.p99() - direct.p99())),
        };
        let (name, median) = (way.name().to_owned(), ms(samples.median()));
        table.row([name, median, ms(samples.p99()), added, to_envoy, added_p99, target]);
    }
    table
}
