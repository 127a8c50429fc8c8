//! The checks of `hapa doctor`, one function for each dependency of the mesh.

use std::path::{Path, PathBuf};
use std::time::Duration;

use hapa_codegen::EngineSurvey;
use hapa_core::rpc_error;
use hapa_proto::analytics::v1::GetUsageRequest;
use hapa_proto::analytics::v1::analytics_service_client::AnalyticsServiceClient;
use hapa_proto::auth::v1::ListKeysRequest;
use hapa_proto::auth::v1::key_service_client::KeyServiceClient;
use hapa_proto::codegen::v1::ListModelsRequest;
use hapa_proto::codegen::v1::codegen_service_client::CodegenServiceClient;
use hapa_proto::errors::v1::error_tracking_service_client::ErrorTrackingServiceClient;
use hapa_proto::errors::v1::gateway_report_service_client::GatewayReportServiceClient;
use hapa_proto::errors::v1::{GetDashboardRequest, ReportRefusalsRequest};
use hapa_server::outbox;
use hapa_store::database::DatabaseStatus;
use hapa_store::redis::{Redis, RedisOptions, Script};
use hapa_transport::balancer::BalancedChannel;
use hapa_transport::connect::TransportSecurity;
use hapa_transport::tls::{Tls, trust_roots};
use prost_types::Timestamp;
use tokio::time::{Instant, sleep, timeout};
use tonic::Status;

use super::Finding;
use crate::{Roles, warnings};

/// Timeout of one check.
const CHECK_TIMEOUT: Duration = Duration::from_secs(5);
/// Latency of a store above which the check adds a note: auth queries it for every credential outside its cache.
const SLOW_THRESHOLD: Duration = Duration::from_millis(50);
/// Maximum difference of two clocks: one machine writes the times of tokens and leases, another compares them.
const MAX_CLOCK_SKEW_MS: i64 = 2_000;
/// Disk space that an outbox may need before it drops events.
const MIN_FREE_BYTES: u64 = 1024 * 1024 * 1024;

pub(super) fn settings(roles: &Roles) -> Vec<Finding> {
    let advice = "correct the setting; see docs/settings.md";
    let first = match roles.check() {
        Ok(()) => Finding::ok("settings", "valid"),
        Err(wrong) => Finding::wrong("settings", wrong.to_string(), advice),
    };
    let notes = warnings::warnings(roles).into_iter();
    let notes = notes.map(|warning| Finding::note("settings", warning, "see docs/settings.md"));
    std::iter::once(first).chain(notes).collect()
}

pub(super) async fn stores(roles: &Roles) -> Vec<Finding> {
    let url = |service| roles.server.common.store_url(service);
    let (auth, errors, analytics) = (url("auth"), url("errors"), url("analytics"));
    let found = tokio::join!(
        hapa_auth::survey(&auth),
        hapa_errors::survey(&errors),
        hapa_analytics::survey(&analytics)
    );
    let named = [("auth", found.0), ("errors", found.1), ("analytics", found.2)];
    named.into_iter().flat_map(|(service, survey)| store(service, survey)).collect()
}

fn store(service: &str, survey: anyhow::Result<Option<DatabaseStatus>>) -> Vec<Finding> {
    let what = format!("store of {service}");
    let survey = match survey {
        Err(error) => {
            let advice =
                "check that it runs, DATABASE_URL, and the network; see the runbook, E5003";
            return vec![Finding::wrong(what, format!("{error:#}"), advice)];
        }
        Ok(None) => {
            return vec![Finding::absent(
                what,
                "does not exist yet; its role creates it at start-up",
            )];
        }
        Ok(Some(survey)) => survey,
    };
    let latency = format!("answers in {:.1} ms", survey.latency.as_secs_f64() * 1e3);
    let first = if survey.pending > 0 {
        let found = format!("{latency}; pending migrations: {}", survey.pending);
        Finding::note(&what, found, "run `hapa migrate`, or start the role")
    } else if survey.latency > SLOW_THRESHOLD {
        Finding::note(&what, latency, "check its load and the network")
    } else {
        Finding::ok(&what, latency)
    };
    let clock = survey.clock.map(|clock| clock_skew(&format!("clock of the {what}"), clock));
    std::iter::once(first).chain(clock).collect()
}

/// Compares another clock, in milliseconds since the Unix epoch, with this machine's.
fn clock_skew(what: &str, theirs: i64) -> Finding {
    let skew = (now_ms() - theirs).abs();
    let found = format!("{skew} ms apart from this machine's");
    if skew > MAX_CLOCK_SKEW_MS {
        return Finding::wrong(what, found, "synchronise both clocks with NTP");
    }
    Finding::ok(what, found)
}

pub(super) async fn redis(roles: &Roles) -> Finding {
    let Some(url) = roles.server.common.redis_url() else {
        return Finding::absent("Redis", "not set: each replica limits and caches on its own");
    };
    let advice = "check that it runs, REDIS_URL, and the network";
    let manner = RedisOptions {
        reply_timeout: CHECK_TIMEOUT,
        max_queued: 8,
        fallback: "nothing waits for it",
    };
    let redis = match Redis::new(url, manner) {
        Ok(redis) => redis,
        Err(wrong) => return Finding::wrong("Redis", wrong.to_string(), advice),
    };
    let connected = async {
        while !redis.is_up() {
            sleep(Duration::from_millis(10)).await;
        }
    };
    if timeout(CHECK_TIMEOUT, connected).await.is_err() {
        return Finding::wrong("Redis", "unreachable", advice);
    }
    let script = Script::new(
        "local t = redis.call('TIME') return tonumber(t[1]) * 1000 + math.floor(tonumber(t[2]) / 1000)",
    );
    let start = Instant::now();
    let Ok(clock) = redis.run::<i64>(&script, Vec::new(), Vec::new()).await else {
        let advice = "allow EVALSHA and SCRIPT LOAD for this Redis user";
        return Finding::wrong("Redis", "refuses scripts", advice);
    };
    let latency = start.elapsed().as_secs_f64() * 1e3;
    let skew = clock_skew("Redis", clock);
    let found = format!("runs a script in {latency:.1} ms; its clock is {}", skew.found);
    Finding { found, ..skew }
}

pub(super) async fn engines(roles: &Roles) -> Vec<Finding> {
    let Some(config) = &roles.codegen else { return Vec::new() };
    let advice =
        "check that it runs and has loaded its model, AI_MODEL_ENDPOINT, and AI_MODEL_API_KEY";
    let start = Instant::now();
    let found = hapa_codegen::survey(config).await;
    let average_ms = start.elapsed().as_secs_f64() * 1e3
        / f64::from(u32::try_from(found.len().max(1)).unwrap_or(1));
    let row = |(url, survey): (String, Result<EngineSurvey, String>)| {
        let what = format!("engine {}", crate::setting::redact_url_password(&url));
        match survey {
            Ok(EngineSurvey { models: 0, .. }) => Finding::wrong(what, "serves no model", advice),
            Ok(EngineSurvey { models, found_base_url }) => {
                let base_url = found_base_url
                    .map(|url| format!("; its base URL is {url}"))
                    .unwrap_or_default();
                let found = format!("serves {models} models, listed in {average_ms:.1} ms");
                Finding::ok(what, found + &base_url)
            }
            Err(error) => Finding::wrong(what, error, advice),
        }
    };
    found.into_iter().map(row).collect()
}

pub(super) fn certificates(roles: &Roles) -> Finding {
    let advice = "check their issuer (cert-manager: `kubectl describe certificate`)";
    match Tls::from_config(&roles.server.tls) {
        Ok(None) => {
            Finding::absent("certificates", "not set: services authenticate with MESH_TOKEN")
        }
        Err(error) => Finding::wrong("certificates", format!("{error:#}"), advice),
        Ok(Some(tls)) => {
            let now = now_ms() / 1_000;
            let roles = tls.roles().join(", ");
            let hours = tls.validity().left(now).as_secs() / 3_600;
            let found = format!("roles: {roles}; valid for {hours} h");
            if let Some(problem) = tls.problem(now) {
                return Finding::wrong("certificates", problem, advice);
            }
            if roles.is_empty() {
                let advice =
                    "issue them with a role as DNS name, or with a URI under TLS_SPIFFE_PREFIX";
                return Finding::wrong("certificates", "they name no role", advice);
            }
            Finding::ok("certificates", found)
        }
    }
}

/// Calls each service without a credential; the refusal of the service itself shows that the route works.
pub(super) async fn gateway(address: Option<&str>, authority: Option<&PathBuf>) -> Vec<Finding> {
    let Some(address) = address.filter(|address| !address.is_empty()) else {
        return vec![Finding::absent("gateway", "not checked: set GATEWAY_ADDRESS")];
    };
    let secure = if address.starts_with("https://") {
        trust_roots(authority).map(|config| TransportSecurity::ServerTls(config.into()))
    } else {
        Ok(TransportSecurity::Plaintext)
    };
    let channel = secure.and_then(|secure| BalancedChannel::new(address, secure, CHECK_TIMEOUT));
    let advice = "check that Envoy runs and listens at GATEWAY_ADDRESS";
    let channel = match channel {
        Ok(channel) => channel,
        Err(error) => return vec![Finding::wrong("gateway", format!("{error:#}"), advice)],
    };
    if let Err(status) = channel.connect().await {
        return vec![Finding::wrong("gateway", status.message(), advice)];
    }
    let mut codegen = CodegenServiceClient::new(channel.clone());
    let mut keys = KeyServiceClient::new(channel.clone());
    let mut analytics = AnalyticsServiceClient::new(channel.clone());
    let mut reports = GatewayReportServiceClient::new(channel.clone());
    let mut errors = ErrorTrackingServiceClient::new(channel);
    let replies = tokio::join!(
        refusal(codegen.list_models(ListModelsRequest::default())),
        refusal(keys.list_keys(ListKeysRequest::default())),
        refusal(analytics.get_usage(GetUsageRequest::default())),
        refusal(errors.get_dashboard(GetDashboardRequest {}))
    );
    let roles = [
        ("codegen", replies.0),
        ("auth", replies.1),
        ("analytics", replies.2),
        ("errors", replies.3),
    ];
    let routes = roles.into_iter().map(|(role, reply)| route(role, reply));
    let own = refusal(reports.report_refusals(ReportRefusalsRequest::default())).await;
    routes.chain([own_refusal(own.as_ref())]).collect()
}

/// Checks the gateway's refusal of an RPC that only the mesh may call: it must have a published code.
fn own_refusal(reply: Option<&Status>) -> Finding {
    let what = "gateway refusals";
    let advice = "write its configuration with `hapa gateway` of this release";
    match reply.and_then(rpc_error::published_code) {
        Some((code, _)) if code == "E4012" => {
            Finding::ok(what, "have a code and an incident id; RPCs of the mesh are not exposed")
        }
        Some(_) => Finding::wrong(what, "an RPC of the mesh is exposed to clients", advice),
        None => Finding::wrong(what, "have no published code and incident id", advice),
    }
}

async fn refusal<T>(call: impl Future<Output = Result<T, Status>>) -> Option<Status> {
    let late = |_| Err(Status::deadline_exceeded("no answer in time"));
    timeout(CHECK_TIMEOUT, call).await.unwrap_or_else(late).err()
}

fn route(role: &str, reply: Option<Status>) -> Finding {
    let what = format!("gateway route to {role}");
    match reply {
        None => Finding::ok(what, "works"),
        // The service itself answers: it requires a credential.
        Some(status)
            if rpc_error::published_code(&status).is_some_and(|(code, _)| code == "E4003") =>
        {
            Finding::ok(what, "works")
        }
        Some(status) => {
            let advice =
                "check that the role runs at the gateway's address; see the runbook, HapaRoleDown";
            Finding::wrong(what, format!("{:?}: {}", status.code(), status.message()), advice)
        }
    }
}

pub(super) async fn outboxes(roles: &Roles) -> Vec<Finding> {
    let folder = &roles.server.common.data_dir;
    let advice = "check that analytics and errors run; see the runbook, HapaSpoolOld";
    let max_events = roles.server.outbox.outbox_max_events;
    let mut findings = vec![disk_space(folder)];
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    for file in entries.map(|entry| entry.path()).filter(|path| outbox::is_outbox_file(path)) {
        let what = format!("outbox {}", file.display());
        let pending = timeout(CHECK_TIMEOUT, outbox::count_events(&file)).await;
        findings.push(match pending {
            Ok(Ok(pending)) if pending >= max_events / 2 => {
                Finding::wrong(what, format!("{pending} of {max_events} events pending"), advice)
            }
            Ok(Ok(pending)) => Finding::ok(what, format!("{pending} events pending")),
            Ok(Err(error)) => {
                Finding::wrong(what, format!("{error:#}"), "give this user read permission")
            }
            Err(_) => Finding::wrong(what, "does not answer", "check the disk"),
        });
    }
    findings
}

fn disk_space(folder: &Path) -> Finding {
    let what = format!("disk of {}", folder.display());
    let Ok(disk) = rustix::fs::statvfs(folder) else {
        return Finding::absent(what, "does not exist yet; a role creates it at start-up");
    };
    let free = disk.f_bavail.saturating_mul(disk.f_frsize);
    let found = format!("{} MiB free", free / 1024 / 1024);
    if free < MIN_FREE_BYTES {
        let advice = "free disk space: outboxes and embedded stores grow there";
        return Finding::wrong(what, found, advice);
    }
    Finding::ok(what, found)
}

fn now_ms() -> i64 {
    let now = Timestamp::from(std::time::SystemTime::now());
    now.seconds * 1_000 + i64::from(now.nanos) / 1_000_000
}
