//! A deployed mesh: one auth process and two replicas of code generation on one PostgreSQL and one Redis, with
//! a scripted engine. All of it ends with the cluster.

use std::net::{SocketAddr, TcpListener};
use std::process::{ExitStatus, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};

use hapa_engine_sim::Engine;
use hapa_proto::auth::v1::audit_service_client::AuditServiceClient;
use hapa_proto::auth::v1::key_service_client::KeyServiceClient;
use hapa_proto::auth::v1::session_service_client::SessionServiceClient;
use hapa_proto::auth::v1::user_service_client::UserServiceClient;
use hapa_proto::auth::v1::{CreateKeyRequest, CreateKeyResponse};
use hapa_proto::codegen::v1::codegen_service_client::CodegenServiceClient;
use serde_json::Value;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};
use tokio::task::JoinSet;
use tokio::time::sleep;
use tonic::transport::{Channel, Endpoint};

use crate::identities::Identity;
use crate::incident_tracker::TestChannel;
use crate::postgres::{Database, Postgres};
use crate::redis::RedisServer;
use crate::test_mesh::{CodegenClient, KeyClient, TOKEN, reqwest_client};
use crate::tools::{
    Metrics, POLL_INTERVAL, freeze, hapa, hapa_with_file_limits, limit_files, resident_bytes,
    signal, thaw, within,
};

/// A client of UserService.
pub type UserClient = UserServiceClient<TestChannel>;
/// A client of SessionService.
pub type SessionClient = SessionServiceClient<TestChannel>;
/// A client of AuditService.
pub type AuditClient = AuditServiceClient<TestChannel>;

/// One auth process and two replicas of code generation, on a private PostgreSQL and Redis.
#[derive(Debug)]
pub struct TestCluster {
    /// The engine behind both replicas.
    pub engine: Engine,
    /// The Redis of the shared rate limits.
    pub redis: RedisServer,
    /// The database of auth.
    pub database: Database,
    /// The auth process.
    pub auth: RoleProcess,
    /// The replicas of code generation.
    pub replicas: [RoleProcess; 2],
    settings: Vec<(&'static str, String)>,
}

impl TestCluster {
    /// Starts it, and waits until all processes are connected.
    pub async fn start() -> TestCluster {
        TestCluster::start_with(&[]).await
    }

    /// Starts it with these settings besides the usual ones.
    pub async fn start_with(own: &[(&'static str, &str)]) -> TestCluster {
        let engine = Engine::start();
        let (redis, database) = tokio::join!(RedisServer::start(), Postgres::database());
        let mut settings = vec![
            ("MESH_TOKEN", TOKEN.to_owned()),
            ("API_KEY_PEPPER", "the-pepper-of-a-test-which-is-long-too".to_owned()),
            ("SECRET_KEY", "the-secret-of-a-test-which-is-long-as-well".to_owned()),
            ("DATABASE_URL", database.url().to_owned()),
            ("REDIS_URL", redis.url()),
            ("AI_MODEL_ENDPOINT", engine.url().to_owned()),
            // Tests repeat requests and expect each to reach the engine.
            ("CACHE_TTL", "0".to_owned()),
            // Streams at a hold of a test may wait long on a slow machine.
            ("TOKEN_GAP_TIMEOUT_SECONDS", "300".to_owned()),
            // A busy cluster would fill a pipe that the test does not read.
            ("LOG_LEVEL", "warn,hapa_server::server=info".to_owned()),
        ];
        settings.extend(own.iter().map(|&(name, value)| (name, value.to_owned())));
        let auth = RoleProcess::start("auth", &settings, &[]).await;
        settings.push(("AUTH_ADDRESS", format!("http://{}", auth.address)));
        let (one, other) = tokio::join!(
            RoleProcess::start("codegen", &settings, &[]),
            RoleProcess::start("codegen", &settings, &[])
        );
        let cluster =
            TestCluster { engine, redis, database, auth, replicas: [one, other], settings };
        for role in [&cluster.auth, &cluster.replicas[0], &cluster.replicas[1]] {
            role.is_whole().await;
        }
        cluster
    }

    /// Starts another replica of code generation with these flags.
    pub async fn another_replica(&self, flags: &[&str]) -> RoleProcess {
        let role = RoleProcess::start("codegen", &self.settings, flags).await;
        role.is_whole().await;
        role
    }

    /// Starts another auth process on the same store, which no replica calls.
    pub async fn another_auth(&self) -> RoleProcess {
        let own = |(name, _): &&(&str, String)| *name != "AUTH_ADDRESS";
        let settings: Vec<_> = self.settings.iter().filter(own).cloned().collect();
        RoleProcess::start("auth", &settings, &[]).await
    }

    /// Starts another replica of code generation that calls these auth processes.
    pub async fn replica_of(&self, auths: &[&RoleProcess]) -> RoleProcess {
        let addresses = auths.iter().map(|auth| format!("http://{}", auth.address));
        let addresses = addresses.collect::<Vec<_>>().join(",");
        self.another_replica(&[&format!("--auth-address={addresses}")]).await
    }

    /// Creates a key.
    pub async fn create_key(&self, request: CreateKeyRequest) -> CreateKeyResponse {
        let made = within("a key", async { self.auth.keys().create_key(request).await }).await;
        made.expect("a key can be made").into_inner()
    }

    /// A client of CodegenService with this key for each replica.
    pub fn clients(&self, key: &str) -> [CodegenClient; 2] {
        [self.replicas[0].client(key), self.replicas[1].client(key)]
    }
}

/// One process of the mesh.
#[derive(Debug)]
pub struct RoleProcess {
    command: Box<Command>,
    process: Child,
    address: SocketAddr,
    metrics: SocketAddr,
    channel: Channel,
    /// Created once, because that takes longer than a request.
    http: reqwest::Client,
    _folder: TempDir,
    /// Reads the log, so that the process is not blocked.
    log: JoinSet<()>,
}

impl RoleProcess {
    /// Starts a process with these settings and flags.
    pub async fn start(
        name: &str,
        settings: &[(&'static str, String)],
        flags: &[&str],
    ) -> RoleProcess {
        within("a process of the mesh", async {
            loop {
                // Another process may have taken the port.
                if let Some(role) = RoleProcess::on(quiet_port(), name, settings, flags).await {
                    return role;
                }
            }
        })
        .await
    }

    /// Starts a process with a disk that the test can fill.
    pub async fn start_on_small_disk(
        name: &str,
        settings: &[(&'static str, String)],
    ) -> RoleProcess {
        within("a process of the mesh", async {
            loop {
                let (port, command) = (quiet_port(), hapa_with_file_limits());
                if let Some(role) = RoleProcess::run(command, port, name, (settings, &[])).await {
                    return role;
                }
            }
        })
        .await
    }

    /// `None` if the port is in use.
    pub(crate) async fn on(
        port: u16,
        name: &str,
        settings: &[(&'static str, String)],
        flags: &[&str],
    ) -> Option<RoleProcess> {
        RoleProcess::run(hapa(), port, name, (settings, flags)).await
    }

    async fn run(
        command: Command,
        port: u16,
        name: &str,
        (settings, flags): (&[(&'static str, String)], &[&str]),
    ) -> Option<RoleProcess> {
        let folder = tempfile::tempdir().expect("a folder for the test");
        let mut command = Box::new(command);
        command.arg(name).args(flags).arg(format!("--port={port}"));
        command.args(["--metrics-port=0", "--structured-logging=true"]);
        command.envs(settings.iter().map(|(name, value)| (name, value)));
        command.env("DATA_DIR", folder.path()).stderr(Stdio::piped());
        let mut log = JoinSet::new();
        let (process, address, metrics) = spawn(&mut command, &mut log).await?;
        let endpoint = Endpoint::from_shared(format!("http://{address}"));
        let channel = endpoint.expect("an address").connect_lazy();
        let http = reqwest_client();
        Some(RoleProcess {
            command,
            process,
            address,
            metrics,
            channel,
            http,
            _folder: folder,
            log,
        })
    }

    /// Kills it.
    pub async fn kill(&mut self) {
        self.process.kill().await.expect("it ran");
    }

    /// Its resident memory, in bytes.
    pub fn resident_memory(&self) -> u64 {
        let process = self.process.id().expect("it runs");
        let status = std::fs::read_to_string(format!("/proc/{process}/status"));
        let status = status.expect("it runs");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
        kib.expect("VmRSS in KiB") * 1_024
    }

    /// Sends SIGTERM, and waits until it has stopped.
    pub async fn stop(&mut self) {
        self.ask_to_stop().await;
        self.has_stopped().await;
    }

    /// Sends SIGTERM.
    pub async fn ask_to_stop(&self) {
        signal(&self.process, "-TERM").await;
    }

    /// Sends SIGINT, as a terminal does.
    pub async fn interrupt(&self) {
        signal(&self.process, "-INT").await;
    }

    /// Waits until it has exited with success.
    pub async fn has_stopped(&mut self) {
        let status = self.ended().await;
        assert!(status.success(), "{status}");
    }

    /// Waits until it has exited, and returns its status.
    pub async fn ended(&mut self) -> ExitStatus {
        within("a process to end", self.process.wait()).await.expect("it ran")
    }

    /// The address of its gRPC port.
    pub fn mesh(&self) -> SocketAddr {
        self.address
    }

    /// The address of its metrics port.
    pub fn metrics_address(&self) -> SocketAddr {
        self.metrics
    }

    /// Starts it again on the same port.
    pub async fn start_again(&mut self) {
        within("a process to start again", async {
            loop {
                if let Some(started) = spawn(&mut self.command, &mut self.log).await {
                    (self.process, _, self.metrics) = started;
                    return;
                }
                sleep(POLL_INTERVAL).await;
            }
        })
        .await;
    }

    /// Makes every write to a file fail, as on a full disk.
    pub async fn fill_disk(&self) {
        limit_files(&self.process, Some(1_024)).await;
    }

    /// Ends [`RoleProcess::fill_disk`].
    pub async fn free_disk(&self) {
        limit_files(&self.process, None).await;
    }

    /// Freezes it; its connections stay open.
    pub async fn freeze(&self) {
        freeze(&self.process).await;
    }

    /// Continues after [`RoleProcess::freeze`].
    pub async fn thaw(&self) {
        thaw(&self.process).await;
    }

    /// A new channel with this identity.
    pub fn new_channel_as(&self, identity: Identity<'_>) -> TestChannel {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.address));
        identity.on(endpoint.expect("an address").connect_lazy())
    }

    /// Its resident memory, in bytes, from statm.
    pub fn resident_bytes(&self) -> u64 {
        resident_bytes(&self.process)
    }

    /// A client of CodegenService with this key.
    pub fn client(&self, key: &str) -> CodegenClient {
        self.client_as(Identity::Key(key))
    }

    /// A client of CodegenService with this access token.
    pub fn client_of_session(&self, token: &str) -> CodegenClient {
        self.client_as(Identity::Session(token))
    }

    fn client_as(&self, identity: Identity<'_>) -> CodegenClient {
        CodegenServiceClient::new(identity.on(self.channel.clone()))
    }

    /// A client of KeyService with the mesh token.
    pub fn keys(&self) -> KeyClient {
        KeyServiceClient::new(self.as_mesh())
    }

    /// A client of UserService with the mesh token.
    pub fn users(&self) -> UserClient {
        UserServiceClient::new(self.as_mesh())
    }

    /// A client of SessionService with the mesh token.
    pub fn sessions(&self) -> SessionClient {
        SessionServiceClient::new(self.as_mesh())
    }

    /// A client of AuditService with the mesh token.
    pub fn audit(&self) -> AuditClient {
        AuditServiceClient::new(self.as_mesh())
    }

    fn as_mesh(&self) -> TestChannel {
        Identity::Mesh.on(self.channel.clone())
    }

    /// The text of a page of the metrics port.
    pub async fn page(&self, path: &str) -> String {
        let url = format!("http://{}{path}", self.metrics);
        let reply = within(path, self.http.get(url).send()).await.expect("the port listens");
        within(path, reply.text()).await.expect("text")
    }

    /// The present metrics.
    pub async fn metrics(&self) -> Metrics {
        Metrics(self.page("/metrics").await)
    }

    /// Waits until it has a connection to Redis and to the revocation feed.
    pub(crate) async fn is_whole(&self) {
        within("a process to find the others", async {
            while self.metrics().await.sum("hapa_revocation_link_up", &[]) < 1.0
                || self.page("/readyz").await != "ready\n"
            {
                sleep(POLL_INTERVAL).await;
            }
        })
        .await;
    }
}

/// `None` if it exited before it served.
async fn spawn(
    command: &mut Command,
    log: &mut JoinSet<()>,
) -> Option<(Child, SocketAddr, SocketAddr)> {
    let mut process = command.spawn().expect("the binary runs");
    let mut lines = BufReader::new(process.stderr.take().expect("a pipe")).lines();
    let mut last = String::new();
    while let Some(line) = lines.next_line().await.expect("text") {
        let said: Value = serde_json::from_str(&line).unwrap_or_default();
        if said["fields"]["message"] == "serving" {
            let address = |name: &str| said["fields"][name].as_str()?.parse().ok();
            let (mesh, metrics) = (address("address"), address("metrics_address"));
            log.spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
            return Some((process, mesh.expect("an address"), metrics.expect("an address")));
        }
        last = line;
    }
    assert!(last.contains("PORT"), "it did not start: {last}");
    None
}

/// A free port outside the kernel's ephemeral range. No outgoing connection takes it, not even one that polls
/// a stopped server.
pub(crate) fn quiet_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    loop {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let begin = u16::try_from(std::process::id() % 10_000).expect("small");
        let port = 20_000 + (begin + number) % 10_000;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}
