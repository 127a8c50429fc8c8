//! SystemService: health and configuration of the whole mesh, served by each of its processes.
//!
//! A reply contains the latest results of periodic checks, so that a request causes no further calls. If another
//! process has a role, its gRPC health is one of these checks. Replies hold neither causes nor host names: those are
//! for operators, in the log and on /readyz.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use clap::ValueEnum as _;
use hapa_core::access::{Access, Rpc};
use hapa_core::health_check::HealthCheck;
use hapa_core::service::ServiceSpec;
use hapa_proto::errors::v1::GetDashboardRequest;
use hapa_proto::errors::v1::error_tracking_service_client::ErrorTrackingServiceClient;
use hapa_proto::system::v1::get_config_status_response::Setting;
use hapa_proto::system::v1::get_health_response::{MeshService, Services};
use hapa_proto::system::v1::system_service_server::{SystemService, SystemServiceServer};
use hapa_proto::system::v1::{
    GetConfigStatusRequest, GetConfigStatusResponse, GetHealthRequest, GetHealthResponse,
};
use hapa_server::Server;
use hapa_server::health::{ComponentStatus, Health};
use hapa_transport::peer::PeerChannel;
use prost_types::Timestamp;
use tokio::time::{sleep, timeout};
use tonic::{Code, Request, Response, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::{Roles, warnings};

const VERSION: &str = env!("CARGO_PKG_VERSION");

const RPCS: &[Rpc] = &[
    Rpc::new("/hapa.system.v1.SystemService/GetHealth", Access::NoAuth),
    Rpc::new("/hapa.system.v1.SystemService/GetConfigStatus", Access::Scope("auth:admin")),
];

const AUTH_SERVICES: &[&str] = &[
    "hapa.auth.v1.AuthService",
    "hapa.auth.v1.KeyService",
    "hapa.auth.v1.UserService",
    "hapa.auth.v1.SessionService",
    "hapa.auth.v1.AuditService",
];
const ERRORS_SERVICES: &[&str] = &["hapa.errors.v1.ErrorTrackingService"];
const ANALYTICS_SERVICES: &[&str] = &["hapa.analytics.v1.AnalyticsService"];

/// Status of a peer that answers but does not serve.
const NOT_SERVING: &str = "not_serving";
/// Status of a peer that does not answer.
const UNREACHABLE: &str = "unreachable";

/// Timeout of the query for the last clean-up.
const CLEANUP_QUERY_TIMEOUT: Duration = Duration::from_secs(2);
/// Interval between queries after an answer.
const CLEANUP_POLL_INTERVAL: Duration = Duration::from_mins(1);
/// Delay before the next query after a failure.
const CLEANUP_RETRY_DELAY: Duration = Duration::from_secs(5);

/// The configuration of this process, as GetConfigStatus returns it.
pub(crate) fn config_status(roles: &Roles) -> GetConfigStatusResponse {
    let environment = roles.server.common.environment.to_possible_value();
    let setting = |setting: &crate::setting::Setting| Setting {
        name: setting.name.clone(),
        value: setting.value.clone(),
        source: setting.source.to_owned(),
    };
    let mut settings: Vec<_> = roles.settings.iter().map(setting).collect();
    settings.sort_by(|a, b| a.name.cmp(&b.name));
    GetConfigStatusResponse {
        environment: environment.map(|value| value.get_name().to_owned()).unwrap_or_default(),
        version: VERSION.to_owned(),
        roles: roles.role_names().into_iter().map(str::to_owned).collect(),
        settings,
        warnings: warnings::warnings(roles),
    }
}

struct SystemRpc {
    config_status: GetConfigStatusResponse,
    health: Health,
    last_cleanup: LastCleanup,
}

/// The time of the last removal of old errors, if known.
#[derive(Clone, Default)]
struct LastCleanup(Arc<Mutex<Option<Timestamp>>>);

/// Adds SystemService. Call it after all other services: it distinguishes services of this process from peers.
pub(crate) async fn mount(
    config_status: GetConfigStatusResponse,
    server: &mut Server,
) -> anyhow::Result<()> {
    let config = server.config().clone();
    let peers = [
        ("AUTH_ADDRESS", config.auth_address.as_deref(), AUTH_SERVICES, "auth"),
        ("ERRORS_ADDRESS", config.errors_address.as_deref(), ERRORS_SERVICES, "errors"),
        ("ANALYTICS_ADDRESS", config.analytics_address.as_deref(), ANALYTICS_SERVICES, "analytics"),
    ];
    let own = server.health().services();
    for (setting, address, services, role) in peers {
        let is_local = services.iter().any(|service| own.iter().any(|(own, _)| own == service));
        let Some(address) = address.filter(|_| !is_local) else { continue };
        let Some(wire) = server.peer_channel(setting, Some(address), services[0])? else {
            continue;
        };
        for service in services {
            server.check(peer_check(service, role, wire.clone()));
        }
    }
    let last_cleanup = LastCleanup::default();
    if let Some(wire) = server.peer_channel(
        "ERRORS_ADDRESS",
        config.errors_address.as_deref(),
        ERRORS_SERVICES[0],
    )? {
        server.spawn(last_cleanup.clone().poll(wire));
    }
    let system = SystemRpc { config_status, health: server.health(), last_cleanup };
    let mut spec = ServiceSpec::default();
    spec.add_auxiliary(SystemServiceServer::new(system), RPCS);
    server.mount(spec).await;
    Ok(())
}

fn peer_check(service: &'static str, role: &str, wire: PeerChannel) -> HealthCheck {
    let client = HealthClient::new(wire);
    let run = move || {
        let mut client = client.clone();
        async move {
            let reply = client.check(HealthCheckRequest { service: service.to_owned() }).await;
            match reply.map(|reply| reply.into_inner().status()) {
                Ok(ServingStatus::Serving) => Ok(()),
                Ok(_) => Err(NOT_SERVING.to_owned()),
                Err(status) if status.code() == Code::NotFound => Err(NOT_SERVING.to_owned()),
                Err(_) => Err(UNREACHABLE.to_owned()),
            }
        }
    };
    HealthCheck::new(service, format!("the {role} service is unreachable or not serving"), run)
}

impl LastCleanup {
    /// Queries the errors service periodically.
    async fn poll(self, wire: PeerChannel) {
        let mut client = ErrorTrackingServiceClient::new(wire);
        loop {
            let reply =
                timeout(CLEANUP_QUERY_TIMEOUT, client.get_dashboard(GetDashboardRequest {})).await;
            let dashboard = reply.ok().and_then(Result::ok);
            let delay = match dashboard {
                Some(_) => CLEANUP_POLL_INTERVAL,
                None => CLEANUP_RETRY_DELAY,
            };
            let time = dashboard.and_then(|reply| reply.into_inner().last_cleanup);
            *self.0.lock().unwrap_or_else(PoisonError::into_inner) = time;
            sleep(delay).await;
        }
    }

    fn get(&self) -> Option<Timestamp> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[tonic::async_trait]
impl SystemService for SystemRpc {
    async fn get_health(
        &self,
        _: Request<GetHealthRequest>,
    ) -> Result<Response<GetHealthResponse>, Status> {
        let (parts, own) = (self.health.components(), self.health.services());
        Ok(Response::new(GetHealthResponse {
            uptime: self.health.uptime().as_secs_f64(),
            last_cleanup: self.last_cleanup.get(),
            ..health_report(&parts, &own, self.health.is_draining())
        }))
    }

    async fn get_config_status(
        &self,
        _: Request<GetConfigStatusRequest>,
    ) -> Result<Response<GetConfigStatusResponse>, Status> {
        Ok(Response::new(self.config_status.clone()))
    }
}

/// The health of the mesh, from the results of all checks, the services of this process and its drain state.
fn health_report(
    parts: &[ComponentStatus],
    own: &[(&'static str, bool)],
    is_draining: bool,
) -> GetHealthResponse {
    let failed: Vec<_> = parts.iter().filter(|part| part.outcome.is_err()).collect();
    let mut problems: Vec<_> = failed.iter().map(|part| part.problem.clone()).collect();
    problems.dedup(); // the services of one role report the same problem
    if is_draining {
        problems.push("this process is shutting down".to_owned());
    }
    let status = match () {
        () if failed.iter().any(|part| is_vital(part.name)) => "unhealthy",
        () if !problems.is_empty() => "degraded",
        () => "healthy",
    };
    // A process without a store derives its state from auth, which cannot serve without one.
    let database = connected(parts, "database").or_else(|| connected(parts, AUTH_SERVICES[0]));
    let state = |connected: Option<bool>| match connected {
        Some(true) => "connected".to_owned(),
        Some(false) => "disconnected".to_owned(),
        None => "not_configured".to_owned(),
    };
    GetHealthResponse {
        status: status.to_owned(),
        version: VERSION.to_owned(),
        services: Some(Services {
            database: state(database),
            redis: state(connected(parts, "redis")),
            ai_model: state(connected(parts, "ai_model")),
        }),
        mesh: mesh_services(parts, own),
        problems,
        ..GetHealthResponse::default()
    }
}

/// Generation requires these parts. Without the others, the mesh only records less.
fn is_vital(part: &str) -> bool {
    matches!(part, "database" | "ai_model") || AUTH_SERVICES.contains(&part)
}

/// Whether all parts of this name are healthy; `None` if there is no such part.
fn connected(parts: &[ComponentStatus], name: &str) -> Option<bool> {
    let mut named = parts.iter().filter(|part| part.name == name).peekable();
    named.peek()?;
    Some(named.all(|part| part.outcome.is_ok()))
}

fn mesh_services(parts: &[ComponentStatus], own: &[(&'static str, bool)]) -> Vec<MeshService> {
    let own =
        own.iter().map(|(name, serves)| (*name, if *serves { "serving" } else { NOT_SERVING }));
    let peers = parts.iter().filter(|part| part.name.starts_with("hapa."));
    let peers = peers.map(|part| {
        let status = match &part.outcome {
            Ok(()) => "serving",
            Err(error) if error == NOT_SERVING => NOT_SERVING,
            Err(_) => UNREACHABLE,
        };
        (part.name, status)
    });
    let mut mesh: Vec<_> = own
        .chain(peers)
        .map(|(name, status)| MeshService { name: name.to_owned(), status: status.to_owned() })
        .collect();
    mesh.sort_by(|a, b| a.name.cmp(&b.name));
    mesh
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::*;

    fn part(name: &'static str, outcome: Result<(), &str>) -> ComponentStatus {
        let outcome = outcome.map_err(str::to_owned);
        ComponentStatus {
            name,
            problem: format!("no {name}"),
            needed_by: &[],
            outcome,
            checked: Instant::now(),
        }
    }

    fn states(health: &GetHealthResponse) -> [&str; 4] {
        let services = health.services.as_ref().unwrap();
        [&health.status, &services.database, &services.redis, &services.ai_model]
    }

    #[test]
    fn the_status_depends_on_which_parts_fail() {
        let healthy = [part("database", Ok(())), part("redis", Ok(())), part("ai_model", Ok(()))];
        let all = health_report(&healthy, &[], false);
        assert_eq!(states(&all), ["healthy", "connected", "connected", "connected"]);
        assert!(all.problems.is_empty());
        let no_redis = health_report(&[part("redis", Err("10.0.0.7 refused"))], &[], false);
        assert_eq!(
            states(&no_redis),
            ["degraded", "not_configured", "disconnected", "not_configured"]
        );
        assert_eq!(no_redis.problems, ["no redis"], "hosts and causes are not published");
        for vital in ["database", "ai_model", AUTH_SERVICES[1]] {
            assert_eq!(health_report(&[part(vital, Err("x"))], &[], false).status, "unhealthy");
        }
        let two = [part("database", Ok(())), part("database", Err("x"))];
        assert_eq!(states(&health_report(&two, &[], false))[1], "disconnected");
        assert_eq!(health_report(&healthy, &[], true).status, "degraded");
    }

    #[test]
    fn the_state_of_a_peer_comes_from_its_check() {
        let peers = [
            part(AUTH_SERVICES[0], Err(NOT_SERVING)),
            part(ERRORS_SERVICES[0], Err("no answer within 2 s")),
            part(ANALYTICS_SERVICES[0], Ok(())),
        ];
        let own = [("hapa.codegen.v1.CodegenService", true)];
        let health = health_report(&peers, &own, false);
        assert_eq!(states(&health)[..2], ["unhealthy", "disconnected"]);
        let mesh: Vec<_> =
            health.mesh.iter().map(|peer| (peer.name.as_str(), peer.status.as_str())).collect();
        let expected = [
            (ANALYTICS_SERVICES[0], "serving"),
            (AUTH_SERVICES[0], NOT_SERVING),
            (own[0].0, "serving"),
            (ERRORS_SERVICES[0], UNREACHABLE),
        ];
        assert_eq!(mesh, expected);
        assert_eq!(
            health_report(&peers[1..], &own, false).status,
            "degraded",
            "errors is not vital"
        );
    }
}
