//! Health checks run in the background: a failed dependency is reported without delay, and so is its recovery.

use std::process::Stdio;
use std::time::Duration;

use hapa_proto::system::v1::system_service_client::SystemServiceClient;
use hapa_proto::system::v1::{
    GetConfigStatusRequest, GetConfigStatusResponse, GetHealthRequest, GetHealthResponse,
};
use hapa_test_harness::{Identity, Postgres, RedisServer, TestMesh, hapa, within};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStderr};
use tokio::time::{sleep, timeout};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

/// Far below the timeout of any dependency.
const MAX_REPLY_DELAY: Duration = Duration::from_secs(1);
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// A call without a credential.
async fn health(mesh: &TestMesh) -> GetHealthResponse {
    let mut client = SystemServiceClient::new(mesh.channel_as(Identity::Anonymous));
    let reply = within("health", client.get_health(GetHealthRequest {})).await;
    reply.unwrap().into_inner()
}

/// Health must not wait for a dependency. One reply in time out of five suffices on a busy machine.
async fn is_told_at_once(mesh: &TestMesh) {
    for _ in 0..5 {
        if timeout(MAX_REPLY_DELAY, health(mesh)).await.is_ok() {
            return;
        }
    }
    panic!("health waits for something");
}

/// The whole, the database, Redis, the model.
fn states(health: &GetHealthResponse) -> [&str; 4] {
    let services = health.services.as_ref().unwrap();
    [&health.status, &services.database, &services.redis, &services.ai_model]
}

async fn becomes(mesh: &TestMesh, wanted: [&str; 4]) -> GetHealthResponse {
    within(&format!("{wanted:?}"), async {
        loop {
            let health = health(mesh).await;
            if states(&health) == wanted {
                return health;
            }
            sleep(POLL_INTERVAL).await;
        }
    })
    .await
}

async fn serving(mesh: &TestMesh, service: &str) -> bool {
    let mut client = HealthClient::new(mesh.channel_as(Identity::Anonymous));
    let request = HealthCheckRequest { service: service.to_owned() };
    let reply = within("health", client.check(request)).await.unwrap();
    reply.into_inner().status() == ServingStatus::Serving
}

const HEALTHY: [&str; 4] = ["healthy", "connected", "not_configured", "connected"];

#[tokio::test]
async fn a_fresh_mesh_is_well_from_its_first_answer_on() {
    let mesh = TestMesh::start().await;
    let health = health(&mesh).await;
    assert_eq!(states(&health), HEALTHY, "{health:?}");
    assert!(health.uptime > 0.0 && health.problems.is_empty(), "{health:?}");
    assert_eq!(health.version, env!("CARGO_PKG_VERSION"));
    let service = |name: &str| health.mesh.iter().find(|service| service.name == name).unwrap();
    for name in ["auth.v1.KeyService", "codegen.v1.CodegenService", "system.v1.SystemService"] {
        assert_eq!(service(&format!("hapa.{name}")).status, "serving");
    }
}

#[tokio::test]
async fn an_unreachable_engine_is_reported_and_makes_no_replica_unready() {
    let mesh = TestMesh::start().await;
    mesh.engine.stop().await;
    let ill = becomes(&mesh, ["unhealthy", "connected", "not_configured", "disconnected"]).await;
    assert_eq!(ill.problems, ["the AI model is unavailable"]);
    is_told_at_once(&mesh).await;
    assert!(serving(&mesh, "hapa.codegen.v1.CodegenService").await);
    let (status, words) = mesh.page("/readyz").await;
    assert_eq!(status, 200);
    assert!(words.contains("the engine can't be reached"), "{words}");
    mesh.engine.resume();
    becomes(&mesh, HEALTHY).await;
    assert_eq!(mesh.page("/readyz").await, (200, "ready\n".to_owned()));
}

#[tokio::test]
async fn a_store_that_hangs_takes_auth_out_and_brings_it_back() {
    let server = Postgres::own().await;
    let mesh = TestMesh::start_with(&[&format!("--database-url={}", server.url())]).await;
    becomes(&mesh, HEALTHY).await;
    server.freeze().await;
    let ill = becomes(&mesh, ["unhealthy", "disconnected", "not_configured", "connected"]).await;
    assert!(ill.problems.contains(&"the store of auth does not answer".to_owned()), "{ill:?}");
    is_told_at_once(&mesh).await;
    let not_serving: Vec<_> =
        ill.mesh.iter().filter(|service| service.status == "not_serving").collect();
    assert!(not_serving.iter().any(|service| service.name == "hapa.auth.v1.AuthService"));
    // The status follows the finding at once, not in the same moment.
    within("gRPC health", async {
        while serving(&mesh, "hapa.auth.v1.AuthService").await {
            sleep(POLL_INTERVAL).await;
        }
    })
    .await;
    assert!(!serving(&mesh, "hapa.auth.v1.KeyService").await);
    assert!(serving(&mesh, "hapa.codegen.v1.CodegenService").await);
    assert!(serving(&mesh, "").await, "generations go on with callers that are known");
    server.thaw().await;
    becomes(&mesh, HEALTHY).await;
    within("gRPC health", async {
        while !serving(&mesh, "hapa.auth.v1.AuthService").await {
            sleep(POLL_INTERVAL).await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_failed_redis_is_reported_and_used_again_without_any_traffic() {
    let mut redis = RedisServer::start().await;
    let mesh = TestMesh::start_with(&[&format!("--redis-url={}", redis.url())]).await;
    let whole = ["healthy", "connected", "connected", "connected"];
    assert_eq!(states(&health(&mesh).await), whole, "its first answer waited for the connection");
    redis.kill().await;
    let ill = becomes(&mesh, ["degraded", "connected", "disconnected", "connected"]).await;
    assert_eq!(ill.problems, ["Redis does not answer"]);
    assert!(mesh.page("/readyz").await.1.contains("Redis does not answer"));
    redis.start_again().await;
    // Health calls have no credential, so they are not rate limited and do not use Redis.
    becomes(&mesh, whole).await;
    within("/readyz", async { while mesh.page("/readyz").await.1 != "ready\n" {} }).await;
}

#[tokio::test]
async fn the_settings_are_shown_to_an_admin_and_no_secret_is_among_them() {
    let redis = RedisServer::start().await;
    let mesh = TestMesh::start_with(&[&format!("--redis-url={}", redis.url())]).await;
    let mut client = SystemServiceClient::new(mesh.channel_as(Identity::Key(&mesh.key)));
    let reply = client.get_config_status(GetConfigStatusRequest {}).await.unwrap().into_inner();
    let GetConfigStatusResponse { environment, roles, settings, warnings, .. } = &reply;
    assert_eq!(environment, "development");
    assert_eq!(roles, &["auth", "codegen", "errors", "analytics"]);
    assert!(warnings.iter().any(|words| words.starts_with("REDIS_URL")), "{warnings:?}");
    let row = |name: &str| settings.iter().find(|setting| setting.name == name).unwrap();
    for secret in ["MESH_TOKEN", "REDIS_URL"] {
        assert_eq!((&*row(secret).value, &*row(secret).source), ("(redacted)", "flag"));
    }
    assert_eq!((&*row("MAX_IN_FLIGHT").value, &*row("MAX_IN_FLIGHT").source), ("2048", "default"));
    assert_eq!((&*row("SECRET_KEY").value, &*row("SECRET_KEY").source), ("", "not set"));
    let shown = format!("{reply:?}");
    assert!(!shown.contains(mesh.mesh_token()) && !shown.contains(&redis.url()), "{shown}");
}

#[tokio::test]
async fn health_is_documented_json_at_the_gateway() {
    let mesh = TestMesh::start().await;
    let gateway = mesh.gateway(&[]).await;
    for path in ["/health", "/api/v1/health"] {
        let reply = gateway.request("GET", path).send().await;
        assert_eq!(reply.status(), 200, "{path}");
        let text = within("the body", reply.text()).await.unwrap();
        let health: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(health["status"], "healthy", "{text}");
        assert!(health["version"].is_string() && health["uptime"].as_f64().unwrap() > 0.0);
        let services = &health["services"];
        assert_eq!(services["database"], "connected");
        assert_eq!(services["redis"], "not_configured");
        assert_eq!(services["ai_model"], "connected");
        assert!(health["mesh"].as_array().unwrap().iter().all(|one| one["status"] == "serving"));
        assert_eq!(health["problems"], serde_json::json!([]));
    }
    let shown = gateway.get("/api/v1/config/status", &mesh.key).await;
    let shown = within("the body", shown.text()).await.unwrap();
    assert!(shown.contains("\"MESH_TOKEN\"") && !shown.contains(mesh.mesh_token()), "{shown}");
}

/// A running binary with its log. A log that is not read cannot be written.
type Process = (Child, Lines<BufReader<ChildStderr>>);

/// A process that has one role only, and where it listens.
async fn codegen(mesh: &TestMesh) -> (Process, String) {
    let mut command = hapa();
    command.args(["codegen", "--port=0", "--metrics-port=0", "--structured-logging=true"]);
    command.env("AUTH_ADDRESS", format!("http://{}", mesh.address));
    // The log is not read further; a full pipe would block the process.
    command.env("LOG_LEVEL", "info,hapa_server::middleware::record_call=warn");
    command.env("MESH_TOKEN", mesh.mesh_token()).env("AI_MODEL_ENDPOINT", mesh.engine.url());
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let serving = within("the first line", lines.next_line()).await.unwrap().unwrap();
    let line: Value = serde_json::from_str(&serving).unwrap();
    let address = line["fields"]["address"].as_str().unwrap_or_else(|| panic!("{serving}"));
    let address = format!("http://{address}");
    ((child, lines), address)
}

#[tokio::test]
async fn a_process_without_a_store_learns_of_it_from_auth() {
    let mut mesh = TestMesh::start().await;
    let (_process, address) = codegen(&mesh).await;
    let mut client = within("it", SystemServiceClient::connect(address)).await.unwrap();
    let mut ask = async || {
        let reply = within("health", client.get_health(GetHealthRequest {})).await;
        reply.unwrap().into_inner()
    };
    let well = ask().await;
    assert_eq!(states(&well), HEALTHY, "{well:?}");
    let auth = |health: &GetHealthResponse| {
        let found = health.mesh.iter().find(|one| one.name == "hapa.auth.v1.KeyService");
        found.unwrap().status.clone()
    };
    assert_eq!(auth(&well), "serving");
    mesh.begin_shutdown();
    mesh.wait_until_stopped().await;
    within("auth to be missed", async {
        while auth(&ask().await) != "unreachable" {
            sleep(POLL_INTERVAL).await;
        }
    })
    .await;
    let ill = ask().await;
    assert_eq!(states(&ill)[..2], ["unhealthy", "disconnected"], "{ill:?}");
}
