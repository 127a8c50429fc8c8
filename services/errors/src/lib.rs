//! What went wrong: every failure that a user was shown, grouped into incidents by their cause.

mod calls;
mod check;
mod dashboard;
mod error;
mod fingerprint;
mod gateway;
mod incident;
mod occurrence;
mod pattern;
mod retention;
mod service;
mod store;
mod version;
mod view;
mod watch;

pub use crate::gateway::OccurrenceRecorder;
use clap::ArgAction;
use hapa_core::access::{self, Access, Rpc};
use hapa_core::service::{ServiceSpec, Shutdown};
use hapa_proto::errors::v1::error_tracking_service_server::ErrorTrackingServiceServer;
use hapa_proto::errors::v1::gateway_report_service_server::GatewayReportServiceServer;
use hapa_store::change_feed::Tail;
use hapa_store::database::{Db, Durability, Survey};
use hapa_store::open::{OpenStore, StoreSpec};
use hapa_transport::peer::Wire;

use crate::calls::Calls;
use crate::gateway::GatewayReports;
use crate::service::Errors;
use crate::store::Store;
use crate::watch::News;

/// Settings of this service.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Errors")]
#[group(id = "errors")]
pub struct Config {
    /// How long occurrences are kept, in days; what is counted of them is kept twice as long.
    #[arg(long, env = "ERROR_RETENTION_DAYS", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=3650))]
    pub error_retention_days: u32,
    /// Whether occurrences are grouped into incidents; without it they are stored and counted only.
    #[arg(long, env = "INCIDENT_TRACKING_ENABLED", action = ArgAction::Set, default_value_t = true)]
    pub incident_tracking_enabled: bool,
}

/// What is seen differs: see `view.rs`.
const READ: Access = Access::AnyScope(&[view::READ, view::ADMIN]);

/// What can't work without the store.
pub const SERVICES: &[&str] = &["hapa.errors.v1.ErrorTrackingService"];

const RPCS: &[Rpc] = &[
    Rpc::new(
        "/hapa.errors.v1.ErrorTrackingService/ReportOccurrences",
        Access::Scope("errors:write"),
    )
    .by(access::SERVICES),
    Rpc::new("/hapa.errors.v1.ErrorTrackingService/GetDashboard", READ)
        .limited(100, 60)
        .by(access::SERVICES),
    Rpc::new("/hapa.errors.v1.ErrorTrackingService/ListPatterns", READ),
    Rpc::new("/hapa.errors.v1.ErrorTrackingService/ListIncidents", READ),
    Rpc::new("/hapa.errors.v1.ErrorTrackingService/GetIncident", READ),
    Rpc::new("/hapa.errors.v1.ErrorTrackingService/UpdateIncident", Access::Scope(view::ADMIN)),
    Rpc::new("/hapa.errors.v1.ErrorTrackingService/ListErrorCodes", Access::Caller),
    Rpc::new("/hapa.errors.v1.ErrorTrackingService/WatchOccurrences", READ),
];

/// The store of the service.
pub const STORE: &StoreSpec = &StoreSpec {
    service: "errors",
    steps: store::MIGRATIONS,
    durability: Durability::PowerCut,
    may_be_set_aside: true,
};
const GATEWAY_RPCS: &[Rpc] =
    &[Rpc::new("/hapa.errors.v1.GatewayReportService/ReportRefusals", Access::Mesh)
        .by(&[access::GATEWAY])];

/// Migrates the store at `url`, and does no more.
pub async fn migrate(url: &str) -> anyhow::Result<()> {
    open(url).await.map(drop)
}

/// Looks at the store at `url`, and changes nothing.
pub async fn survey(url: &str) -> anyhow::Result<Option<Survey>> {
    Db::survey("errors", url, store::MIGRATIONS).await
}

async fn open(url: &str) -> anyhow::Result<Db> {
    Db::open("errors", url, store::MIGRATIONS).await
}

/// What the service needs of its process.
#[derive(Debug)]
pub struct Dependencies {
    /// Its store, opened by [`STORE`].
    pub store: OpenStore,
    /// The shutdown of the server.
    pub shutdown: Shutdown,
    /// The analytics service, which counts calls; none where it is not known.
    pub analytics: Option<Wire>,
    /// Where occurrences go that the gateway reports.
    pub recorder: OccurrenceRecorder,
}

/// The service.
pub fn service(config: &Config, dependencies: Dependencies) -> ServiceSpec {
    let Dependencies { store: OpenStore { db, checks }, shutdown, analytics, recorder } =
        dependencies;
    let mut spec = ServiceSpec { checks, ..ServiceSpec::default() };
    let store = Store::new(db);
    let (tail, looking) = Tail::of(store.clone(), shutdown.stop_accepting);
    spec.spawn(looking);
    spec.spawn(retention::purge(store.clone(), config.error_retention_days));
    let errors = Errors {
        news: News { store: store.clone(), tail },
        calls: Calls::new(analytics),
        tracked: config.incident_tracking_enabled,
        store,
    };
    spec.add(ErrorTrackingServiceServer::new(errors), RPCS);
    spec.add_auxiliary(GatewayReportServiceServer::new(GatewayReports { recorder }), GATEWAY_RPCS);
    spec
}
