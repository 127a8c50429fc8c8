//! Usage and performance analytics: stores an event per call and aggregates it on arrival. An event
//! and its share of every aggregate are written in one transaction, so that repeated events are
//! counted once.

mod error;
mod event;
mod latency_histogram;
mod performance;
mod rollup;
mod rollup_period;
mod service;
mod store;
mod usage;

use hapa_core::access::{Access, Rpc};
use hapa_core::service::{ServiceSpec, Shutdown};
use hapa_proto::analytics::v1::analytics_service_server::AnalyticsServiceServer;
use hapa_store::database::{DatabaseStatus, Db, Durability};
use hapa_store::open::{OpenStore, StoreSpec};

use crate::service::AnalyticsHandler;
use crate::store::Store;

/// Settings of the analytics service.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "AnalyticsHandler")]
#[group(id = "analytics")]
pub struct Config {
    /// Retention of usage events, in days. Aggregates by day are kept forever. Older events are not
    /// counted on arrival.
    #[arg(long, env = "EVENT_RETENTION_DAYS", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=3650))]
    pub event_retention_days: u32,
}

const READ: &str = "analytics:read";

/// The gRPC services that depend on the store.
pub const SERVICES: &[&str] = &["hapa.analytics.v1.AnalyticsService"];

const RPCS: &[Rpc] = &[
    Rpc::new("/hapa.analytics.v1.AnalyticsService/RecordEvents", Access::Service),
    Rpc::new("/hapa.analytics.v1.AnalyticsService/GetPerformance", Access::Scope(READ))
        .allowed_roles(&["errors"]),
    Rpc::new("/hapa.analytics.v1.AnalyticsService/GetUsage", Access::Scope(READ)),
    Rpc::new("/hapa.analytics.v1.AnalyticsService/WatchPerformance", Access::Scope(READ)),
];

/// The store of the service.
pub const STORE: &StoreSpec = &StoreSpec {
    service: "analytics",
    steps: store::MIGRATIONS,
    durability: Durability::Process,
    may_be_set_aside: true,
};

/// Applies the schema migrations to the store at `url`.
pub async fn migrate(url: &str) -> anyhow::Result<()> {
    open(url).await.map(drop)
}

/// Reports the schema version of the store at `url` without changing it.
pub async fn survey(url: &str) -> anyhow::Result<Option<DatabaseStatus>> {
    Db::inspect("analytics", url, store::MIGRATIONS).await
}

async fn open(url: &str) -> anyhow::Result<Db> {
    Db::open_with("analytics", url, store::MIGRATIONS, Durability::Process).await
}

/// What the service needs of its process.
#[derive(Debug)]
pub struct Dependencies {
    /// The store, opened by [`STORE`].
    pub store: OpenStore,
    /// The shutdown of the server.
    pub shutdown: Shutdown,
}

/// Builds the gRPC service, its health checks and its background task.
pub fn service(config: &Config, dependencies: Dependencies) -> ServiceSpec {
    let Dependencies { store: OpenStore { db, checks }, shutdown } = dependencies;
    let mut spec = ServiceSpec { checks, ..ServiceSpec::default() };
    let store = Store::new(db, config.event_retention_days);
    spec.spawn(store::run_purge(store.clone()));
    let analytics = AnalyticsHandler { store, shutdown: shutdown.stop_accepting };
    spec.add(AnalyticsServiceServer::new(analytics), RPCS);
    spec
}
