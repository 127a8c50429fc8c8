//! The effect of hostile clients without a credential on a caller with a valid key. Sections with and without
//! them alternate, so that other load of the machine affects both.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::ensure;
use hapa_test_harness::hostile_client::HostileClient;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::caller::{Caller, Way};
use crate::engine::Play;
use crate::report::{Table, ms, times, verdict};
use crate::samples::Samples;
use crate::stage::Stage;

const WAYS: [Way; 2] = [Way::Mesh, Way::Gateway];
const STRANGERS: usize = 2;
/// Hostile clients use an address of their own, as the caller does.
const STRANGERS_ADDRESS: u8 = 2;
/// Calls that are cancelled in one packet.
const BURST: usize = 60;
const TOKENS: u32 = 20;
const TARGET: f64 = 3.0;
/// Pause between two packets, so that hostile clients do not use up the measured processors.
const PAUSE_PERIOD: Duration = Duration::from_millis(5);
/// Duration of a connection that the server does not end.
const CONNECTION_PERIOD: Duration = Duration::from_secs(1);

pub(crate) async fn measure(
    stage: &mut Stage,
    sections: usize,
    rounds: usize,
) -> anyhow::Result<Table> {
    let mut seen = WAYS.map(|_| [(); 2].map(|()| Samples::default()));
    for _ in 0..sections {
        for (way, [alone, beside]) in WAYS.into_iter().zip(&mut seen) {
            read(stage, way, (rounds / sections, alone)).await?;
            let door = if way == Way::Gateway { &stage.gateway } else { &stage.hapa };
            let _strangers = strangers(door.address());
            read(stage, way, (rounds / sections, beside)).await?;
        }
    }
    let title = format!(
        "Answers of {TOKENS} tokens beside {STRANGERS} strangers who cancel calls without end, {rounds} rounds, in ms"
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

/// Clients that open connections and cancel calls in the packet that begins them, until they are dropped.
fn strangers(to: SocketAddr) -> JoinSet<()> {
    let mut strangers = JoinSet::new();
    for _ in 0..STRANGERS {
        strangers.spawn(async move {
            loop {
                // The outcome for the hostile client is not checked: a refusal, a disconnect or no reply.
                let _ = timeout(CONNECTION_PERIOD, cancel(to)).await;
            }
        });
    }
    strangers
}

async fn cancel(to: SocketAddr) -> std::io::Result<()> {
    let mut hostile = HostileClient::connect(STRANGERS_ADDRESS, to).await?;
    loop {
        for _ in 0..BURST {
            let call = hostile.call("/hapa.codegen.v1.CodegenService/ListModels");
            hostile.reset(call);
        }
        hostile.flush().await?;
        sleep(PAUSE_PERIOD).await;
    }
}

/// Whole answers, one after the other.
async fn read(
    stage: &mut Stage,
    way: Way,
    (rounds, times): (usize, &mut Samples),
) -> anyhow::Result<()> {
    let mut caller = Caller::one(stage, way).await?;
    stage.engine.play(Play { tokens: TOKENS as usize, gap: Duration::ZERO, silence: None }).await?;
    for round in 0..rounds + rounds / 10 {
        let (from, mut tokens) = (Instant::now(), 0);
        caller.ask().await?;
        while let Some(more) = caller.tokens().await? {
            tokens += more;
        }
        ensure!(tokens == TOKENS, "{tokens} tokens came");
        // The first tenth warms up.
        if round >= rounds / 10 {
            times.push(from.elapsed());
        }
    }
    drop(caller);
    stage.engine.idle().await
}
