//! A deployed gateway on this machine: its endpoint for probes and metrics, and its drain.

use std::net::TcpListener;
use std::time::Duration;

use hapa_policy::manifests::listed;
use hapa_policy::root;
use hapa_test_harness::{Gateway, TestMesh, within};
use tempfile::TempDir;
use tokio::process::{Child, Command};
use tokio::time::sleep;
use tonic::Streaming;
use tonic::transport::Endpoint;
use tonic_health::pb::health_client::HealthClient;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};

struct DeployedGateway {
    public: u16,
    watch: u16,
    admin: u16,
    _envoy: Child,
    _folder: TempDir,
}

/// Free ports. All sockets stay bound until the last port is known, so that the ports differ.
fn free_ports() -> [u16; 3] {
    let held = [(); 3].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    held.map(|listener| listener.local_addr().unwrap().port())
}

async fn open(mesh: &TestMesh) -> DeployedGateway {
    let folder = tempfile::tempdir().unwrap();
    let [public, watch, admin] = free_ports();
    let text = [public, watch, admin, mesh.address.port()].map(|port| port.to_string());
    let settings = [
        ("GATEWAY_PORT", text[0].as_str()),
        ("GATEWAY_METRICS_PORT", &text[1]),
        ("ENVOY_ADMIN_PORT", &text[2]),
        ("PORT", &text[3]),
    ];
    let config = Gateway::write(folder.path(), &settings).await.unwrap();
    let mut envoy = Command::new(root().join(".tools/bin/envoy"));
    envoy.arg("-c").arg(config).args(["--disable-hot-restart", "--concurrency", "1"]);
    envoy
        .args(["--log-level", "error", "--drain-time-s", "60"])
        .stdout(std::process::Stdio::null());
    let envoy = envoy.kill_on_drop(true).spawn().unwrap();
    let gateway = DeployedGateway { public, watch, admin, _envoy: envoy, _folder: folder };
    gateway.wait_until_ready_is("200").await;
    gateway
}

impl DeployedGateway {
    /// Status and body of a GET request to the port for probes and metrics.
    async fn ask(&self, path: &str) -> (String, String) {
        let url = format!("http://127.0.0.1:{}{path}", self.watch);
        let mut curl = Command::new("curl");
        curl.args(["--silent", "--max-time", "10", "--write-out", "\n%{http_code}", &url]);
        let output = within("curl", curl.kill_on_drop(true).output()).await.unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let (body, status) = text.rsplit_once('\n').unwrap();
        (status.to_owned(), body.to_owned())
    }

    async fn wait_until_ready_is(&self, expected: &str) {
        within("the gateway's readiness", async {
            while self.ask("/ready").await.0 != expected {
                sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
    }

    /// A call that stays open.
    async fn call(&self) -> Streaming<HealthCheckResponse> {
        let url = format!("http://127.0.0.1:{}", self.public);
        let channel = Endpoint::from_shared(url).unwrap().connect().await.unwrap();
        let request = HealthCheckRequest { service: String::new() };
        let reply = HealthClient::new(channel).watch(request).await;
        let mut watching = reply.unwrap().into_inner();
        within("the first word", watching.message()).await.unwrap().unwrap();
        watching
    }

    fn drain(&self, seconds: &str) -> Child {
        let mut script = Command::new("bash");
        script.arg(root().join("k8s/base/drain.sh")).kill_on_drop(true);
        script.env("ADMIN_PORT", self.admin.to_string());
        script.env("DELAY_SECONDS", "0").env("DRAIN_SECONDS", seconds).spawn().unwrap()
    }
}

#[tokio::test]
async fn the_observation_port_serves_metrics_and_readiness_and_no_admin_action() {
    let mesh = TestMesh::start().await;
    let gateway = open(&mesh).await;
    assert_eq!(gateway.ask("/livez").await, ("200".to_owned(), "alive\n".to_owned()));
    let (status, metrics) = gateway.ask("/stats/prometheus").await;
    assert_eq!(status, "200");
    for (metric, _) in listed().into_iter().filter(|(_, source)| source == "envoy") {
        assert!(metrics.contains(&format!("\n{metric}{{")), "Envoy does not tell {metric}");
    }
    for path in ["/quitquitquit", "/config_dump", "/", "/stats", "/ready/../quitquitquit"] {
        assert_eq!(gateway.ask(path).await.0, "404", "{path}");
    }
}

#[tokio::test]
async fn a_gateway_that_must_go_says_so_and_waits_for_open_calls() {
    let mesh = TestMesh::start().await;
    let gateway = open(&mesh).await;
    let watching = gateway.call().await;
    let mut draining = gateway.drain("600");
    gateway.wait_until_ready_is("503").await;
    assert_eq!(gateway.ask("/livez").await.0, "200", "nobody should kill it for that");
    assert!(draining.try_wait().unwrap().is_none(), "a call is open");
    drop(watching);
    assert!(within("the drain", draining.wait()).await.unwrap().success());
}

#[tokio::test]
async fn a_drain_ends_at_its_bound_whatever_is_open() {
    let mesh = TestMesh::start().await;
    let gateway = open(&mesh).await;
    let watching = gateway.call().await;
    assert!(within("the drain", gateway.drain("1").wait()).await.unwrap().success());
    drop(watching);
}
