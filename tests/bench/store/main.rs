//! The speed at which analytics and errors ingest events, and of their reports on many events. Calls go
//! through the RPCs, on a SQLite file and on a private PostgreSQL, with callers, mesh and store on one
//! machine.
//!
//! `make bench-store` runs it; `make load` fills a store with it and leaves it there.

mod cpu;
mod events;
mod occurrences;
#[path = "../mesh/report.rs"]
#[expect(dead_code, reason = "the other benchmark has more to report")]
mod report;

use std::fmt::{self, Display, Formatter};
use std::io::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, ensure};
use clap::{Parser, ValueEnum};
use hapa_proto::analytics::v1::analytics_service_client::AnalyticsServiceClient;
use hapa_proto::analytics::v1::{GetPerformanceRequest, GetUsageRequest, RecordEventsRequest};
use hapa_proto::auth::v1::CreateKeyRequest;
use hapa_proto::errors::v1::error_tracking_service_client::ErrorTrackingServiceClient;
use hapa_proto::errors::v1::{
    GetDashboardRequest, GetIncidentRequest, ListIncidentsRequest, ListPatternsRequest,
    ReportOccurrencesRequest,
};
use hapa_test_harness::{Identity, Postgres, Store, TestChannel, TestMesh};
use prost_types::Timestamp;
use tokio::task::JoinSet;
use tonic::Status;

use crate::events::{event, owner};
use crate::occurrences::occurrence;
use crate::report::{Table, ms, verdict};

/// Events of one call.
const BATCH: u64 = 500;
/// Days before now over which the stored events are spread.
const DAYS: u64 = 29;
const MICROS: u64 = 1_000_000;
/// Number of measured calls of each request.
const ASKED: usize = 31;
/// Milliseconds.
const TARGET: f64 = 50.0;

/// Measures the ingestion of events, and reports.
#[derive(Debug, Parser)]
struct Args {
    /// How many events there are before anything else is measured.
    #[arg(long, default_value_t = 1_000_000)]
    events: u64,
    /// How many occurrences.
    #[arg(long, default_value_t = 100_000)]
    occurrences: u64,
    /// Ten million events, and one million occurrences.
    #[arg(long, conflicts_with_all = ["events", "occurrences"])]
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
    /// Passed by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

impl Args {
    /// Events and occurrences.
    fn counts(&self) -> (u64, u64) {
        if self.full { (10_000_000, 1_000_000) } else { (self.events, self.occurrences) }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Engine {
    Sqlite,
    Postgres,
}

type Client = AnalyticsServiceClient<TestChannel>;
type Errors = ErrorTrackingServiceClient<TestChannel>;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let (events, occurrences) = args.counts();
    if let Some(url) = &args.into {
        // The calls of the filling itself create no events.
        let quiet = ["--usage-recording-enabled=false", "--error-monitoring-enabled=false"];
        let url = format!("--database-url={url}");
        let mesh = TestMesh::start_with(&[&url, quiet[0], quiet[1]]).await;
        let usage = Sender::Usage(client(&mesh));
        let rate = fill(&usage, history(events), events, args.writers).await?;
        say(&format!("{events} events of {DAYS} days: {rate}\n"))?;
        let failures = Sender::Failures(errors(&mesh));
        let rate = fill(&failures, history(occurrences), occurrences, args.writers).await?;
        return say(&format!("{occurrences} occurrences: {rate}\n"));
    }
    let engines =
        [(Engine::Sqlite, "SQLite", 10_000.0), (Engine::Postgres, "PostgreSQL", 20_000.0)];
    // Dropping it ends the server.
    let server = Postgres::durable().await;
    for (engine, name, target) in engines {
        if args.only.is_some_and(|only| only != engine) {
            continue;
        }
        let store = match engine {
            Engine::Sqlite => Store::sqlite(),
            Engine::Postgres => Store::Postgres(server.another().await),
        };
        let mesh = TestMesh::start_unrecorded_on(&store, &[]).await;
        let title = format!(
            "{name}: {events} events and {occurrences} occurrences of {DAYS} days, batches of {BATCH}, {} writers",
            args.writers
        );
        let mut table = Table::new(title, &["", "", "target"]);
        ingestion(&mesh, &args, target, &mut table).await?;
        questions(&mesh, &mut table).await?;
        say(&table.to_string())?;
    }
    Ok(())
}

fn say(text: &str) -> anyhow::Result<()> {
    Ok(std::io::stdout().write_all(text.as_bytes())?)
}

async fn ingestion(
    mesh: &TestMesh,
    args: &Args,
    target: f64,
    table: &mut Table,
) -> anyhow::Result<()> {
    let (events, occurrences) = args.counts();
    let rate = fill(&Sender::Usage(client(mesh)), history(events), events, args.writers).await?;
    rate.rows("what happened before, event", Some(target), table);
    let live = (events / 10).clamp(50_000, 200_000);
    let rate = fill(&Sender::Usage(client(mesh)), |_| now(), live, args.writers).await?;
    rate.rows("what happens now, event", Some(target), table);
    let start_time = Some(timestamp(now() - (DAYS + 1) * 86_400 * MICROS));
    let request = GetPerformanceRequest { start_time, ..Default::default() };
    let counted = client(mesh).get_performance(request).await?.into_inner().requests;
    let sent = events.next_multiple_of(BATCH) + live.next_multiple_of(BATCH);
    ensure!(u64::from(counted) == sent, "{counted} events were counted of {sent}");
    let sender = Sender::Failures(errors(mesh));
    let rate = fill(&sender, history(occurrences), occurrences, args.writers).await?;
    rate.rows("failures before, occurrence", None, table);
    let kept = errors(mesh).get_dashboard(GetDashboardRequest {}).await?.into_inner().total_errors;
    let sent = occurrences.next_multiple_of(BATCH);
    ensure!(u64::from(kept) >= sent, "{kept} occurrences were counted of {sent}");
    Ok(())
}

async fn questions(mesh: &TestMesh, table: &mut Table) -> anyhow::Result<()> {
    let usage = client(mesh);
    let hours = [("1 h", 1), ("2 h", 2), ("24 h", 24), ("7 d", 7 * 24), ("30 d", 30 * 24)];
    for (name, hours) in hours {
        let ask = async || {
            let start_time = Some(timestamp((now() / MICROS - hours * 3_600) * MICROS));
            let request = GetPerformanceRequest { start_time, ..Default::default() };
            usage.clone().get_performance(request).await.map(drop)
        };
        measure(table, format!("GetPerformance {name}, median ms"), ask).await?;
    }
    for group_by in ["owner", "key,model"] {
        let request = GetUsageRequest { group_by: group_by.to_owned(), ..Default::default() };
        let ask = async || usage.clone().get_usage(request.clone()).await.map(drop);
        measure(table, format!("GetUsage 30 d by {group_by}, median ms"), ask).await?;
    }
    failures(&errors(mesh), "", table).await?;
    let request = CreateKeyRequest {
        owner: owner(0),
        scopes: vec!["errors:read".to_owned()],
        ..TestMesh::dev_key()
    };
    let key = mesh.create_key(request).await.key_text;
    let own = ErrorTrackingServiceClient::new(mesh.channel_as(Identity::Key(&key)));
    failures(&own, " of an owner", table).await
}

/// The measured requests about failures, from a caller that may see all and from one that may see its own.
async fn failures(errors: &Errors, whose: &str, table: &mut Table) -> anyhow::Result<()> {
    let ask = async || errors.clone().get_dashboard(GetDashboardRequest {}).await.map(drop);
    measure(table, format!("GetDashboard{whose}, median ms"), ask).await?;
    for period in ["1h", "24h", "7d", "30d"] {
        let request = ListPatternsRequest { period: period.to_owned() };
        let ask = async || errors.clone().list_patterns(request.clone()).await.map(drop);
        measure(table, format!("ListPatterns {period}{whose}, median ms"), ask).await?;
    }
    for (name, error_code) in [("", ""), (" of a code", "E4011")] {
        let error_code = error_code.to_owned();
        let request = ListIncidentsRequest { error_code, page_size: 100, ..Default::default() };
        let ask = async || errors.clone().list_incidents(request.clone()).await.map(drop);
        measure(table, format!("ListIncidents{name}{whose}, median ms"), ask).await?;
    }
    let request = ListIncidentsRequest { page_size: 1, ..Default::default() };
    let newest = errors.clone().list_incidents(request).await?.into_inner().incidents;
    let incident_id = newest.into_iter().next().context("no incident")?.incident_id;
    let request = GetIncidentRequest { incident_id };
    let ask = async || errors.clone().get_incident(request.clone()).await.map(drop);
    measure(table, format!("GetIncident{whose}, median ms"), ask).await
}

/// Measures a request repeatedly.
async fn measure(
    table: &mut Table,
    name: String,
    ask: impl AsyncFn() -> Result<(), Status>,
) -> anyhow::Result<()> {
    let mut times = Vec::with_capacity(ASKED);
    for _ in 0..ASKED {
        let begin = Instant::now();
        ask().await.with_context(|| name.clone())?;
        times.push(begin.elapsed());
    }
    times.sort_unstable();
    let median = times.get(times.len() / 2).map_or(0.0, Duration::as_secs_f64) * 1_000.0;
    table.row([name, ms(median), verdict(median, "<", TARGET, " ms")]);
    Ok(())
}

/// The service that receives batches.
#[derive(Clone)]
enum Sender {
    Usage(Client),
    Failures(Errors),
}

impl Sender {
    async fn send(&mut self, batch: Vec<(u64, u64)>) -> Result<(), Status> {
        match self {
            Sender::Usage(client) => {
                let events = batch.into_iter().map(|(number, time)| event(number, time)).collect();
                client.record_events(RecordEventsRequest { events }).await.map(drop)
            }
            Sender::Failures(client) => {
                let occurrences =
                    batch.into_iter().map(|(number, time)| occurrence(number, time)).collect();
                client.report_occurrences(ReportOccurrencesRequest { occurrences }).await.map(drop)
            }
        }
    }
}

/// The rate of ingestion, and its cost.
struct Rate {
    count: u64,
    took: Duration,
    /// Processor time of callers and mesh, and of PostgreSQL.
    used: (Duration, Duration),
}

impl Rate {
    #[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
    fn a_second(&self) -> f64 {
        self.count as f64 / self.took.as_secs_f64()
    }

    /// In microseconds.
    #[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
    fn each(&self) -> (f64, f64) {
        let each = |used: Duration| used.as_secs_f64() * 1e6 / self.count as f64;
        (each(self.used.0), each(self.used.1))
    }

    fn rows(&self, what: &str, target: Option<f64>, table: &mut Table) {
        let rate = self.a_second();
        let met = |target| if rate >= target { "met" } else { "MISSED" };
        let verdict = target.map(|target| format!(">= {target}: {}", met(target)));
        table.row([format!("{what}s/s"), format!("{rate:.0}"), verdict.unwrap_or_default()]);
        let (own, below) = self.each();
        let parts = format!("{own:.0} callers and mesh, {below:.0} PostgreSQL");
        table.row(["  each, us of processor".to_owned(), format!("{:.0}", own + below), parts]);
    }
}

impl Display for Rate {
    fn fmt(&self, out: &mut Formatter<'_>) -> fmt::Result {
        let (own, below) = self.each();
        write!(out, "{:.0} a second, {own:.0} us of processor each here", self.a_second())?;
        write!(out, " and {below:.0} us in PostgreSQL, if it is ours")
    }
}

/// Sends batches until there are so many.
async fn fill(
    sender: &Sender,
    time: impl Fn(u64) -> u64 + Clone + Send + 'static,
    count: u64,
    writers: u64,
) -> anyhow::Result<Rate> {
    let before = cpu::used()?;
    let (begin, next) = (Instant::now(), Arc::new(AtomicU64::new(0)));
    let mut running = JoinSet::new();
    for _ in 0..writers.max(1) {
        let (mut sender, next, time) = (sender.clone(), Arc::clone(&next), time.clone());
        running.spawn(async move {
            loop {
                let first = next.fetch_add(BATCH, Ordering::Relaxed);
                if first >= count {
                    return anyhow::Ok(());
                }
                let batch = (first..first + BATCH).map(|number| (number, time(number)));
                sender.send(batch.collect()).await?;
            }
        });
    }
    while let Some(done) = running.join_next().await {
        done?.context("a batch was not taken")?;
    }
    let (took, after) = (begin.elapsed(), cpu::used()?);
    let used = (after.0.saturating_sub(before.0), after.1.saturating_sub(before.1));
    Ok(Rate { count, took, used })
}

/// In the order of time, evenly.
fn history(events: u64) -> impl Fn(u64) -> u64 + Clone + Send + 'static {
    let (begin, span) = (now() - DAYS * 86_400 * MICROS, DAYS * 86_400 * MICROS);
    let gap = span / events.max(1);
    move |number| begin + number * gap
}

fn client(mesh: &TestMesh) -> Client {
    AnalyticsServiceClient::new(mesh.channel_as(Identity::Mesh))
}

fn errors(mesh: &TestMesh) -> Errors {
    ErrorTrackingServiceClient::new(mesh.channel_as(Identity::Mesh))
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
