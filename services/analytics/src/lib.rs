//! How much is used, and how well it goes: events of every call, summed up as they come. An event
//! and what it adds to every sum are one transaction, so sums are exact whoever sends an event twice.

mod error;
mod event;
mod performance;
mod rollup;
mod service;
mod sketch;
mod store;
mod times;
mod usage;

use hapa_core::access::{Access, Rpc};
use hapa_core::service::{ServiceSpec, Shutdown};
use hapa_proto::analytics::v1::analytics_service_server::AnalyticsServiceServer;
use hapa_store::database::{Db, Durability, Survey};
use hapa_store::open::{OpenStore, StoreSpec};

use crate::service::Analytics;
use crate::store::Store;

/// Settings of this service.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Analytics")]
#[group(id = "analytics")]
pub struct Config {
    /// How long single events are kept, in days; what was summed up of them stays.
    #[arg(long, env = "EVENT_RETENTION_DAYS", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=3650))]
    pub event_retention_days: u32,
}

const READ: &str = "analytics:read";

/// What can't work without the store.
pub const SERVICES: &[&str] = &["hapa.analytics.v1.AnalyticsService"];

const RPCS: &[Rpc] = &[
    Rpc::new("/hapa.analytics.v1.AnalyticsService/RecordEvents", Access::Mesh),
    Rpc::new("/hapa.analytics.v1.AnalyticsService/GetPerformance", Access::Scope(READ))
        .by(&["errors"]),
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

/// Migrates the store at `url`, and does no more.
pub async fn migrate(url: &str) -> anyhow::Result<()> {
    open(url).await.map(drop)
}

/// Looks at the store at `url`, and changes nothing.
pub async fn survey(url: &str) -> anyhow::Result<Option<Survey>> {
    Db::survey("analytics", url, store::MIGRATIONS).await
}

async fn open(url: &str) -> anyhow::Result<Db> {
    Db::open_with("analytics", url, store::MIGRATIONS, Durability::Process).await
}

/// What the service needs of its process.
#[derive(Debug)]
pub struct Dependencies {
    /// Its store, opened by [`STORE`].
    pub store: OpenStore,
    /// The shutdown of the server.
    pub shutdown: Shutdown,
}

/// The service.
pub fn service(config: &Config, dependencies: Dependencies) -> ServiceSpec {
    let Dependencies { store: OpenStore { db, checks }, shutdown } = dependencies;
    let mut spec = ServiceSpec { checks, ..ServiceSpec::default() };
    let store = Store::new(db, config.event_retention_days);
    spec.spawn(store::purge(store.clone()));
    let analytics = Analytics { store, closing: shutdown.stop_accepting };
    spec.add(AnalyticsServiceServer::new(analytics), RPCS);
    spec
}
