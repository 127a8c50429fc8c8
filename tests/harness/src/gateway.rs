//! A real Envoy in front of a mesh, with the configuration that `hapa gateway` writes.

use std::fs::File;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use rustls::pki_types::CertificateDer;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::process::{Child, Command};
use tokio::time::sleep;
use tonic::transport::Endpoint;

use crate::identities::Identity;
use crate::incident_tracker::{AccessLog, IncidentTracker, TestChannel};
use crate::test_mesh::{TOKEN, reqwest_client};
use crate::tools::{hapa, resident_bytes, root, within};

/// A running Envoy. Dropping it stops it.
#[derive(Debug)]
pub struct Gateway {
    /// Its URL: `http://127.0.0.1:PORT`.
    pub url: String,
    admin: String,
    log: AccessLog,
    /// `None` if the mesh does not store its failures.
    seen: Option<IncidentTracker>,
    envoy: Child,
    _folder: TempDir,
}

impl Gateway {
    pub(crate) async fn start(
        mesh: SocketAddr,
        own: &[(&str, &str)],
        seen: Option<IncidentTracker>,
    ) -> Gateway {
        let port = mesh.port().to_string();
        Gateway::begin(&[&[("PORT", port.as_str())], own].concat(), seen, str::to_owned).await
    }

    /// Starts it with these settings of `hapa gateway`.
    pub async fn with(settings: &[(&str, &str)]) -> Gateway {
        Gateway::begin(settings, None, str::to_owned).await
    }

    /// Starts it with these settings and a change of the written configuration.
    pub async fn edited(settings: &[(&str, &str)], edit: impl Fn(&str) -> String) -> Gateway {
        Gateway::begin(settings, None, edit).await
    }

    async fn begin(
        settings: &[(&str, &str)],
        seen: Option<IncidentTracker>,
        edit: impl Fn(&str) -> String,
    ) -> Gateway {
        let (folder, log) = (tempfile::tempdir().expect("a folder for the test"), AccessLog::new());
        let config = write(folder.path(), settings).await.expect("a configuration");
        let text = std::fs::read_to_string(&config).expect("a configuration");
        std::fs::write(&config, edit(&text)).expect("a configuration");
        let admin_file = folder.path().join("admin");
        let envoy = envoy()
            .arg("-c")
            .arg(config)
            .args(["--disable-hot-restart", "--concurrency", "1", "--log-level", "error"])
            .args(["--file-flush-interval-msec", "10"])
            .arg("--admin-address-path")
            .arg(&admin_file)
            .stdout(File::create(log.path()).expect("a file for the log"))
            .spawn()
            .expect(".tools/bin/envoy runs: `make tools` installs it");
        let admin = within("Envoy's admin port", async {
            loop {
                match std::fs::read_to_string(&admin_file) {
                    Ok(address) if !address.is_empty() => return format!("http://{address}"),
                    _ => sleep(Duration::from_millis(10)).await,
                }
            }
        });
        let admin = admin.await;
        let url = within("Envoy's listener", listener(&admin)).await;
        if let Some(seen) = &seen {
            seen.look_into(&log);
        }
        let secure = settings.iter().any(|(name, _)| *name == "GATEWAY_TLS_CERT_FILE");
        let url = if secure { url.replacen("http:", "https:", 1) } else { url };
        let gateway = Gateway { url, admin, log, seen, envoy, _folder: folder };
        gateway.wait_until_healthy().await;
        gateway
    }

    /// The first calls of a test would be refused before the health checks have reached the mesh.
    async fn wait_until_healthy(&self) {
        let url = format!("{}/clusters?format=json", self.admin);
        within("the gateway to see the mesh", async {
            loop {
                let clusters = get(&url).await;
                let hosts = clusters["cluster_statuses"].as_array().into_iter().flatten();
                let mut hosts =
                    hosts.filter_map(|cluster| cluster["host_statuses"].as_array()).flatten();
                let healthy = |host: &Value| {
                    host["health_status"]["eds_health_status"] == "HEALTHY"
                        && host["health_status"]["failed_active_health_check"] != true
                };
                if hosts.all(healthy) {
                    return;
                }
                sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
    }

    /// Sends JSON with POST, as `curl` does.
    pub async fn post(&self, path: &str, key: Option<&str>, body: &Value) -> reqwest::Response {
        let request = self.request("POST", path).header("content-type", "application/json");
        let request = match key {
            Some(key) => request.header("x-api-key", key),
            None => request,
        };
        request.body(body.to_string()).send().await
    }

    /// Sends a GET.
    pub async fn get(&self, path: &str, key: &str) -> reqwest::Response {
        self.request("GET", path).header("x-api-key", key).send().await
    }

    /// The certificate that it presents to a client that trusts this authority.
    pub async fn certificate(&self, authority: &Path) -> CertificateDer<'static> {
        let pem = std::fs::read(authority).expect("an authority");
        let authority = reqwest::Certificate::from_pem(&pem).expect("an authority");
        let client = reqwest::Client::builder().no_proxy().tls_info(true);
        let client = client.tls_certs_only([authority]).build().expect("a client");
        let reply = client.get(&self.url).send().await.expect("the gateway answers");
        let shown: Option<&reqwest::tls::TlsInfo> = reply.extensions().get();
        let shown = shown.and_then(|shown| shown.peer_certificate()).expect("a certificate");
        CertificateDer::from(shown.to_vec())
    }

    /// The present value of a statistic; 0 if it does not exist.
    pub async fn statistic(&self, name: &str) -> u64 {
        let found = get(&format!("{}/stats?format=json&filter=^{name}$", self.admin)).await;
        found["stats"][0]["value"].as_u64().unwrap_or_default()
    }

    /// Its resident memory, in bytes.
    pub fn resident_bytes(&self) -> u64 {
        resident_bytes(&self.envoy)
    }

    /// The lines of its access log so far.
    pub fn access_log(&self) -> Vec<Value> {
        self.log.lines()
    }

    /// Starts a request of any method.
    pub fn request(&self, method: &str, path: &str) -> GatewayRequest {
        let method = method.parse().expect("a method");
        let request = reqwest_client().request(method, format!("{}{path}", self.url));
        GatewayRequest { request, seen: self.seen.clone() }
    }

    /// A gRPC channel through the gateway with this identity.
    pub fn channel_as(&self, identity: Identity<'_>) -> TestChannel {
        let endpoint = Endpoint::from_shared(self.url.clone()).expect("an address");
        let wire = identity.on(endpoint.connect_lazy());
        match &self.seen {
            Some(seen) => wire.seen_by(seen),
            None => wire,
        }
    }

    /// Writes a configuration with these settings besides those of a test. Returns the message of `hapa
    /// gateway` if it refuses them.
    pub async fn write(
        folder: &Path,
        settings: &[(&str, &str)],
    ) -> Result<std::path::PathBuf, String> {
        write(folder, settings).await
    }
}

/// A request over HTTP. The incident id of a failure is recorded.
#[derive(Debug)]
pub struct GatewayRequest {
    request: reqwest::RequestBuilder,
    seen: Option<IncidentTracker>,
}

impl GatewayRequest {
    /// Adds a header.
    #[must_use]
    pub fn header(self, name: &str, value: &str) -> GatewayRequest {
        GatewayRequest { request: self.request.header(name, value), ..self }
    }

    /// Sets the body.
    #[must_use]
    pub fn body(self, body: impl Into<String>) -> GatewayRequest {
        GatewayRequest { request: self.request.body(body.into()), ..self }
    }

    /// Sends it and returns the answer. Its failure is not recorded, because the test reads it.
    pub async fn send_raw(self) -> reqwest::Response {
        within("the gateway", self.request.send()).await.expect("the gateway answers")
    }

    /// Sends it and returns the answer, possibly an unfinished stream. Its failures are recorded.
    pub async fn send(self) -> reqwest::Response {
        let reply = within("the gateway", self.request.send()).await.expect("the gateway answers");
        match self.seen {
            Some(seen) => seen.http(reply).await,
            None => reply,
        }
    }
}

/// The installed Envoy.
pub(crate) fn envoy() -> Command {
    let mut command = Command::new(root().join(".tools/bin/envoy"));
    command.kill_on_drop(true);
    command
}

async fn write(folder: &Path, settings: &[(&str, &str)]) -> Result<std::path::PathBuf, String> {
    let mut command = hapa();
    command.args(["gateway", "--out"]).arg(folder);
    command.envs([("GATEWAY_PORT", "0"), ("ENVOY_ADMIN_PORT", "0"), ("MESH_TOKEN", TOKEN)]);
    command.envs(settings.iter().copied());
    let done = within("hapa gateway", command.output()).await.expect("it runs");
    if done.status.success() {
        return Ok(folder.join("envoy.yaml"));
    }
    Err(String::from_utf8_lossy(&done.stderr).into_owned())
}

async fn get(url: &str) -> Value {
    let reply = reqwest_client().get(url).send().await.expect("Envoy's admin port answers");
    let text = reply.text().await.expect("text");
    serde_json::from_str(&text).unwrap_or_else(|_| json!({}))
}

async fn listener(admin: &str) -> String {
    loop {
        let listeners = get(&format!("{admin}/listeners?format=json")).await;
        let port =
            &listeners["listener_statuses"][0]["local_address"]["socket_address"]["port_value"];
        if let Some(port) = port.as_u64() {
            return format!("http://127.0.0.1:{port}");
        }
        sleep(Duration::from_millis(10)).await;
    }
}
