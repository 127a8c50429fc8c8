//! One test's world: a whole mesh in this process, on ports of its own, with an engine that does as
//! it is told. Dropping it ends everything.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::LazyLock;

use clap::{CommandFactory as _, FromArgMatches as _, Parser};
use hapa::setting::settings;
use hapa::{AllRolesArgs, Roles, run};
use hapa_proto::auth::v1::key_service_client::KeyServiceClient;
use hapa_proto::auth::v1::{CreateKeyRequest, CreateKeyResponse, RateLimit};
use hapa_proto::codegen::v1::codegen_service_client::CodegenServiceClient;
use hapa_server::{Config, Listeners};
use hapa_store::rate_limit::LimitConfig;
use hapa_telemetry::logging;
use hapa_transport::otlp_exporter::{self, Exporter};
use tempfile::TempDir;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};
use tracing::dispatcher::{self, DefaultGuard, Dispatch};
use tracing::subscriber::NoSubscriber;

use crate::engine::{Engine, Setup};
use crate::gateway::Gateway;
use crate::people::Who;
use crate::postgres::Store;
use crate::seen::{Seen, Wire};
use crate::tools::{Metrics, within};

/// The secret that services of every test's mesh share.
pub const TOKEN: &str = "the-mesh-token-of-a-test-which-is-long";

/// Nothing is remembered of calls.
const QUIET: &[&str] = &["--usage-recording-enabled=false", "--error-monitoring-enabled=false"];

/// With such flags failures are remembered nowhere, or elsewhere.
const FORGETFUL: &[&str] =
    &["--error-monitoring-enabled=false", "--incident-tracking-enabled=false", "--errors-address"];

/// A client of code generation.
pub type Client = CodegenServiceClient<Wire>;
/// A client of keys.
pub type Keys = KeyServiceClient<Wire>;

/// The settings of `hapa all`, read as the binary reads them.
#[derive(Parser)]
#[command(args_override_self = true)]
struct Settings {
    #[command(flatten)]
    all: AllRolesArgs,
}

/// Every role, by such arguments.
pub(crate) fn roles(arguments: impl IntoIterator<Item = String>) -> Roles {
    let command = Settings::command();
    let matches = command.clone().get_matches_from(arguments);
    let all = Settings::from_arg_matches(&matches).expect("settings").all;
    Roles { settings: settings(&command, &matches), ..Roles::from(all) }
}

/// See the module.
#[derive(Debug)]
pub struct World {
    /// The engine behind code generation, the first where there are several.
    pub engine: Engine,
    /// The further ones.
    pub others: Vec<Engine>,
    /// The mesh's gRPC port.
    pub mesh: SocketAddr,
    /// A key with every scope and no limits.
    pub key: String,
    metrics: SocketAddr,
    /// What clients were shown; none where the mesh remembers no failures.
    seen: Option<Seen>,
    folder: TempDir,
    channel: Channel,
    shutdown: CancellationToken,
    running: JoinSet<anyhow::Result<()>>,
    /// Where spans are made, as long as it lives.
    _traced: Option<DefaultGuard>,
}

impl World {
    /// With the settings that a newcomer has, but for the cache of answers, which is off.
    pub async fn start() -> World {
        World::with(&[]).await
    }

    /// With these flags of `hapa all`.
    pub async fn with(flags: &[&str]) -> World {
        World::build(Engine::start(), Vec::new(), flags).await
    }

    /// On this store, with these flags of `hapa all`.
    pub async fn on(store: &Store, flags: &[&str]) -> World {
        let store = format!("--database-url={}", store.url());
        World::with(&[&[store.as_str()], flags].concat()).await
    }

    /// With this store, and nothing in it of the calls that the world itself makes.
    pub async fn aside(store: &Store, flags: &[&str]) -> World {
        World::on(store, &[QUIET, flags].concat()).await
    }

    /// The same on a file of its own.
    pub async fn quiet() -> World {
        World::with(QUIET).await
    }

    /// With an engine that serves something else.
    pub async fn with_engine(setup: Setup) -> World {
        World::build(Engine::start_with(setup), Vec::new(), &[]).await
    }

    /// With so many engines, which serve the same, and these flags of `hapa all`.
    pub async fn with_engines(count: usize, flags: &[&str]) -> World {
        let others = (1..count).map(|_| Engine::start()).collect();
        World::build(Engine::start(), others, flags).await
    }

    /// All engines.
    pub fn engines(&self) -> impl Iterator<Item = &Engine> {
        std::iter::once(&self.engine).chain(&self.others)
    }

    async fn build(engine: Engine, others: Vec<Engine>, flags: &[&str]) -> World {
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
            // Tests ask the same again and again, and mean the engine: `cache.rs` turns it on.
            "--cache-ttl=0",
        ]
        .map(str::to_owned);
        let forgets =
            flags.iter().any(|flag| FORGETFUL.iter().any(|begin| flag.starts_with(begin)));
        let seen = (!forgets).then(Seen::default);
        let flags = always.into_iter().chain(flags.iter().map(|&flag| flag.to_owned()));
        let roles = roles(flags);
        let listeners = Listeners::bind(&roles.server).await.expect("free ports");
        let mesh = listeners.mesh.local_addr().expect("a bound port");
        let metrics = listeners.metrics.local_addr().expect("a bound port");
        let shutdown = CancellationToken::new();
        let mut running = JoinSet::new();
        let (exporter, traced) = traced(&roles.server);
        running.spawn(run(roles, listeners, exporter, shutdown.clone().cancelled_owned()));
        let endpoint = Endpoint::from_shared(format!("http://{mesh}")).expect("an address");
        let channel = endpoint.connect_lazy();
        let key = String::new();
        let mut world = World {
            engine,
            others,
            mesh,
            key,
            metrics,
            seen,
            folder,
            channel,
            shutdown,
            running,
            _traced: traced,
        };
        world.key = world.create_key(World::dev_key()).await.key_text;
        world
    }

    /// The settings of the limiter that a newcomer has.
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

    /// A channel on which someone calls.
    pub fn wire(&self, who: Who<'_>) -> Wire {
        self.watched(who.on(self.channel.clone()))
    }

    fn watched(&self, wire: Wire) -> Wire {
        match &self.seen {
            Some(seen) => wire.seen_by(seen),
            None => wire,
        }
    }

    /// Notes that a client was shown this, on a way that is not a [`Wire`].
    pub fn was_shown(&self, incident_id: &str) {
        if let Some(seen) = &self.seen {
            seen.add(incident_id);
        }
    }

    /// Looks up every failure that clients were shown so far; says how many there were.
    pub async fn find_incidents(&self) -> usize {
        match &self.seen {
            Some(seen) => seen.find(self.channel.clone()).await,
            None => 0,
        }
    }

    /// The end of a story, which one that was shown failures must not leave out: every failure that its clients were shown can be looked up.
    pub async fn end(self) {
        self.find_incidents().await;
    }

    /// Code generation, with the world's key.
    pub fn client(&self) -> Client {
        self.client_with(&self.key)
    }

    /// Code generation, with this key.
    pub fn client_with(&self, key: &str) -> Client {
        CodegenServiceClient::new(self.wire(Who::Key(key))).max_encoding_message_size(usize::MAX)
    }

    /// Code generation, without any credential.
    pub fn anonymous(&self) -> Client {
        CodegenServiceClient::new(self.wire(Who::Stranger))
    }

    /// Keys, as a service of the mesh.
    pub fn keys(&self) -> Keys {
        KeyServiceClient::new(self.wire(Who::Mesh))
    }

    /// Keys, with this key.
    pub fn keys_with(&self, key: &str) -> Keys {
        KeyServiceClient::new(self.wire(Who::Key(key)))
    }

    /// Makes a key.
    pub async fn create_key(&self, request: CreateKeyRequest) -> CreateKeyResponse {
        let made = within("a key", async { self.keys().create_key(request).await }).await;
        made.expect("a key can be made").into_inner()
    }

    /// The mesh's secret, for calls that only services may make.
    pub fn mesh_token(&self) -> &'static str {
        TOKEN
    }

    /// A connection of its own, for calls that speak the wire by hand.
    pub async fn connect(&self) -> Channel {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.mesh)).expect("an address");
        within("a connection", endpoint.connect()).await.expect("the mesh listens")
    }

    /// Code generation with the world's key, on a connection of its own: what another does not read
    /// takes none of its window.
    pub async fn client_on_its_own(&self) -> Client {
        let wire = Who::Key(&self.key).on(self.connect().await);
        CodegenServiceClient::new(self.watched(wire))
    }

    /// Where the embedded stores are.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// A real Envoy in front of this mesh, open to pages of these origins.
    pub async fn gateway(&self, origins: &[&str]) -> Gateway {
        self.gateway_with(&[("CORS_ORIGINS", origins.join(",").as_str())]).await
    }

    /// The same with these settings of `hapa gateway`.
    pub async fn gateway_with(&self, settings: &[(&str, &str)]) -> Gateway {
        Gateway::start(self.mesh, settings, self.seen.clone()).await
    }

    /// One page of the metrics port: its status and text.
    pub async fn page(&self, path: &str) -> (u16, String) {
        let url = format!("http://{}{path}", self.metrics);
        let reply = within(path, reqwest_client().get(url).send()).await.expect("the port listens");
        let status = reply.status().as_u16();
        (status, within(path, reply.text()).await.expect("text"))
    }

    /// What is counted now.
    pub async fn metrics(&self) -> Metrics {
        Metrics(self.page("/metrics").await.1)
    }

    /// Asks the mesh to stop, as a signal would.
    pub fn begin_shutdown(&self) {
        self.shutdown.cancel();
    }

    /// Waits until the mesh has stopped by itself.
    pub async fn ended(&mut self) {
        let done = within("the mesh to stop", self.running.join_next()).await;
        done.expect("it ran").expect("it did not panic").expect("it stopped cleanly");
    }
}

/// No story forgets to look up what it was shown. A mesh that was told to stop answers nobody: what its
/// clients were shown is in its spool, as `spool.rs` and `spool_killed.rs` hold it to.
impl Drop for World {
    fn drop(&mut self) {
        let left = self.seen.as_ref().is_some_and(|seen| !seen.is_empty());
        let excused = self.shutdown.is_cancelled() || std::thread::panicking();
        assert!(!left || excused, "failures were shown: end the story with `world.end().await`");
    }
}

/// A plain HTTP client.
pub(crate) fn reqwest_client() -> reqwest::Client {
    // It fails where a mesh in this process installed it first: it is the same one.
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder().no_proxy().build().expect("a client")
}

/// While there is one dispatcher alone, `tracing` takes the word of whichever thread meets a span first,
/// for all of them: and most threads have none.
static ANOTHER: LazyLock<Dispatch> = LazyLock::new(|| Dispatch::new(NoSubscriber::new()));

/// Makes spans as long as the guard lives, where a collector is named. One thread runs all of a test, so
/// that no other test's spans are sent there.
fn traced(config: &Config) -> (Option<Exporter>, Option<DefaultGuard>) {
    if config.trace.otel_exporter_otlp_endpoint.is_none() {
        return (None, None);
    }
    LazyLock::force(&ANOTHER);
    let (tracer, exporter) =
        otlp_exporter::collect(&config.trace).expect("settings of traces").unzip();
    let dispatch = logging::prepare(&config.log, tracer).expect("settings of the log");
    (exporter, Some(dispatcher::set_default(&dispatch)))
}
