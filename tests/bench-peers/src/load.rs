//! The load generator: a number of clients, each with one stream or call at a time. An answer counts only with
//! exactly the expected text and the end marker of its protocol.

mod client;
mod connection;
mod decode;
mod record;
mod watch;

use std::io::{Read as _, Write as _};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use anyhow::Context as _;
use tokio::sync::Barrier;
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::load::client::{Client, Clients};
use crate::load::record::Record;
use crate::load::watch::Watch;
use crate::process::now;
use crate::spec::{AbortReport, LoadReport, LoadSpec};
use crate::upstream::UpstreamState;

/// Maximum time until all streams are open.
const OPEN_TIMEOUT: Duration = Duration::from_mins(1);
/// Time between the opening of the last stream and the measurement.
const SETTLE_PERIOD: Duration = Duration::from_secs(1);
/// An abort that takes longer is missed.
const ABORT_TIMEOUT: Duration = Duration::from_secs(1);

/// Reads a specification from standard input, and writes the report to standard output.
pub(crate) async fn run() -> anyhow::Result<()> {
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text)?;
    let report = measure(serde_json::from_str(&text)?).await?;
    Ok(std::io::stdout().write_all(serde_json::to_string(&report)?.as_bytes())?)
}

async fn measure(spec: LoadSpec) -> anyhow::Result<LoadReport> {
    let clients = Arc::new(Clients::new(spec)?);
    let barrier = Arc::new(Barrier::new(clients.spec.shape.concurrency + 1));
    let mut tasks = JoinSet::new();
    for client in clients.connect().await? {
        tasks.spawn(client_task(client, Arc::clone(&barrier)));
    }
    barrier.wait().await; // The warm-up is over.
    let watch = Watch::start(&clients.spec);
    clients.begin();
    barrier.wait().await;
    if let Some(hold) = clients.spec.shape.hold {
        return held(&clients, tasks, watch, hold).await;
    }
    let mut record = Record::default();
    while let Some(ended) = tasks.join_next().await {
        record.merge(ended?);
    }
    let readings = watch.stop();
    let mut report = record.report(&readings);
    if clients.spec.shape.leave.is_some() {
        sleep(ABORT_TIMEOUT).await;
        report.aborts = Some(aborts(&clients.spec, &record).await?);
    }
    Ok(report)
}

/// Runs the warm-up of a client, and then its measured streams.
async fn client_task(mut client: Client, barrier: Arc<Barrier>) -> Record {
    let mut record = Record::default();
    while client.clients.begin_warm_up() {
        client.stream(&mut record).await;
    }
    barrier.wait().await;
    barrier.wait().await;
    let mut record = Record::default();
    sleep(client.start_delay).await;
    while client.clients.begin_measured() {
        client.stream(&mut record).await;
    }
    record
}

/// Measures the tokens of a period in which all streams are open.
async fn held(
    clients: &Clients,
    mut tasks: JoinSet<Record>,
    watch: Watch,
    hold: Duration,
) -> anyhow::Result<LoadReport> {
    let expected = u64::try_from(clients.spec.shape.concurrency)?;
    let from = now();
    while clients.begun.load(Relaxed) < expected {
        let elapsed = Duration::from_nanos(now() - from);
        anyhow::ensure!(
            elapsed < OPEN_TIMEOUT,
            "{} of {expected} streams began",
            clients.begun.load(Relaxed)
        );
        sleep(Duration::from_millis(20)).await;
    }
    sleep(SETTLE_PERIOD).await;
    watch.stop();
    let (watch, tokens) = (Watch::start(&clients.spec), clients.tokens());
    sleep(hold).await;
    let (readings, tokens) = (watch.stop(), clients.tokens() - tokens);
    let ended = tasks.try_join_next().is_some();
    tasks.shutdown().await;
    anyhow::ensure!(!ended, "a stream ended early");
    Ok(LoadReport { tokens, left: expected, ..Record::default().report(&readings) })
}

/// Matches the drops with the aborts of the simulator.
async fn aborts(spec: &LoadSpec, record: &Record) -> anyhow::Result<AbortReport> {
    let state = connection::get(spec.upstream_port, "/state").await?;
    let state: UpstreamState = serde_json::from_slice(&state).context("the simulator's state")?;
    let aborts: std::collections::HashMap<_, _> = state.aborts.into_iter().collect();
    let pairs =
        record.drops.iter().filter_map(|(id, at)| Some(aborts.get(id)?.saturating_sub(*at)));
    let times: Vec<u64> = pairs.collect();
    let missed = u64::try_from(record.drops.len() - times.len())?;
    Ok(AbortReport { time: record::quantiles(times), missed })
}
