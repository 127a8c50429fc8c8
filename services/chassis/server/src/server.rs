//! What services are mounted on, and the life of a process: ready, serving, draining, gone.
//!
//! The drain is bounded by us and not by the slowest peer: not ready, door closed, streams told,
//! and at the end of DRAIN_TIMEOUT_SECONDS every connection is dropped.

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::Context as _;
use hapa_core::access::{BUILT_IN, Table};
use hapa_core::config::Wrong;
use hapa_core::health_check::HealthCheck;
use hapa_core::secret;
use hapa_core::service::{ServiceSpec, Shutdown};
use hapa_store::rate_limit::Limiter;
use hapa_telemetry::{recorder, scheduler_lag};
use hapa_transport::otlp_exporter::Exporter;
use hapa_transport::peer::{self, AnalyticsClient, AuthClient, ErrorsClient, Proof, Wire};
use hapa_transport::tls::Tls;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::service::RoutesBuilder;

use crate::accept::{self, Door, accept};
use crate::auth::principal_cache::Callers;
use crate::config::Config;
use crate::health::{Checks, Health};
use crate::middleware::admission::Admission;
use crate::middleware::public_calls::PublicCalls;
use crate::middleware::{Shared, stack};
use crate::outbox::{Bounds, Receiver, Receivers, Spool};
use crate::probes;

/// How long background tasks may take to notice the end.
const TASKS_PATIENCE: Duration = Duration::from_secs(2);
/// How long saying that nothing serves may take.
const TELLING: Duration = Duration::from_secs(1);
/// The check of what replicas count calls in.
pub(crate) const REDIS: &str = "redis";

/// Sockets that are bound already, so that callers choose the port and learn it.
#[derive(Debug)]
pub struct Listeners {
    /// gRPC.
    pub mesh: TcpListener,
    /// Metrics and probes.
    pub metrics: TcpListener,
}

impl Listeners {
    /// Binds both, and names the setting of one that can't be bound.
    pub async fn bind(config: &Config) -> Result<Self, Wrong> {
        let bind = async |name, address: SocketAddr| {
            let taken = |error| Wrong::new(name, format!("can't listen on {address}: {error}"));
            TcpListener::bind(address).await.map_err(taken)
        };
        let mesh = bind("PORT", config.address()).await?;
        let metrics = bind("METRICS_PORT", config.metrics_address()).await?;
        Ok(Listeners { mesh, metrics })
    }
}

/// A server under construction.
pub struct Server {
    config: Config,
    listeners: Listeners,
    proof: Proof,
    routes: RoutesBuilder,
    table: Table,
    checks: Checks,
    names: Vec<&'static str>,
    tasks: TaskTracker,
    tasks_end: CancellationToken,
    shutdown: Shutdown,
    /// Fires when open connections are dropped.
    force_close: CancellationToken,
    spool: Spool,
    callers: Arc<OnceLock<Callers>>,
    exporter: Option<Exporter>,
}

impl Server {
    /// A server with health and reflection, and nothing else yet.
    pub async fn new(config: Config, listeners: Listeners) -> anyhow::Result<Self> {
        config.check()?;
        recorder::metrics()?;
        let proof = proof(&config)?;
        let (reporter, health_service) = tonic_health::server::health_reporter();
        let mut server = Server {
            config,
            listeners,
            proof,
            routes: RoutesBuilder::default(),
            table: Table::default(),
            checks: Checks::new(reporter).await,
            names: Vec::new(),
            tasks: TaskTracker::new(),
            tasks_end: CancellationToken::new(),
            shutdown: Shutdown::default(),
            force_close: CancellationToken::new(),
            spool: Spool::default(),
            callers: Arc::default(),
            exporter: None,
        };
        server.table.add(BUILT_IN);
        server.routes.add_service(health_service);
        if server.config.reflects() {
            server.add_reflection()?;
        }
        Ok(server)
    }

    /// Its settings.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Takes over what sends the process's spans to a collector.
    pub fn exports(&mut self, exporter: Exporter) {
        self.exporter = Some(exporter);
    }

    /// The moments of the shutdown that streams wait for.
    pub fn shutdown(&self) -> Shutdown {
        self.shutdown.clone()
    }

    /// A client of the auth service, which may be in this process.
    pub fn auth(&self) -> anyhow::Result<AuthClient> {
        let address = self.config.auth_address.as_deref();
        let wire = self.wire("AUTH_ADDRESS", address, "hapa.auth.v1.AuthService")?;
        let words = "this role needs the address of auth";
        Ok(AuthClient::new(wire.ok_or_else(|| Wrong::new("AUTH_ADDRESS", words))?))
    }

    /// A connection of its own to a service, as a service: to the address that `setting` gives, else
    /// to this process where it has the service; none where nobody is known to have it.
    pub fn wire(
        &self,
        setting: &'static str,
        address: Option<&str>,
        service: &str,
    ) -> anyhow::Result<Option<Wire>> {
        Ok(self.wire_to(setting, address, service)?.map(|(wire, _)| wire))
    }

    /// The same, and whether it is this process.
    fn wire_to(
        &self,
        setting: &'static str,
        address: Option<&str>,
        service: &str,
    ) -> anyhow::Result<Option<(Wire, bool)>> {
        let Some((address, own)) = self.reach(address, service)? else { return Ok(None) };
        // Itself by all that it is: the name of its own address stands in no certificate.
        let roles = match &self.proof {
            Proof::Certificates(tls) if own => tls.roles(),
            _ => service.split('.').nth(1).into_iter().collect(),
        };
        let (wire, balanced) = peer::proving(&address, &self.proof, &roles).context(setting)?;
        if !own {
            self.spawn(balanced.follow());
        }
        Ok(Some((wire, own)))
    }

    /// What is known of the health of this process and of what it stands on.
    pub fn health(&self) -> Health {
        self.checks.health()
    }

    /// Adds a check, which runs every few seconds from before the server serves until it drains.
    pub fn check(&mut self, check: HealthCheck) {
        self.checks.add(check);
    }

    /// What is remembered of calls, for health; it opens when the server serves.
    pub fn spool(&self) -> Spool {
        self.spool.clone()
    }

    /// What is known of callers; there from when the server serves.
    pub fn callers(&self) -> Arc<OnceLock<Callers>> {
        self.callers.clone()
    }

    /// Where a service is, and whether that is this process; none where nobody said.
    fn reach(&self, set: Option<&str>, service: &str) -> anyhow::Result<Option<(String, bool)>> {
        Ok(match set.filter(|address| !address.is_empty()) {
            Some(address) => Some((address.to_owned(), false)),
            None if self.names.contains(&service) => Some((
                format!(
                    "{}://{}",
                    self.scheme(),
                    peer::dialable(self.listeners.mesh.local_addr()?)
                ),
                true,
            )),
            None => None,
        })
    }

    fn scheme(&self) -> &'static str {
        if let Proof::Certificates(_) = self.proof { "https" } else { "http" }
    }

    /// Adds the gRPC services, access rules and checks of a service, and starts its tasks.
    pub async fn mount(&mut self, spec: ServiceSpec) {
        for route in spec.routes {
            self.checks.add_service(route.name, !route.is_auxiliary).await;
            self.names.push(route.name);
            self.table.add(route.rpcs);
            (route.mount)(&mut self.routes);
        }
        for check in spec.checks {
            self.check(check);
        }
        for task in spec.tasks {
            self.tasks.spawn(task(self.tasks_end.clone()));
        }
    }

    /// Runs a background task until the server ends; it is dropped at an await of its own.
    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let end = self.tasks_end.clone();
        self.tasks.spawn(async move {
            tokio::select! {
                () = task => {}
                () = end.cancelled() => {}
            }
        });
    }

    /// Runs a background task that ends by itself, within 2 s of its token.
    pub fn spawn_to_end<F: Future<Output = ()> + Send + 'static>(
        &self,
        task: impl FnOnce(CancellationToken) -> F,
    ) {
        self.tasks.spawn(task(self.tasks_end.clone()));
    }

    /// Serves until `shutdown`, then drains; returns when all is over.
    pub async fn serve(mut self, shutdown: impl Future<Output = ()>) -> anyhow::Result<()> {
        let address = self.listeners.mesh.local_addr()?;
        let metrics_address = self.listeners.metrics.local_addr()?;
        self.open_spool().await?;
        self.export();
        let shared = Arc::new(self.shared()?);
        let limiter = Arc::clone(&shared.admission.limiter);
        self.check_redis(&limiter);
        self.watch_certificates();
        self.spawn(scheduler_lag::watch());
        // Before the first call, so that nobody is told what nobody has looked at.
        self.checks.round().await;
        let router = stack(self.routes.routes().into_axum_router().with_state(()), &shared);
        let calls = TaskTracker::new();
        let door = Door { closing: self.shutdown.stop_accepting.clone(), closed: self.force_close };
        let (draining, config) = (CancellationToken::new(), &self.config);
        let probes = probes::serve(
            self.listeners.metrics,
            recorder::metrics()?,
            (limiter, self.checks.health()),
            draining.clone(),
            self.tasks_end.clone(),
        );
        self.tasks.spawn(probes);
        let bounds = accept::Bounds::of(config);
        let tls = self.proof.tls();
        let mesh = accept::Socket { listener: self.listeners.mesh, tls };
        let accepting = accept(mesh, router, bounds, door.clone(), calls.clone());
        calls.spawn(accepting);
        self.checks.tell().await;
        tracing::info!(%address, %metrics_address, "serving");
        let health = self.tasks.spawn(self.checks.watch(draining.clone()));
        self.spool.tell();

        shutdown.await;
        tracing::info!("draining");
        draining.cancel();
        if timeout(TELLING, health).await.is_err() {
            tracing::warn!("health was not told to the end");
        }
        tokio::time::sleep(config.drain_delay_seconds).await;
        drain(&door, &calls, &self.shutdown.end_streams, config.drain_timeout_seconds).await;
        self.tasks.close();
        self.tasks_end.cancel();
        if timeout(TASKS_PATIENCE, self.tasks.wait()).await.is_err() {
            tracing::warn!("a background task did not end");
        }
        tracing::info!("stopped");
        Ok(())
    }

    fn shared(&self) -> anyhow::Result<Shared> {
        let config = &self.config;
        let known = Callers::new(self.auth()?);
        let callers = self.callers.get_or_init(|| known).clone();
        // On a connection of its own: news must not wait behind questions.
        self.spawn(callers.clone().watch(self.auth()?));
        self.spawn(callers.clone().count_silence());
        self.spawn(callers.clone().expire());
        self.spawn(callers.clone().follow());
        let limiter = Limiter::for_roles(&config.limits, config.common.redis_url(), &self.roles())?;
        let limiter = Arc::new(limiter);
        let proof = self.proof.clone();
        Ok(Shared {
            table: self.table.clone(),
            request_timeout: config.request_timeout,
            trusted_proxies: config.trusted_proxies.clone(),
            in_flight: Arc::new(Semaphore::new(config.max_in_flight as usize)),
            public_calls: PublicCalls::new(config.max_public_calls, &config.trusted_proxies),
            request_memory: Arc::new(Semaphore::new(config.max_request_memory())),
            admission: Admission::new(proof, callers, limiter, &config.limits),
            spool: self.spool.clone(),
            slow: Some(config.log.slow_request_seconds).filter(|slow| !slow.is_zero()),
        })
    }

    fn watch_certificates(&mut self) {
        if let Some(tls) = self.proof.tls() {
            self.check(tls.check());
            self.spawn(tls.watch());
        }
    }

    /// Asks Redis too, where there is one: an outage ends without a call that is limited.
    fn check_redis(&mut self, limiter: &Arc<Limiter>) {
        if !matches!(**limiter, Limiter::Redis(_)) {
            return;
        }
        let limiter = Arc::clone(limiter);
        let probe = move || {
            let limiter = Arc::clone(&limiter);
            async move { limiter.probe().await.unwrap_or(Ok(())) }
        };
        self.check(HealthCheck::new(REDIS, "Redis does not answer", probe));
    }

    /// Opens the file of events, where there is anyone to deliver them to.
    async fn open_spool(&mut self) -> anyhow::Result<()> {
        let config = &self.config;
        let mut receivers = Receivers::default();
        let address = config.analytics_address.as_deref();
        let analytics =
            self.wire_to("ANALYTICS_ADDRESS", address, "hapa.analytics.v1.AnalyticsService")?;
        if let Some((wire, own)) = analytics.filter(|_| config.spool.usage_recording_enabled) {
            receivers.analytics = Some(Receiver { client: AnalyticsClient::new(wire), own });
        }
        let address = config.errors_address.as_deref();
        let errors =
            self.wire_to("ERRORS_ADDRESS", address, "hapa.errors.v1.ErrorTrackingService")?;
        if let Some((wire, own)) = errors.filter(|_| config.spool.error_monitoring_enabled) {
            receivers.errors = Some(Receiver { client: ErrorsClient::new(wire), own });
        }
        if receivers.analytics.is_none() && receivers.errors.is_none() {
            return Ok(());
        }
        let oldest = Duration::from_hours(config.spool.spool_max_age_hours.into());
        let bounds = Bounds { most: config.spool.spool_max_events, oldest };
        let path = config.common.data_dir.join(format!("spool-{}.db", self.spool_name()));
        let work = self.spool.open(path, bounds, receivers).await?;
        work.run(|task| drop(self.tasks.spawn(task)), &self.tasks_end);
        let spool = self.spool.clone();
        let full = move || {
            let problem = spool.problem();
            async move { problem.map_or(Ok(()), |words| Err(words.to_owned())) }
        };
        self.check(HealthCheck::new("spool", "events of calls are dropped (E5010)", full));
        Ok(())
    }

    /// A name that stays from start to start: the port, or the roles where any port will do.
    fn spool_name(&self) -> String {
        if self.config.port != 0 {
            return self.config.port.to_string();
        }
        self.roles().join("-")
    }

    fn roles(&self) -> Vec<&'static str> {
        let mut roles: Vec<_> =
            self.names.iter().filter_map(|name| name.split('.').nth(1)).collect();
        roles.dedup();
        roles
    }

    /// Sends spans to the collector from now on, where there is one.
    fn export(&mut self) {
        let Some(exporter) = self.exporter.take() else { return };
        let roles = self.roles();
        self.spawn_to_end(|end| exporter.run(roles, end));
    }

    fn add_reflection(&mut self) -> anyhow::Result<()> {
        let builder = || {
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(hapa_proto::FILE_DESCRIPTOR_SET)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        };
        // Both versions: grpcurl before 1.9 asks for v1alpha only.
        self.routes.add_service(builder().build_v1()?);
        self.routes.add_service(builder().build_v1alpha()?);
        Ok(())
    }
}

/// Certificates where they are set, else the mesh token, which is made where there is none.
fn proof(config: &Config) -> anyhow::Result<Proof> {
    if let Some(tls) = Tls::of(&config.tls)? {
        return Ok(Proof::Certificates(tls));
    }
    let file = config.common.data_dir.join(secret::MESH_TOKEN_FILE);
    let token = secret::set_or_kept(config.mesh_token.as_ref(), &file)?;
    let strength = config.common.secret_strength();
    let also = secret::set("MESH_TOKEN_ALSO", config.mesh_token_also.as_ref(), strength)?;
    Ok(Proof::Token(token, also.cloned()))
}

/// Lets open calls finish, tells streams when time runs short, and drops what is left.
async fn drain(door: &Door, calls: &TaskTracker, streams_end: &CancellationToken, bound: Duration) {
    door.closing.cancel();
    calls.close();
    let telling = bound.saturating_sub(Duration::from_secs(5)).max(bound / 2);
    if timeout(telling, calls.wait()).await.is_err() {
        tracing::info!(open_calls = calls.len(), "telling open streams to end");
        streams_end.cancel();
        if timeout(bound.saturating_sub(telling), calls.wait()).await.is_err() {
            tracing::warn!(open_calls = calls.len(), "dropping what is still open");
        }
    }
    door.closed.cancel();
}
