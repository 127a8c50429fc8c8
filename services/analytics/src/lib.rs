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

use hapa_chassis::db::{Db, Durability, Survey};
use hapa_chassis::health::Check;
use hapa_chassis::{Access, Rpc, Server, StoreSpec};
use hapa_proto::analytics::v1::analytics_service_server::AnalyticsServiceServer;

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
const SERVICES: &[&str] = &["hapa.analytics.v1.AnalyticsService"];

const RPCS: &[Rpc] = &[
    Rpc::new("/hapa.analytics.v1.AnalyticsService/RecordEvents", Access::Mesh),
    Rpc::new("/hapa.analytics.v1.AnalyticsService/GetPerformance", Access::Scope(READ))
        .by(&["errors"]),
    Rpc::new("/hapa.analytics.v1.AnalyticsService/GetUsage", Access::Scope(READ)),
    Rpc::new("/hapa.analytics.v1.AnalyticsService/WatchPerformance", Access::Scope(READ)),
];

const STORE: &StoreSpec = &StoreSpec {
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

/// Opens the store and adds the service.
pub async fn mount(config: &Config, server: &mut Server) -> anyhow::Result<()> {
    let db = server.open_store(STORE).await?;
    server.check(Check::store("analytics", &db, SERVICES));
    server.check(Check::store_write("analytics", &db));
    let store = Store::new(db, config.event_retention_days);
    server.spawn(store::purge(store.clone()));
    let analytics = Analytics { store, closing: server.closing() };
    server.add(AnalyticsServiceServer::new(analytics), RPCS).await;
    Ok(())
}
