//! The time for which the engine continues after a client has disconnected. It is measured from the drop of
//! the stream to the detection by the engine, during tokens and during silence.

use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use tokio::time::sleep;

use crate::caller::{Caller, Way};
use crate::engine::{MAX_TOKENS, Play, Silence};
use crate::report::{Table, ms, verdict};
use crate::samples::Samples;
use crate::stage::Stage;

const WAYS: [Way; 4] = [Way::Direct, Way::Mesh, Way::Gateway, Way::GatewayJson];
const TARGET: f64 = 5.0;
/// Between two tokens where they flow.
const TOKEN_INTERVAL: Duration = Duration::from_millis(2);
/// Delay before the drop, so that all tasks are idle: the worst case.
const SILENCE_DELAY: Duration = Duration::from_millis(3);
/// Tokens that are awaited before the client leaves.
const AWAITED: usize = 3;

#[derive(Clone, Copy, Debug)]
struct Moment {
    name: &'static str,
    silence: Option<Silence>,
}

const MOMENTS: [Moment; 3] = [
    Moment { name: "while tokens flow", silence: None },
    Moment { name: "before the first token", silence: Some(Silence::BeforeTheFirst) },
    Moment { name: "silent in the middle", silence: Some(Silence::After(AWAITED)) },
];

pub(crate) async fn measure(stage: &mut Stage, times: usize) -> anyhow::Result<Table> {
    let title = format!("From the client's leaving to the engine's abort, {times} times, in ms");
    let mut table = Table::new(title, &["", "median", "p99", "longest", "target"]);
    for moment in MOMENTS {
        let play = Play { tokens: MAX_TOKENS, gap: TOKEN_INTERVAL, silence: moment.silence };
        stage.engine.play(play).await?;
        let mut callers = Vec::new();
        for way in WAYS {
            callers.push((way, Caller::one(stage, way).await?, Samples::default()));
        }
        for _ in 0..times {
            for (_, caller, samples) in &mut callers {
                samples.push(leave(stage, caller, moment).await?);
            }
        }
        for (way, _, samples) in callers {
            let p99 = samples.p99();
            let target = match way {
                Way::Direct => String::new(),
                _ => verdict(p99, "<", TARGET, " ms"),
            };
            let longest = ms(samples.percentile(100));
            let name = format!("{}, {}", way.name(), moment.name);
            table.row([name, ms(samples.median()), ms(p99), longest, target]);
        }
    }
    Ok(table)
}

async fn leave(stage: &mut Stage, caller: &Caller, moment: Moment) -> anyhow::Result<Duration> {
    let aborted = stage.engine.aborted().await?;
    let mut caller = caller.another().await?;
    caller.ask().await?;
    let mut tokens = 0;
    while tokens < AWAITED && !matches!(moment.silence, Some(Silence::BeforeTheFirst)) {
        tokens += usize::try_from(caller.tokens().await?.context("it ended")?)?;
    }
    sleep(SILENCE_DELAY).await;
    let left = SystemTime::now();
    drop(caller);
    let noticed = stage.engine.noticed(aborted + 1).await?;
    // A detection that the engine's clock puts before the drop counts as zero.
    Ok(noticed.duration_since(left).unwrap_or_default())
}
