//! How fast analytics takes events in, and how fast it answers when it has many: through the RPCs, on
//! a SQLite file and on a private PostgreSQL, with callers, mesh and store on one machine.
//!
//! `make bench-store` runs it; `make load` fills a store with it and leaves it there.

mod events;
#[path = "../mesh/report.rs"]
#[expect(dead_code, reason = "the other benchmark has more to report")]
mod report;

use std::io::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, ensure};
use clap::{Parser, ValueEnum};
use hapa_proto::analytics::v1::analytics_service_client::AnalyticsServiceClient;
use hapa_proto::analytics::v1::{GetPerformanceRequest, GetUsageRequest, RecordEventsRequest};
use hapa_tests::{Store, Who, Wire, World};
use prost_types::Timestamp;
use tokio::task::JoinSet;

use crate::events::event;
use crate::report::{Table, ms, verdict};

/// Events of one call.
const BATCH: u64 = 500;
/// What has happened before: so many days up to now.
const DAYS: u64 = 29;
const MICROS: u64 = 1_000_000;
/// How often each question is asked.
const ASKED: usize = 31;
/// Milliseconds.
const TARGET: f64 = 50.0;

/// Measures taking events in, and reporting.
#[derive(Debug, Parser)]
struct Args {
    /// How many events there are before anything else is measured.
    #[arg(long, default_value_t = 1_000_000)]
    events: u64,
    /// Ten million.
    #[arg(long, conflicts_with = "events")]
    full: bool,
    /// How many send batches at once.
    #[arg(long, default_value_t = 4)]
    writers: u64,
    /// One engine alone.
    #[arg(long, value_enum)]
    only: Option<Engine>,
    /// Fills this store, which is kept, and measures nothing else.
    #[arg(long, value_name = "DATABASE_URL")]
    into: Option<String>,
    /// Said by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Engine {
    Sqlite,
    Postgres,
}

type Client = AnalyticsServiceClient<Wire>;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let events = if args.full { 10_000_000 } else { args.events };
    if let Some(url) = &args.into {
        let world = World::with(&[&format!("--database-url={url}")]).await;
        let rate = fill(&world, history(events), events, args.writers).await?;
        return say(&format!("{events} events of {DAYS} days, {rate:.0} a second\n"));
    }
    let engines =
        [(Engine::Sqlite, "SQLite", 10_000.0), (Engine::Postgres, "PostgreSQL", 20_000.0)];
    for (engine, name, target) in engines {
        if args.only.is_some_and(|only| only != engine) {
            continue;
        }
        let store = match engine {
            Engine::Sqlite => Store::sqlite(),
            Engine::Postgres => Store::Postgres(hapa_tests::Postgres::database().await),
        };
        let world = World::on(&store, &[]).await;
        let title = format!(
            "{name}: {events} events of {DAYS} days, batches of {BATCH}, {} writers",
            args.writers
        );
        let mut table = Table::new(title, &["", "", "target"]);
        ingestion(&world, events, args.writers, target, &mut table).await?;
        questions(&world, &mut table).await?;
        say(&table.to_string())?;
    }
    Ok(())
}

fn say(text: &str) -> anyhow::Result<()> {
    Ok(std::io::stdout().write_all(text.as_bytes())?)
}

async fn ingestion(
    world: &World,
    events: u64,
    writers: u64,
    target: f64,
    table: &mut Table,
) -> anyhow::Result<()> {
    let rate = fill(world, history(events), events, writers).await?;
    table.row(["what happened before, events/s".to_owned(), format!("{rate:.0}"), String::new()]);
    let live = (events / 10).clamp(50_000, 200_000);
    let rate = fill(world, |_| now(), live, writers).await?;
    let met = if rate >= target { "met" } else { "MISSED" };
    let verdict = format!(">= {target}: {met}");
    table.row(["what happens now, events/s".to_owned(), format!("{rate:.0}"), verdict]);
    let start_time = Some(timestamp(now() - (DAYS + 1) * 86_400 * MICROS));
    let request = GetPerformanceRequest { start_time, ..Default::default() };
    let counted = client(world).get_performance(request).await?.into_inner().requests;
    let sent = events.next_multiple_of(BATCH) + live.next_multiple_of(BATCH);
    ensure!(u64::from(counted) == sent, "{counted} events were counted of {sent}");
    Ok(())
}

async fn questions(world: &World, table: &mut Table) -> anyhow::Result<()> {
    let mut client = client(world);
    let hours = [("1 h", 1), ("24 h", 24), ("30 d", 30 * 24)];
    for (name, hours) in hours {
        let mut times = Vec::new();
        for _ in 0..ASKED {
            let end = now() / MICROS;
            let start_time = Some(timestamp((end - hours * 3_600) * MICROS));
            let request = GetPerformanceRequest { start_time, ..Default::default() };
            let begin = Instant::now();
            client.get_performance(request).await?;
            times.push(begin.elapsed());
        }
        add(table, format!("GetPerformance {name}, median ms"), times);
    }
    for group_by in ["owner", "key,model"] {
        let mut times = Vec::new();
        for _ in 0..ASKED {
            let request = GetUsageRequest { group_by: group_by.to_owned(), ..Default::default() };
            let begin = Instant::now();
            client.get_usage(request).await?;
            times.push(begin.elapsed());
        }
        add(table, format!("GetUsage 30 d by {group_by}, median ms"), times);
    }
    Ok(())
}

fn add(table: &mut Table, name: String, mut times: Vec<Duration>) {
    times.sort_unstable();
    let median = times.get(times.len() / 2).map_or(0.0, Duration::as_secs_f64) * 1_000.0;
    table.row([name, ms(median), verdict(median, "<", TARGET, " ms")]);
}

/// Sends batches until there are so many events; how many a second.
async fn fill(
    world: &World,
    time: impl Fn(u64) -> u64 + Clone + Send + 'static,
    events: u64,
    writers: u64,
) -> anyhow::Result<f64> {
    let (begin, next) = (Instant::now(), Arc::new(AtomicU64::new(0)));
    let mut running = JoinSet::new();
    for _ in 0..writers.max(1) {
        let (mut client, next, time) = (client(world), Arc::clone(&next), time.clone());
        running.spawn(async move {
            loop {
                let first = next.fetch_add(BATCH, Ordering::Relaxed);
                if first >= events {
                    return anyhow::Ok(());
                }
                let batch = first..first + BATCH;
                let batch = batch.map(|number| event(number, time(number))).collect();
                client.record_events(RecordEventsRequest { events: batch }).await?;
            }
        });
    }
    while let Some(done) = running.join_next().await {
        done?.context("a batch was not taken")?;
    }
    #[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
    Ok(events as f64 / begin.elapsed().as_secs_f64())
}

/// In the order of time, evenly.
fn history(events: u64) -> impl Fn(u64) -> u64 + Clone + Send + 'static {
    let (begin, span) = (now() - DAYS * 86_400 * MICROS, DAYS * 86_400 * MICROS);
    let gap = span / events.max(1);
    move |number| begin + number * gap
}

fn client(world: &World) -> Client {
    AnalyticsServiceClient::new(world.wire(Who::Mesh))
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    since.as_micros().try_into().unwrap_or(u64::MAX)
}

pub(crate) fn timestamp(micros: u64) -> Timestamp {
    Timestamp {
        seconds: i64::try_from(micros / MICROS).unwrap_or(i64::MAX),
        nanos: i32::try_from(micros % MICROS * 1_000).unwrap_or_default(),
    }
}
