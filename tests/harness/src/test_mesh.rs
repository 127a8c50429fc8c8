//! A mesh for one test: all roles in this process, on free ports, with a scripted engine. Dropping it
//! stops everything.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::LazyLock;

use clap::{CommandFactory as _, FromArgMatches as _, Parser};
use hapa::setting::settings;
use hapa::{AllRolesArgs, Roles, run};
use hapa_engine_sim::{Engine, Setup};
use hapa_proto::auth::v1::key_service_client::KeyServiceClient;
use hapa_proto::auth::v1::{CreateKeyRequest, CreateKeyResponse, RateLimit};
use hapa_proto::codegen::v1::codegen_service_client::CodegenServiceClient;
use hapa_server::rate_limit::LimitConfig;
use hapa_server::{Config, Listeners};
use hapa_telemetry::logging;
use hapa_transport::otlp_exporter::{self, SpanExporter};
use tempfile::TempDir;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};
use tracing::dispatcher::{self, DefaultGuard, Dispatch};
use tracing::subscriber::NoSubscriber;

use crate::gateway::Gateway;
use crate::identities::Identity;
use crate::incident_tracker::{IncidentTracker, TestChannel};
use crate::postgres::Store;
use crate::tools::{Metrics, within};

/// The mesh token of every test's mesh.
pub const TOKEN: &str = "the-mesh-token-of-a-test-which-is-long";

/// Flags that disable usage events and occurrences.
const UNRECORDED: &[&str] =
    &["--usage-recording-enabled=false", "--error-monitoring-enabled=false"];

/// Flags with which this mesh does not store its failures.
const WITHOUT_INCIDENTS: &[&str] =
    &["--error-monitoring-enabled=false", "--incident-tracking-enabled=false", "--errors-address"];

/// A client of CodegenService.
pub type CodegenClient = CodegenServiceClient<TestChannel>;
/// A client of KeyService.
pub type KeyClient = KeyServiceClient<TestChannel>;

/// The settings of `hapa all`, read as the binary reads them.
#[derive(Parser)]
#[command(args_override_self = true)]
struct Settings {
    #[command(flatten)]
    all: AllRolesArgs,
}

/// All roles, with these arguments.
pub(crate) fn roles(arguments: impl IntoIterator<Item = String>) -> Roles {
    let command = Settings::command();
    let matches = command.clone().get_matches_from(arguments);
    let all = Settings::from_arg_matches(&matches).expect("settings").all;
    Roles { settings: settings(&command, &matches), ..Roles::from(all) }
}

/// A mesh for one test: all roles in this process, with a scripted engine.
#[derive(Debug)]
pub struct TestMesh {
    /// The first engine.
    pub engine: Engine,
    /// The other engines.
    pub others: Vec<Engine>,
    /// The address of the gRPC port.
    pub address: SocketAddr,
    /// A key with every scope and no limits.
    pub key: String,
    metrics: SocketAddr,
    /// The incident ids that clients received. `None` if this mesh does not store its failures.
    seen: Option<IncidentTracker>,
    folder: TempDir,
    channel: Channel,
    shutdown: CancellationToken,
    running: JoinSet<anyhow::Result<()>>,
    /// Enables spans until it is dropped.
    _traced: Option<DefaultGuard>,
}

impl TestMesh {
    /// Starts a mesh with default settings, except that the response cache is off.
    pub async fn start() -> TestMesh {
        TestMesh::start_with(&[]).await
    }

    /// Starts a mesh with these flags of `hapa all`.
    pub async fn start_with(flags: &[&str]) -> TestMesh {
        TestMesh::build(Engine::start(), Vec::new(), flags).await
    }

    /// Starts a mesh on this store, with these flags of `hapa all`.
    pub async fn start_on(store: &Store, flags: &[&str]) -> TestMesh {
        let store = format!("--database-url={}", store.url());
        TestMesh::start_with(&[&[store.as_str()], flags].concat()).await
    }

    /// Starts a mesh on this store without usage events and occurrences.
    pub async fn start_unrecorded_on(store: &Store, flags: &[&str]) -> TestMesh {
        TestMesh::start_on(store, &[UNRECORDED, flags].concat()).await
    }

    /// Starts a mesh without usage events and occurrences.
    pub async fn start_unrecorded() -> TestMesh {
        TestMesh::start_with(UNRECORDED).await
    }

    /// Starts a mesh with an engine of this setup.
    pub async fn with_engine(setup: Setup) -> TestMesh {
        TestMesh::build(Engine::start_with(setup), Vec::new(), &[]).await
    }

    /// Starts a mesh with `count` equal engines and these flags of `hapa all`.
    pub async fn with_engines(count: usize, flags: &[&str]) -> TestMesh {
        let others = (1..count).map(|_| Engine::start()).collect();
        TestMesh::build(Engine::start(), others, flags).await
    }

    /// All engines.
    pub fn engines(&self) -> impl Iterator<Item = &Engine> {
        std::iter::once(&self.engine).chain(&self.others)
    }

    async fn build(engine: Engine, others: Vec<Engine>, flags: &[&str]) -> TestMesh {
        let urls: Vec<_> = std::iter::once(&engine).chain(&others).map(Engine::url).collect();
        let folder = tempfile::tempdir().expect("a folder for the test");
        let always = [
            "hapa",
            "--port=0",
            "--metrics-port=0",
            "--log-level=off",
            &format!("--data-dir={}", folder.path().display()),
            &format!("--mesh-token={TOKEN}"),
            &format!("--ai-model-endpoint={}", urls.join(",")),
            // Tests repeat requests and expect each to reach the engine. Tests of the cache enable it.
            "--cache-ttl=0",
        ]
        .map(str::to_owned);
        let has_no_incidents =
            flags.iter().any(|flag| WITHOUT_INCIDENTS.iter().any(|begin| flag.starts_with(begin)));
        let seen = (!has_no_incidents).then(IncidentTracker::default);
        let flags = always.into_iter().chain(flags.iter().map(|&flag| flag.to_owned()));
        let roles = roles(flags);
        let listeners = Listeners::bind(&roles.server).await.expect("free ports");
        let address = listeners.mesh.local_addr().expect("a bound port");
        let metrics = listeners.metrics.local_addr().expect("a bound port");
        let shutdown = CancellationToken::new();
        let mut running = JoinSet::new();
        let (exporter, traced) = traced(&roles.server);
        running.spawn(run(roles, listeners, exporter, shutdown.clone().cancelled_owned()));
        let endpoint = Endpoint::from_shared(format!("http://{address}")).expect("an address");
        let channel = endpoint.connect_lazy();
        let key = String::new();
        let mut mesh = TestMesh {
            engine,
            others,
            address,
            key,
            metrics,
            seen,
            folder,
            channel,
            shutdown,
            running,
            _traced: traced,
        };
        mesh.key = mesh.create_key(TestMesh::dev_key()).await.key_text;
        mesh
    }

    /// The default settings of the rate limiter.
    pub fn limits() -> LimitConfig {
        Settings::parse_from(["hapa"]).all.server.limits
    }

    /// A request for a key with every scope and no limits.
    pub fn dev_key() -> CreateKeyRequest {
        let scopes =
            ["codegen:generate", "codegen:complete", "auth:admin"].map(str::to_owned).to_vec();
        let unlimited = RateLimit { method: "*".to_owned(), limit: 0, window_seconds: 0 };
        CreateKeyRequest {
            name: "test".to_owned(),
            owner: "tester".to_owned(),
            scopes,
            rate_limits: vec![unlimited],
            ..CreateKeyRequest::default()
        }
    }

    /// A channel that calls with this identity.
    pub fn channel_as(&self, identity: Identity<'_>) -> TestChannel {
        self.watched(identity.on(self.channel.clone()))
    }

    fn watched(&self, wire: TestChannel) -> TestChannel {
        match &self.seen {
            Some(seen) => wire.seen_by(seen),
            None => wire,
        }
    }

    /// Adds an incident id that a client received outside a [`TestChannel`].
    pub fn track_incident(&self, incident_id: &str) {
        if let Some(seen) = &self.seen {
            seen.add(incident_id);
        }
    }

    /// Finds every incident id that clients received so far, and returns their number.
    pub async fn find_incidents(&self) -> usize {
        match &self.seen {
            Some(seen) => seen.find(self.channel.clone()).await,
            None => 0,
        }
    }

    /// Finds every incident id that clients received. A test with failed calls must end with it.
    pub async fn finish(self) {
        self.find_incidents().await;
    }

    /// A client of CodegenService with the mesh's key.
    pub fn client(&self) -> CodegenClient {
        self.client_with(&self.key)
    }

    /// A client of CodegenService with this key.
    pub fn client_with(&self, key: &str) -> CodegenClient {
        CodegenServiceClient::new(self.channel_as(Identity::Key(key)))
            .max_encoding_message_size(usize::MAX)
    }

    /// A client of CodegenService without a credential.
    pub fn anonymous(&self) -> CodegenClient {
        CodegenServiceClient::new(self.channel_as(Identity::Anonymous))
    }

    /// A client of KeyService with the mesh token.
    pub fn keys(&self) -> KeyClient {
        KeyServiceClient::new(self.channel_as(Identity::Mesh))
    }

    /// A client of KeyService with this key.
    pub fn keys_with(&self, key: &str) -> KeyClient {
        KeyServiceClient::new(self.channel_as(Identity::Key(key)))
    }

    /// Creates a key.
    pub async fn create_key(&self, request: CreateKeyRequest) -> CreateKeyResponse {
        let made = within("a key", async { self.keys().create_key(request).await }).await;
        made.expect("a key can be made").into_inner()
    }

    /// The mesh token, for calls that only services may make.
    pub fn mesh_token(&self) -> &'static str {
        TOKEN
    }

    /// A new connection.
    pub async fn connect(&self) -> Channel {
        let endpoint =
            Endpoint::from_shared(format!("http://{}", self.address)).expect("an address");
        within("a connection", endpoint.connect()).await.expect("the mesh listens")
    }

    /// A client of CodegenService with the mesh's key on a new connection: unread data of other streams
    /// does not reduce its HTTP/2 window.
    pub async fn client_with_own_connection(&self) -> CodegenClient {
        let wire = Identity::Key(&self.key).on(self.connect().await);
        CodegenServiceClient::new(self.watched(wire))
    }

    /// DATA_DIR, with the embedded stores.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Starts Envoy in front of this mesh, with these CORS origins.
    pub async fn gateway(&self, origins: &[&str]) -> Gateway {
        self.gateway_with(&[("CORS_ORIGINS", origins.join(",").as_str())]).await
    }

    /// Starts Envoy in front of this mesh, with these settings of `hapa gateway`.
    pub async fn gateway_with(&self, settings: &[(&str, &str)]) -> Gateway {
        Gateway::start(self.address, settings, self.seen.clone()).await
    }

    /// Status and text of a page of the metrics port.
    pub async fn page(&self, path: &str) -> (u16, String) {
        let url = format!("http://{}{path}", self.metrics);
        let reply = within(path, reqwest_client().get(url).send()).await.expect("the port listens");
        let status = reply.status().as_u16();
        (status, within(path, reply.text()).await.expect("text"))
    }

    /// The present metrics.
    pub async fn metrics(&self) -> Metrics {
        Metrics(self.page("/metrics").await.1)
    }

    /// Starts the drain, as SIGTERM does.
    pub fn begin_shutdown(&self) {
        self.shutdown.cancel();
    }

    /// Waits until the mesh has stopped.
    pub async fn wait_until_stopped(&mut self) {
        let done = within("the mesh to stop", self.running.join_next()).await;
        done.expect("it ran").expect("it did not panic").expect("it stopped cleanly");
    }
}

/// Fails a test that did not look up the incident ids of its failed calls. A stopped mesh answers no lookups;
/// the tests of the outbox cover its deliveries.
impl Drop for TestMesh {
    fn drop(&mut self) {
        let left = self.seen.as_ref().is_some_and(|seen| !seen.is_empty());
        let is_excused = self.shutdown.is_cancelled() || std::thread::panicking();
        assert!(!left || is_excused, "calls failed: end the test with `mesh.finish().await`");
    }
}

/// A plain HTTP client.
/// An HTTP client, also in a process that has no server yet.
pub fn reqwest_client() -> reqwest::Client {
    // This fails if a mesh in this process has already installed the same provider.
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder().no_proxy().build().expect("a client")
}

/// With a single dispatcher, `tracing` caches the interest of the first thread that reaches a span, for all
/// threads. Most threads have no dispatcher, so a second one is needed.
static SECOND_DISPATCH: LazyLock<Dispatch> = LazyLock::new(|| Dispatch::new(NoSubscriber::new()));

/// Enables spans until the guard is dropped, if a collector is configured. A test runs on one thread, so
/// spans of other tests are not sent there.
fn traced(config: &Config) -> (Option<SpanExporter>, Option<DefaultGuard>) {
    if config.trace.otel_exporter_otlp_endpoint.is_none() {
        return (None, None);
    }
    LazyLock::force(&SECOND_DISPATCH);
    let (tracer, exporter) =
        otlp_exporter::tracer_and_exporter(&config.trace).expect("settings of traces").unzip();
    let dispatch = logging::prepare(&config.log, tracer).expect("settings of the log");
    (exporter, Some(dispatcher::set_default(&dispatch)))
}
