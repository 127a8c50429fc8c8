//! The looks of `hapa doctor`, one function for each thing that the mesh stands on.

use std::path::{Path, PathBuf};
use std::time::Duration;

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
use hapa_store::database::Survey;
use hapa_store::redis::{Manner, Redis, Script};
use hapa_transport::balancer::Balanced;
use hapa_transport::connect::Secure;
use hapa_transport::tls::{Tls, believing};
use prost_types::Timestamp;
use tokio::time::{Instant, sleep, timeout};
use tonic::Status;

use super::Finding;
use crate::{Roles, warnings};

/// How long one thing may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// From where on an answer is slow: a store or a Redis is asked for every call that is not known.
const SLOW: Duration = Duration::from_millis(50);
/// How far clocks may be apart: tokens and leases are dated by one and read by another.
const SKEW_MS: i64 = 2_000;
/// What a spool may need before it drops anything.
const ROOM: u64 = 1024 * 1024 * 1024;

pub(super) fn settings(roles: &Roles) -> Vec<Finding> {
    let advice = "set it right; docs/settings.md says what it takes";
    let first = match roles.check() {
        Ok(()) => Finding::well("settings", "they fit together"),
        Err(wrong) => Finding::ill("settings", wrong.to_string(), advice),
    };
    let notes = warnings::warnings(roles).into_iter();
    let notes = notes.map(|words| Finding::note("settings", words, "see docs/settings.md"));
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

fn store(service: &str, survey: anyhow::Result<Option<Survey>>) -> Vec<Finding> {
    let what = format!("store of {service}");
    let survey = match survey {
        Err(error) => {
            let advice =
                "is it up, is DATABASE_URL right, may this machine reach it? Runbook, E5003";
            return vec![Finding::ill(what, format!("{error:#}"), advice)];
        }
        Ok(None) => {
            return vec![Finding::absent(what, "not made yet; its role does when it starts")];
        }
        Ok(Some(survey)) => survey,
    };
    let took = format!("answers in {:.1} ms", survey.latency.as_secs_f64() * 1e3);
    let first = if survey.pending > 0 {
        let words = format!("{took}; {} steps of migration are to be taken", survey.pending);
        Finding::note(&what, words, "`hapa migrate`, or start the role")
    } else if survey.latency > SLOW {
        Finding::note(&what, took, "look at its load, and at the way to it")
    } else {
        Finding::well(&what, took)
    };
    let clock = survey.clock.map(|clock| skew(&format!("clock of the {what}"), clock));
    std::iter::once(first).chain(clock).collect()
}

/// How far another clock is from this machine's.
fn skew(what: &str, theirs: i64) -> Finding {
    let apart = (now_ms() - theirs).abs();
    let words = format!("{apart} ms apart from this machine's");
    if apart > SKEW_MS {
        return Finding::ill(what, words, "keep time by NTP on both machines");
    }
    Finding::well(what, words)
}

pub(super) async fn redis(roles: &Roles) -> Finding {
    let Some(url) = roles.server.common.redis_url() else {
        return Finding::absent("Redis", "not set: a replica counts on its own");
    };
    let advice = "is it up, is REDIS_URL right, may this machine reach it?";
    let manner = Manner { patience: PATIENCE, most_queued: 8, meanwhile: "nothing waits for it" };
    let redis = match Redis::new(url, manner) {
        Ok(redis) => redis,
        Err(wrong) => return Finding::ill("Redis", wrong.to_string(), advice),
    };
    let connected = async {
        while !redis.is_up() {
            sleep(Duration::from_millis(10)).await;
        }
    };
    if timeout(PATIENCE, connected).await.is_err() {
        return Finding::ill("Redis", "it can't be reached", advice);
    }
    let script = Script::new(
        "local t = redis.call('TIME') return tonumber(t[1]) * 1000 + math.floor(tonumber(t[2]) / 1000)",
    );
    let begun = Instant::now();
    let Ok(clock) = redis.ask::<i64>(&script, Vec::new(), Vec::new()).await else {
        return Finding::ill(
            "Redis",
            "it runs no script",
            "may this user use EVALSHA and SCRIPT LOAD?",
        );
    };
    let took = begun.elapsed().as_secs_f64() * 1e3;
    let apart = skew("Redis", clock);
    let found = format!("runs a script in {took:.1} ms; its clock is {}", apart.found);
    Finding { found, ..apart }
}

pub(super) async fn engines(roles: &Roles) -> Vec<Finding> {
    let Some(config) = &roles.codegen else { return Vec::new() };
    let advice =
        "is it up and done loading, is AI_MODEL_ENDPOINT right, does it take AI_MODEL_API_KEY?";
    let begun = Instant::now();
    let found = hapa_codegen::survey(config).await;
    let each = begun.elapsed().as_secs_f64() * 1e3
        / f64::from(u32::try_from(found.len().max(1)).unwrap_or(1));
    let row = |(url, models): (String, Result<usize, String>)| {
        let what = format!("engine {}", crate::setting::without_password(&url));
        match models {
            Ok(0) => Finding::ill(what, "it serves no model", advice),
            Ok(models) => {
                Finding::well(what, format!("serves {models} models, told in {each:.1} ms"))
            }
            Err(why) => Finding::ill(what, why, advice),
        }
    };
    found.into_iter().map(row).collect()
}

pub(super) fn certificates(roles: &Roles) -> Finding {
    let advice = "look at what issues them (cert-manager: `kubectl describe certificate`)";
    match Tls::of(&roles.server.tls) {
        Ok(None) => {
            Finding::absent("certificates", "not set: services prove themselves by MESH_TOKEN")
        }
        Err(error) => Finding::ill("certificates", format!("{error:#}"), advice),
        Ok(Some(tls)) => {
            let now = now_ms() / 1_000;
            let proven = tls.roles().join(", ");
            let hours = tls.validity().left(now).as_secs() / 3_600;
            let found = format!("prove: {proven}; hold for {hours} h");
            if let Some(problem) = tls.problem(now) {
                return Finding::ill("certificates", problem, advice);
            }
            if proven.is_empty() {
                let advice = "a DNS name must be a role, or a URI begin with TLS_SPIFFE_PREFIX";
                return Finding::ill("certificates", "they prove no role", advice);
            }
            Finding::well("certificates", found)
        }
    }
}

/// Asks something of each service without a credential: its refusal shows that the way is open.
pub(super) async fn gateway(address: Option<&str>, authority: Option<&PathBuf>) -> Vec<Finding> {
    let Some(address) = address.filter(|address| !address.is_empty()) else {
        return vec![Finding::absent("gateway", "not looked at: set GATEWAY_ADDRESS")];
    };
    let secure = if address.starts_with("https://") {
        believing(authority).map(|config| Secure::Believing(config.into()))
    } else {
        Ok(Secure::No)
    };
    let channel = secure.and_then(|secure| Balanced::new(address, secure, PATIENCE));
    let advice = "is Envoy up, and is GATEWAY_ADDRESS where it listens?";
    let channel = match channel {
        Ok(channel) => channel,
        Err(error) => return vec![Finding::ill("gateway", format!("{error:#}"), advice)],
    };
    if let Err(status) = channel.connect().await {
        return vec![Finding::ill("gateway", status.message(), advice)];
    }
    let mut codegen = CodegenServiceClient::new(channel.clone());
    let mut keys = KeyServiceClient::new(channel.clone());
    let mut analytics = AnalyticsServiceClient::new(channel.clone());
    let mut reports = GatewayReportServiceClient::new(channel.clone());
    let nothing = ReportRefusalsRequest::default();
    let mut errors = ErrorTrackingServiceClient::new(channel);
    let said = tokio::join!(
        refusal(codegen.list_models(ListModelsRequest::default())),
        refusal(keys.list_keys(ListKeysRequest::default())),
        refusal(analytics.get_usage(GetUsageRequest::default())),
        refusal(errors.get_dashboard(GetDashboardRequest {}))
    );
    let roles = [("codegen", said.0), ("auth", said.1), ("analytics", said.2), ("errors", said.3)];
    let ways = roles.into_iter().map(|(role, said)| route(role, said));
    let own = refusal(reports.report_refusals(nothing)).await;
    ways.chain([own_refusal(own.as_ref())]).collect()
}

/// What the gateway says of an RPC that is for the mesh alone: its own refusal, in published form.
fn own_refusal(said: Option<&Status>) -> Finding {
    let what = "gateway, its own refusals";
    match said.and_then(rpc_error::read) {
        Some((code, _)) if code == "E4012" => Finding::well(
            what,
            "carry a code and an incident id; what is for the mesh has no way in",
        ),
        Some(_) => {
            let found = "an RPC that is for the mesh alone can be reached from outside";
            Finding::ill(what, found, "write its configuration with `hapa gateway` of this release")
        }
        None => {
            let advice = "write its configuration with `hapa gateway` of this release";
            Finding::ill(what, "carry no published code and incident id", advice)
        }
    }
}

async fn refusal<T>(call: impl Future<Output = Result<T, Status>>) -> Option<Status> {
    let late = |_| Err(Status::deadline_exceeded("no answer in time"));
    timeout(PATIENCE, call).await.unwrap_or_else(late).err()
}

fn route(role: &str, said: Option<Status>) -> Finding {
    let what = format!("gateway, the way to {role}");
    match said {
        None => Finding::well(what, "open"),
        // Its own code: the service was reached, and wants to know who calls.
        Some(status) if rpc_error::read(&status).is_some_and(|(code, _)| code == "E4003") => {
            Finding::well(what, "open")
        }
        Some(status) => {
            let advice = "is the role up, and its address the gateway's? Runbook, HapaRoleDown";
            Finding::ill(what, format!("{:?}: {}", status.code(), status.message()), advice)
        }
    }
}

pub(super) async fn spools(roles: &Roles) -> Vec<Finding> {
    let folder = &roles.server.common.data_dir;
    let advice = "are analytics and errors up? Runbook, HapaSpoolOld";
    let most = roles.server.outbox.outbox_max_events;
    let mut findings = vec![room(folder)];
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    for file in entries.map(|entry| entry.path()).filter(|path| outbox::is_outbox_file(path)) {
        let what = format!("spool {}", file.display());
        let waiting = timeout(PATIENCE, outbox::count_events(&file)).await;
        findings.push(match waiting {
            Ok(Ok(waiting)) if waiting >= most / 2 => {
                Finding::ill(what, format!("{waiting} events wait, of {most} at most"), advice)
            }
            Ok(Ok(waiting)) => Finding::well(what, format!("{waiting} events wait")),
            Ok(Err(error)) => Finding::ill(what, format!("{error:#}"), "may this user read it?"),
            Err(_) => Finding::ill(what, "it does not answer", "is the disk well?"),
        });
    }
    findings
}

fn room(folder: &Path) -> Finding {
    let what = format!("disk of {}", folder.display());
    let Ok(disk) = rustix::fs::statvfs(folder) else {
        return Finding::absent(what, "not made yet; a role does when it starts");
    };
    let free = disk.f_bavail.saturating_mul(disk.f_frsize);
    let words = format!("{} MiB free", free / 1024 / 1024);
    if free < ROOM {
        return Finding::ill(what, words, "make room: spools and embedded stores grow there");
    }
    Finding::well(what, words)
}

fn now_ms() -> i64 {
    let now = Timestamp::from(std::time::SystemTime::now());
    now.seconds * 1_000 + i64::from(now.nanos) / 1_000_000
}
