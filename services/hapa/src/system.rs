//! The mesh as a whole, told by any of its processes: is it well, and how is it set up.
//!
//! A question asks nobody: it is answered from what the checks found last. Where another process has
//! a role, its gRPC health is one of these checks. No cause and no host leaves here: those are for
//! operators, in the log and on /readyz.

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
use hapa_transport::peer::Wire;
use prost_types::Timestamp;
use tokio::time::{sleep, timeout};
use tonic::{Code, Request, Response, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::{Roles, warnings};

const VERSION: &str = env!("CARGO_PKG_VERSION");

const RPCS: &[Rpc] = &[
    Rpc::new("/hapa.system.v1.SystemService/GetHealth", Access::Public),
    Rpc::new("/hapa.system.v1.SystemService/GetConfigStatus", Access::Scope("auth:admin")),
];

const AUTH: &[&str] = &[
    "hapa.auth.v1.AuthService",
    "hapa.auth.v1.KeyService",
    "hapa.auth.v1.UserService",
    "hapa.auth.v1.SessionService",
    "hapa.auth.v1.AuditService",
];
const ERRORS: &[&str] = &["hapa.errors.v1.ErrorTrackingService"];
const ANALYTICS: &[&str] = &["hapa.analytics.v1.AnalyticsService"];

/// What a peer says that can be asked and can't work.
const NOT_SERVING: &str = "not_serving";
const UNREACHABLE: &str = "unreachable";

/// How long the errors service may take to say when it cleaned up last, how long that holds, and
/// when to ask again where it said nothing.
const ASKING: Duration = Duration::from_secs(2);
const CLEANUP_HOLDS: Duration = Duration::from_mins(1);
const ASK_AGAIN: Duration = Duration::from_secs(5);

/// How this process is set up.
pub(crate) struct Setup(GetConfigStatusResponse);

impl Setup {
    pub(crate) fn of(roles: &Roles) -> Setup {
        let has = [
            ("auth", roles.auth.is_some()),
            ("codegen", roles.codegen.is_some()),
            ("errors", roles.errors.is_some()),
            ("analytics", roles.analytics.is_some()),
        ];
        let environment = roles.server.common.environment.to_possible_value();
        let mut settings: Vec<_> = roles.settings.iter().cloned().map(row).collect();
        settings.sort_by(|a, b| a.name.cmp(&b.name));
        Setup(GetConfigStatusResponse {
            environment: environment.map(|value| value.get_name().to_owned()).unwrap_or_default(),
            version: VERSION.to_owned(),
            roles: has.into_iter().filter(|(_, has)| *has).map(|(name, _)| name.into()).collect(),
            settings,
            warnings: warnings::warnings(roles),
        })
    }
}

fn row(setting: crate::setting::Setting) -> Setting {
    let crate::setting::Setting { name, value, source } = setting;
    Setting { name, value, source: source.to_owned() }
}

struct System {
    setup: GetConfigStatusResponse,
    health: Health,
    last_cleanup: Cleanup,
}

/// When errors were last removed, as far as it is known.
#[derive(Clone, Default)]
struct Cleanup(Arc<Mutex<Option<Timestamp>>>);

/// Adds the service; after all others, so that it knows what is here and what is elsewhere.
pub(crate) async fn mount(setup: Setup, server: &mut Server) -> anyhow::Result<()> {
    let config = server.config().clone();
    let peers = [
        ("AUTH_ADDRESS", config.auth_address.as_deref(), AUTH, "auth"),
        ("ERRORS_ADDRESS", config.errors_address.as_deref(), ERRORS, "errors"),
        ("ANALYTICS_ADDRESS", config.analytics_address.as_deref(), ANALYTICS, "analytics"),
    ];
    let own = server.health().services();
    for (setting, address, services, role) in peers {
        let is_here = services.iter().any(|service| own.iter().any(|(own, _)| own == service));
        let Some(address) = address.filter(|_| !is_here) else { continue };
        let Some(wire) = server.peer_channel(setting, Some(address), services[0])? else {
            continue;
        };
        for service in services {
            server.check(peer_check(service, role, wire.clone()));
        }
    }
    let last_cleanup = Cleanup::default();
    if let Some(wire) =
        server.peer_channel("ERRORS_ADDRESS", config.errors_address.as_deref(), ERRORS[0])?
    {
        server.spawn(last_cleanup.clone().ask(wire));
    }
    let system = System { setup: setup.0, health: server.health(), last_cleanup };
    let mut spec = ServiceSpec::default();
    spec.add_auxiliary(SystemServiceServer::new(system), RPCS);
    server.mount(spec).await;
    Ok(())
}

fn peer_check(service: &'static str, role: &str, wire: Wire) -> HealthCheck {
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
    HealthCheck::new(service, format!("the {role} service can't be reached or can't work"), run)
}

impl Cleanup {
    async fn ask(self, wire: Wire) {
        let mut client = ErrorTrackingServiceClient::new(wire);
        loop {
            let reply = timeout(ASKING, client.get_dashboard(GetDashboardRequest {})).await;
            let told = reply.ok().and_then(Result::ok);
            let pause = if told.is_some() { CLEANUP_HOLDS } else { ASK_AGAIN };
            let time = told.and_then(|reply| reply.into_inner().last_cleanup);
            *self.0.lock().unwrap_or_else(PoisonError::into_inner) = time;
            sleep(pause).await;
        }
    }

    fn time(&self) -> Option<Timestamp> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[tonic::async_trait]
impl SystemService for System {
    async fn get_health(
        &self,
        _: Request<GetHealthRequest>,
    ) -> Result<Response<GetHealthResponse>, Status> {
        let (parts, own) = (self.health.components(), self.health.services());
        Ok(Response::new(GetHealthResponse {
            uptime: self.health.uptime().as_secs_f64(),
            last_cleanup: self.last_cleanup.time(),
            ..report(&parts, &own, self.health.is_draining())
        }))
    }

    async fn get_config_status(
        &self,
        _: Request<GetConfigStatusRequest>,
    ) -> Result<Response<GetConfigStatusResponse>, Status> {
        Ok(Response::new(self.setup.clone()))
    }
}

/// What the parts, this process's own services and a drain amount to.
fn report(
    parts: &[ComponentStatus],
    own: &[(&'static str, bool)],
    draining: bool,
) -> GetHealthResponse {
    let ill: Vec<_> = parts.iter().filter(|part| part.outcome.is_err()).collect();
    let mut problems: Vec<_> = ill.iter().map(|part| part.problem.clone()).collect();
    problems.dedup(); // a role of several services is one problem
    if draining {
        problems.push("this process is shutting down".to_owned());
    }
    let status = match () {
        () if ill.iter().any(|part| is_vital(part.name)) => "unhealthy",
        () if !problems.is_empty() => "degraded",
        () => "healthy",
    };
    // A process without a store knows of it from who has one and can't work without.
    let database = connected(parts, "database").or_else(|| connected(parts, AUTH[0]));
    let words = |connected: Option<bool>| match connected {
        Some(true) => "connected".to_owned(),
        Some(false) => "disconnected".to_owned(),
        None => "not_configured".to_owned(),
    };
    GetHealthResponse {
        status: status.to_owned(),
        version: VERSION.to_owned(),
        services: Some(Services {
            database: words(database),
            redis: words(connected(parts, "redis")),
            ai_model: words(connected(parts, "ai_model")),
        }),
        mesh: mesh(parts, own),
        problems,
        ..GetHealthResponse::default()
    }
}

/// Without these nothing is generated; without the rest less is known or counted.
fn is_vital(part: &str) -> bool {
    matches!(part, "database" | "ai_model") || AUTH.contains(&part)
}

/// Whether all parts of a name are well; none where there is none.
fn connected(parts: &[ComponentStatus], name: &str) -> Option<bool> {
    let mut named = parts.iter().filter(|part| part.name == name).peekable();
    named.peek()?;
    Some(named.all(|part| part.outcome.is_ok()))
}

fn mesh(parts: &[ComponentStatus], own: &[(&'static str, bool)]) -> Vec<MeshService> {
    let own =
        own.iter().map(|(name, serves)| (*name, if *serves { "serving" } else { NOT_SERVING }));
    let peers = parts.iter().filter(|part| part.name.starts_with("hapa."));
    let peers = peers.map(|part| {
        let status = match &part.outcome {
            Ok(()) => "serving",
            Err(words) if words == NOT_SERVING => NOT_SERVING,
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

    fn states(report: &GetHealthResponse) -> [&str; 4] {
        let services = report.services.as_ref().unwrap();
        [&report.status, &services.database, &services.redis, &services.ai_model]
    }

    #[test]
    fn what_is_away_decides_between_less_and_nothing() {
        let well = [part("database", Ok(())), part("redis", Ok(())), part("ai_model", Ok(()))];
        let all = report(&well, &[], false);
        assert_eq!(states(&all), ["healthy", "connected", "connected", "connected"]);
        assert!(all.problems.is_empty());
        let no_redis = report(&[part("redis", Err("10.0.0.7 refused"))], &[], false);
        assert_eq!(
            states(&no_redis),
            ["degraded", "not_configured", "disconnected", "not_configured"]
        );
        assert_eq!(no_redis.problems, ["no redis"], "hosts and causes are for operators");
        for vital in ["database", "ai_model", AUTH[1]] {
            assert_eq!(report(&[part(vital, Err("x"))], &[], false).status, "unhealthy");
        }
        let two = [part("database", Ok(())), part("database", Err("x"))];
        assert_eq!(states(&report(&two, &[], false))[1], "disconnected");
        assert_eq!(report(&well, &[], true).status, "degraded");
    }

    #[test]
    fn what_others_have_is_learned_from_them() {
        let peers = [
            part(AUTH[0], Err(NOT_SERVING)),
            part(ERRORS[0], Err("no answer within 2 s")),
            part(ANALYTICS[0], Ok(())),
        ];
        let own = [("hapa.codegen.v1.CodegenService", true)];
        let told = report(&peers, &own, false);
        assert_eq!(states(&told)[..2], ["unhealthy", "disconnected"]);
        let mesh: Vec<_> =
            told.mesh.iter().map(|one| (one.name.as_str(), one.status.as_str())).collect();
        let expected = [
            (ANALYTICS[0], "serving"),
            (AUTH[0], NOT_SERVING),
            (own[0].0, "serving"),
            (ERRORS[0], UNREACHABLE),
        ];
        assert_eq!(mesh, expected);
        assert_eq!(report(&peers[1..], &own, false).status, "degraded", "it only reports");
    }
}
