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

pub use crate::gateway_report::{OccurrenceRecorder, RecordOccurrence};
use clap::ArgAction;
use hapa_core::access::{self, Access, Rpc};
use hapa_core::service::{ServiceSpec, Shutdown};
use hapa_proto::errors::v1::error_tracking_service_server::ErrorTrackingServiceServer;
use hapa_proto::errors::v1::gateway_report_service_server::GatewayReportServiceServer;
use hapa_store::change_feed::ChangeFeed;
use hapa_store::database::{DatabaseStatus, Db, Durability};
use hapa_store::open::{OpenStore, StoreSpec};
use hapa_transport::peer::PeerChannel;

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
    #[arg(long, env = "INCIDENT_TRACKING_ENABLED", action = ArgAction::Set, value_parser = hapa_core::config::boolean, default_value_t = true)]
    pub incident_tracking_enabled: bool,
}

/// `errors:read` sees its owner's failures, `errors:admin` sees all.
const READ: Access = Access::AnyScope(&[visibility::READ_SCOPE, visibility::ADMIN_SCOPE]);

/// The gRPC services that depend on the store.
pub const SERVICES: &[&str] = &["hapa.errors.v1.ErrorTrackingService"];

const RPCS: &[Rpc] = &[
    Rpc::new(
        "/hapa.errors.v1.ErrorTrackingService/ReportOccurrences",
        Access::Scope("errors:write"),
    )
    .allowed_roles(access::SERVICE_ROLES),
    Rpc::new("/hapa.errors.v1.ErrorTrackingService/GetDashboard", READ)
        .limited(100, 60)
        .allowed_roles(access::SERVICE_ROLES),
    Rpc::new("/hapa.errors.v1.ErrorTrackingService/ListPatterns", READ),
    Rpc::new("/hapa.errors.v1.ErrorTrackingService/ListIncidents", READ),
    Rpc::new("/hapa.errors.v1.ErrorTrackingService/GetIncident", READ),
    Rpc::new(
        "/hapa.errors.v1.ErrorTrackingService/UpdateIncident",
        Access::Scope(visibility::ADMIN_SCOPE),
    ),
    Rpc::new("/hapa.errors.v1.ErrorTrackingService/ListErrorCodes", Access::Authenticated),
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
    &[Rpc::new("/hapa.errors.v1.GatewayReportService/ReportRefusals", Access::Service)
        .allowed_roles(&[access::GATEWAY_ROLE])];

/// Applies the schema migrations to the store at `url`.
pub async fn migrate(url: &str) -> anyhow::Result<()> {
    open(url).await.map(drop)
}

/// Reports the schema version of the store at `url` without changing it.
pub async fn survey(url: &str) -> anyhow::Result<Option<DatabaseStatus>> {
    Db::inspect("errors", url, store::MIGRATIONS).await
}

async fn open(url: &str) -> anyhow::Result<Db> {
    Db::open("errors", url, store::MIGRATIONS).await
}

/// What the service needs of its process.
#[derive(Debug)]
pub struct Dependencies {
    /// The store, opened by [`STORE`].
    pub store: OpenStore,
    /// The shutdown of the server.
    pub shutdown: Shutdown,
    /// The analytics service, which counts calls; `None` if it is not configured.
    pub analytics: Option<PeerChannel>,
    /// Receives the occurrences that the gateway reports.
    pub recorder: OccurrenceRecorder,
}

/// Builds the gRPC services, their health checks and their background tasks.
pub fn service(config: &Config, dependencies: Dependencies) -> ServiceSpec {
    let Dependencies { store: OpenStore { db, checks }, shutdown, analytics, recorder } =
        dependencies;
    let mut spec = ServiceSpec { checks, ..ServiceSpec::default() };
    let store = Store::new(db);
    let (feed, poller) = ChangeFeed::new(store.clone(), shutdown.stop_accepting);
    spec.spawn(poller);
    spec.spawn(retention::run_purge(store.clone(), config.error_retention_days));
    let tracker = ErrorTracker {
        feed: OccurrenceFeed { store: store.clone(), tail: feed },
        call_counter: CallCounter::new(analytics),
        incident_tracking_enabled: config.incident_tracking_enabled,
        store,
    };
    spec.add(ErrorTrackingServiceServer::new(tracker), RPCS);
    spec.add_auxiliary(GatewayReportServiceServer::new(GatewayReports { recorder }), GATEWAY_RPCS);
    spec
}
