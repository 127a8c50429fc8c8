//! Error tracking: stores every failure that a user was shown and groups failures with one cause
//! into incidents.

mod call_counter;
mod dashboard;
mod error;
mod fingerprint;
mod gateway_report;
mod incident;
mod occurrence;
mod occurrence_feed;
mod pattern;
mod retention;
mod service;
mod store;
mod validation;
mod version;
mod visibility;

use clap::ArgAction;
use hapa_chassis::db::{Db, Durability, Survey};
use hapa_chassis::health::Check;
use hapa_chassis::tail::Tail;
use hapa_chassis::{Access, Rpc, Server, StoreSpec, rpc};
use hapa_proto::errors::v1::error_tracking_service_server::ErrorTrackingServiceServer;
use hapa_proto::errors::v1::gateway_report_service_server::GatewayReportServiceServer;

use crate::call_counter::CallCounter;
use crate::gateway_report::GatewayReports;
use crate::occurrence_feed::OccurrenceFeed;
use crate::service::ErrorTracker;
use crate::store::Store;

/// Settings of the errors service.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Errors")]
#[group(id = "errors")]
pub struct Config {
    /// Retention of error occurrences, in days. Hourly and daily counts and incidents are kept
    /// twice as long.
    #[arg(long, env = "ERROR_RETENTION_DAYS", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=3650))]
    pub error_retention_days: u32,
    /// Whether the service creates and reopens incidents. `false`: it only stores and counts
    /// occurrences.
    #[arg(long, env = "INCIDENT_TRACKING_ENABLED", action = ArgAction::Set, default_value_t = true)]
    pub incident_tracking_enabled: bool,
}

/// `errors:read` sees its owner's failures, `errors:admin` sees all.
const READ: Access = Access::AnyScope(&[visibility::READ_SCOPE, visibility::ADMIN_SCOPE]);

/// The gRPC services that depend on the store.
const SERVICES: &[&str] = &["hapa.errors.v1.ErrorTrackingService"];

const RPCS: &[Rpc] = &[
    Rpc::new(
        "/hapa.errors.v1.ErrorTrackingService/ReportOccurrences",
        Access::Scope("errors:write"),
    )
    .by(rpc::SERVICES),
    Rpc::new("/hapa.errors.v1.ErrorTrackingService/GetDashboard", READ)
        .limited(100, 60)
        .by(rpc::SERVICES),
    Rpc::new("/hapa.errors.v1.ErrorTrackingService/ListPatterns", READ),
    Rpc::new("/hapa.errors.v1.ErrorTrackingService/ListIncidents", READ),
    Rpc::new("/hapa.errors.v1.ErrorTrackingService/GetIncident", READ),
    Rpc::new(
        "/hapa.errors.v1.ErrorTrackingService/UpdateIncident",
        Access::Scope(visibility::ADMIN_SCOPE),
    ),
    Rpc::new("/hapa.errors.v1.ErrorTrackingService/ListErrorCodes", Access::Caller),
    Rpc::new("/hapa.errors.v1.ErrorTrackingService/WatchOccurrences", READ),
];

const STORE: &StoreSpec = &StoreSpec {
    service: "errors",
    steps: store::MIGRATIONS,
    durability: Durability::PowerCut,
    may_be_set_aside: true,
};
const GATEWAY_RPCS: &[Rpc] =
    &[Rpc::new("/hapa.errors.v1.GatewayReportService/ReportRefusals", Access::Mesh)
        .by(&[rpc::GATEWAY])];

/// Applies the schema migrations to the store at `url`.
pub async fn migrate(url: &str) -> anyhow::Result<()> {
    open(url).await.map(drop)
}

/// Reports the schema version of the store at `url` without changing it.
pub async fn survey(url: &str) -> anyhow::Result<Option<Survey>> {
    Db::survey("errors", url, store::MIGRATIONS).await
}

async fn open(url: &str) -> anyhow::Result<Db> {
    Db::open("errors", url, store::MIGRATIONS).await
}

/// Opens the store and registers the gRPC services and background tasks.
pub async fn mount(config: &Config, server: &mut Server) -> anyhow::Result<()> {
    const ANALYTICS: &str = "hapa.analytics.v1.AnalyticsService";
    let db = server.open_store(STORE).await?;
    server.check(Check::store("errors", &db, SERVICES));
    server.check(Check::store_write("errors", &db));
    let store = Store::new(db);
    let (tail, looking) = Tail::of(store.clone(), server.closing());
    server.spawn(looking);
    server.spawn(retention::run_purge(store.clone(), config.error_retention_days));
    let address = server.config().analytics_address.as_deref();
    let analytics = server.wire("ANALYTICS_ADDRESS", address, ANALYTICS)?;
    let reports = GatewayReports { spool: server.spool() };
    let tracker = ErrorTracker {
        feed: OccurrenceFeed { store: store.clone(), tail },
        call_counter: CallCounter::new(analytics),
        incident_tracking_enabled: config.incident_tracking_enabled,
        store,
    };
    server.add(ErrorTrackingServiceServer::new(tracker), RPCS).await;
    server.add_aside(GatewayReportServiceServer::new(reports), GATEWAY_RPCS).await;
    Ok(())
}
