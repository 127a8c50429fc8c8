//! The server: services are mounted on it, and it runs through start, serving and drain.
//!
//! The drain has a maximum duration, whatever the peers do: report NOT_SERVING, close the listener, ask streams to
//! end, and after DRAIN_TIMEOUT_SECONDS close every connection.

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::Context as _;
use hapa_core::access::{AccessTable, BUILT_IN_RPCS};
use hapa_core::config::ConfigError;
use hapa_core::health_check::HealthCheck;
use hapa_core::secret;
use hapa_core::service::{ServiceSpec, Shutdown};
use hapa_telemetry::{recorder, scheduler_lag};
use hapa_transport::otlp_exporter::SpanExporter;
use hapa_transport::peer::{
    self, AnalyticsClient, AuthClient, ErrorsClient, PeerChannel, ServiceAuth,
};
use hapa_transport::tls::Tls;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::service::RoutesBuilder;

use crate::accept::{ConnectionLimits, Drain, MaxConnectionAge, Socket, accept};
use crate::auth::principal_cache::PrincipalCache;
use crate::config::Config;
use crate::health::{Health, HealthChecks, REDIS};
use crate::middleware::LayeredServices;
use crate::middleware::admission::Admission;
use crate::middleware::public_calls::PublicCalls;
use crate::middleware::shared::SharedState;
use crate::outbox::{Outbox, Receiver, Receivers};
use crate::rate_limit::Limiter;
use crate::workers::Workers;
use crate::{file_descriptors, probes};

/// Maximum time for background tasks to end.
const TASK_SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(2);
/// Maximum time for reporting NOT_SERVING.
const HEALTH_REPORT_TIMEOUT: Duration = Duration::from_secs(1);
/// How long before the end of the drain open streams are asked to end, but at most half of the drain.
const STREAM_END_PERIOD: Duration = Duration::from_secs(5);

/// The bound sockets of a server. They are bound before it is built, so that the ports are known.
#[derive(Debug)]
pub struct Listeners {
    /// The gRPC port.
    pub mesh: TcpListener,
    /// The port of metrics and probes.
    pub metrics: TcpListener,
}

impl Listeners {
    /// Binds both sockets. The error names the setting of the one that can't be bound.
    pub async fn bind(config: &Config) -> Result<Self, ConfigError> {
        let bind = async |name, address: SocketAddr| {
            let failed =
                |error| ConfigError::new(name, format!("can't listen on {address}: {error}"));
            TcpListener::bind(address).await.map_err(failed)
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
    proof: ServiceAuth,
    routes: RoutesBuilder,
    table: AccessTable,
    checks: HealthChecks,
    service_names: Vec<&'static str>,
    tasks: TaskTracker,
    tasks_end: CancellationToken,
    shutdown: Shutdown,
    /// Fires when open connections are closed.
    force_close: CancellationToken,
    outbox: Outbox,
    principal_cache: Arc<OnceLock<PrincipalCache>>,
    exporter: Option<SpanExporter>,
}

impl Server {
    /// A server with health and reflection, and without other services.
    pub async fn new(config: Config, listeners: Listeners) -> anyhow::Result<Self> {
        config.check()?;
        recorder::metrics()?;
        let proof = service_auth(&config)?;
        let (reporter, health_service) = tonic_health::server::health_reporter();
        let mut server = Server {
            config,
            listeners,
            proof,
            routes: RoutesBuilder::default(),
            table: AccessTable::default(),
            checks: HealthChecks::new(reporter).await,
            service_names: Vec::new(),
            tasks: TaskTracker::new(),
            tasks_end: CancellationToken::new(),
            shutdown: Shutdown::default(),
            force_close: CancellationToken::new(),
            outbox: Outbox::default(),
            principal_cache: Arc::default(),
            exporter: None,
        };
        server.table.add(BUILT_IN_RPCS);
        server.routes.add_service(health_service);
        if server.config.reflects() {
            server.add_reflection()?;
        }
        Ok(server)
    }

    /// The settings of the server.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Sets the exporter that sends the spans of the process to a collector.
    pub fn set_exporter(&mut self, exporter: SpanExporter) {
        self.exporter = Some(exporter);
    }

    /// The events of the shutdown that streams wait for.
    pub fn shutdown(&self) -> Shutdown {
        self.shutdown.clone()
    }

    /// A client of the auth service, which may be in this process.
    pub fn auth_client(&self) -> anyhow::Result<AuthClient> {
        let address = self.config.auth_address.as_deref();
        let channel = self.peer_channel("AUTH_ADDRESS", address, "hapa.auth.v1.AuthService")?;
        let problem = "must be set: this role needs the auth service";
        Ok(AuthClient::new(channel.ok_or_else(|| ConfigError::new("AUTH_ADDRESS", problem))?))
    }

    /// A separate channel to a service, authenticated as a service. It goes to `address`, which `setting` names, or to
    /// this process if it has the service. `None`: the service has no known address.
    pub fn peer_channel(
        &self,
        setting: &'static str,
        address: Option<&str>,
        service: &str,
    ) -> anyhow::Result<Option<PeerChannel>> {
        Ok(self.open_channel(setting, address, service)?.map(|(channel, _)| channel))
    }

    /// The same, and whether the channel goes to this process.
    fn open_channel(
        &self,
        setting: &'static str,
        address: Option<&str>,
        service: &str,
    ) -> anyhow::Result<Option<(PeerChannel, bool)>> {
        let Some((address, is_own)) = self.locate(address, service)? else { return Ok(None) };
        // Verified by its roles, because the certificate does not contain its own address.
        let roles = match &self.proof {
            ServiceAuth::Certificates(tls) if is_own => tls.roles(),
            _ => service.split('.').nth(1).into_iter().collect(),
        };
        let (channel, balanced) =
            peer::authenticated_channel(&address, &self.proof, &roles).context(setting)?;
        if !is_own {
            self.spawn(balanced.refresh_addresses());
        }
        Ok(Some((channel, is_own)))
    }

    /// The health of this process and of its dependencies.
    pub fn health(&self) -> Health {
        self.checks.health()
    }

    /// Adds a check, which runs every 3 s from before the server serves until it drains.
    pub fn check(&mut self, check: HealthCheck) {
        self.checks.add(check);
    }

    /// The outbox, which is opened when the server serves.
    pub fn outbox(&self) -> Outbox {
        self.outbox.clone()
    }

    /// The principal cache, which exists from when the server serves.
    pub fn principal_cache(&self) -> Arc<OnceLock<PrincipalCache>> {
        Arc::clone(&self.principal_cache)
    }

    /// The address of a service, and whether it is this process. `None`: no address is known.
    fn locate(
        &self,
        address: Option<&str>,
        service: &str,
    ) -> anyhow::Result<Option<(String, bool)>> {
        Ok(match address.filter(|address| !address.is_empty()) {
            Some(address) => Some((address.to_owned(), false)),
            None if self.service_names.contains(&service) => Some((
                format!(
                    "{}://{}",
                    self.scheme(),
                    peer::loopback_if_unspecified(self.listeners.mesh.local_addr()?)
                ),
                true,
            )),
            None => None,
        })
    }

    fn scheme(&self) -> &'static str {
        if let ServiceAuth::Certificates(_) = self.proof { "https" } else { "http" }
    }

    /// Adds the gRPC services, access rules and checks of a service, and starts its tasks.
    pub async fn mount(&mut self, spec: ServiceSpec) {
        for route in spec.routes {
            self.checks.add_service(route.name, !route.is_auxiliary).await;
            self.service_names.push(route.name);
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

    /// Runs a background task until the server ends, which drops the task at its current await.
    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let end = self.tasks_end.clone();
        self.tasks.spawn(async move {
            tokio::select! {
                () = task => {}
                () = end.cancelled() => {}
            }
        });
    }

    /// Runs a background task that ends by itself within 2 s after its token fires.
    pub fn spawn_until<F: Future<Output = ()> + Send + 'static>(
        &self,
        task: impl FnOnce(CancellationToken) -> F,
    ) {
        self.tasks.spawn(task(self.tasks_end.clone()));
    }

    /// Serves until `shutdown`, then drains. Returns when all calls and tasks have ended.
    pub async fn serve(mut self, shutdown: impl Future<Output = ()>) -> anyhow::Result<()> {
        let address = self.listeners.mesh.local_addr()?;
        let metrics_address = self.listeners.metrics.local_addr()?;
        self.open_outbox().await?;
        self.start_exporter();
        let shared = self.shared_state()?;
        let limiter = Arc::clone(&shared.admission.limiter);
        self.check_redis(&limiter);
        self.watch_certificates();
        self.spawn(scheduler_lag::measure());
        let workers = Arc::new(Workers::start(self.config.worker_count())?);
        // Before the first call, so that the first health report has results.
        self.checks.run().await;
        let services = self.routes.routes().into_axum_router().with_state(());
        let services = LayeredServices::new(services, shared);
        let calls = TaskTracker::new();
        let stop_accepting = self.shutdown.stop_accepting.clone();
        let drain = Drain { stop_accepting, force_close: self.force_close };
        let (draining, config) = (CancellationToken::new(), &self.config);
        let probes = probes::serve(
            self.listeners.metrics,
            recorder::metrics()?,
            (limiter, self.checks.health()),
            draining.clone(),
            self.tasks_end.clone(),
        );
        self.tasks.spawn(probes);
        let socket = Socket { listener: self.listeners.mesh, tls: self.proof.tls() };
        let limits = connection_limits(config);
        let serving = (Arc::clone(&workers), calls.clone());
        calls.spawn(accept(socket, services, limits, drain.clone(), serving));
        self.checks.report().await;
        tracing::info!(%address, %metrics_address, "serving");
        let health = self.tasks.spawn(self.checks.watch(draining.clone()));
        self.outbox.log_missing_receivers();

        shutdown.await;
        tracing::info!("draining");
        draining.cancel();
        if timeout(HEALTH_REPORT_TIMEOUT, health).await.is_err() {
            tracing::warn!("NOT_SERVING was not reported in time");
        }
        tokio::time::sleep(config.drain_delay_seconds).await;
        let drain_timeout = config.drain_timeout_seconds;
        end_calls(&drain, &calls, &self.shutdown.end_streams, drain_timeout).await;
        end_tasks(&self.tasks, &self.tasks_end).await;
        drop(workers);
        tracing::info!("stopped");
        Ok(())
    }

    /// Starts the principal cache and its tasks.
    fn start_principal_cache(&self) -> anyhow::Result<PrincipalCache> {
        let new_cache = PrincipalCache::new(self.auth_client()?);
        let cache = self.principal_cache.get_or_init(|| new_cache).clone();
        // On a separate connection, so that changes do not wait behind lookups.
        self.spawn(cache.clone().watch_revocations(self.auth_client()?));
        self.spawn(cache.clone().count_silence());
        self.spawn(cache.clone().end_expired_calls());
        self.spawn(cache.clone().recheck_active_calls());
        Ok(cache)
    }

    fn shared_state(&self) -> anyhow::Result<SharedState> {
        let config = &self.config;
        let principals = self.start_principal_cache()?;
        let limiter = Limiter::for_roles(&config.limits, config.common.redis_url(), &self.roles())?;
        let limiter = Arc::new(limiter);
        let proof = self.proof.clone();
        Ok(SharedState {
            table: self.table.clone(),
            request_timeout: config.request_timeout,
            trusted_proxies: config.trusted_proxies.clone(),
            in_flight: Arc::new(Semaphore::new(config.max_in_flight as usize)),
            public_calls: PublicCalls::new(config.max_public_calls, &config.trusted_proxies),
            request_memory: Arc::new(Semaphore::new(config.max_request_memory())),
            admission: Admission::new(proof, principals, limiter, &config.limits),
            outbox: self.outbox.clone(),
            slow_call_threshold: Some(config.log.slow_request_seconds)
                .filter(|threshold| !threshold.is_zero()),
        })
    }

    fn watch_certificates(&mut self) {
        if let Some(tls) = self.proof.tls() {
            self.check(tls.check());
            self.spawn(tls.watch());
        }
    }

    /// Adds a check of Redis, if it is used. The end of an outage is noticed even without a rate-limited call.
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

    /// Opens the outbox, if its events have a receiver.
    async fn open_outbox(&mut self) -> anyhow::Result<()> {
        let config = &self.config;
        let mut receivers = Receivers::default();
        let address = config.analytics_address.as_deref();
        let analytics =
            self.open_channel("ANALYTICS_ADDRESS", address, "hapa.analytics.v1.AnalyticsService")?;
        if let Some((channel, is_own_process)) =
            analytics.filter(|_| config.outbox.usage_recording_enabled)
        {
            let client = AnalyticsClient::new(channel);
            receivers.analytics = Some(Receiver { client, is_own_process });
        }
        let address = config.errors_address.as_deref();
        let errors =
            self.open_channel("ERRORS_ADDRESS", address, "hapa.errors.v1.ErrorTrackingService")?;
        if let Some((channel, is_own_process)) =
            errors.filter(|_| config.outbox.error_monitoring_enabled)
        {
            let client = ErrorsClient::new(channel);
            receivers.errors = Some(Receiver { client, is_own_process });
        }
        if receivers.analytics.is_none() && receivers.errors.is_none() {
            return Ok(());
        }
        let path = config.common.data_dir.join(format!("outbox-{}", self.outbox_name()));
        let outbox_tasks = self.outbox.open(path, config.outbox.limits(), receivers).await?;
        outbox_tasks.run(|task| drop(self.tasks.spawn(task)), &self.tasks_end);
        let outbox = self.outbox.clone();
        let check = move || {
            let problem = outbox.problem();
            async move { problem.map_or(Ok(()), |problem| Err(problem.to_owned())) }
        };
        self.check(HealthCheck::new("spool", "events of calls are dropped (E5010)", check));
        Ok(())
    }

    /// A name that stays the same after a restart: the port, or the roles if the port is picked by the system.
    fn outbox_name(&self) -> String {
        if self.config.port != 0 {
            return self.config.port.to_string();
        }
        self.roles().join("-")
    }

    fn roles(&self) -> Vec<&'static str> {
        let mut roles: Vec<_> =
            self.service_names.iter().filter_map(|name| name.split('.').nth(1)).collect();
        roles.dedup();
        roles
    }

    /// Starts to send spans to the collector, if one is configured.
    fn start_exporter(&mut self) {
        let Some(exporter) = self.exporter.take() else { return };
        let roles = self.roles();
        self.spawn_until(|end| exporter.run(roles, end));
    }

    fn add_reflection(&mut self) -> anyhow::Result<()> {
        let builder = || {
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(hapa_proto::FILE_DESCRIPTOR_SET)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        };
        // Both versions, because grpcurl before 1.9 supports v1alpha only.
        self.routes.add_service(builder().build_v1()?);
        self.routes.add_service(builder().build_v1alpha()?);
        Ok(())
    }
}

/// How services authenticate: by certificates if they are set, else by the mesh token, which is generated if missing.
fn service_auth(config: &Config) -> anyhow::Result<ServiceAuth> {
    if let Some(tls) = Tls::from_config(&config.tls)? {
        return Ok(ServiceAuth::Certificates(tls));
    }
    let file = config.common.data_dir.join(secret::MESH_TOKEN_FILE);
    let token = secret::load_or_generate(config.mesh_token.as_ref(), &file)?;
    let strength = config.common.secret_strength();
    let previous = config.mesh_token_previous.as_ref();
    let previous = secret::validate_configured("MESH_TOKEN_PREVIOUS", previous, strength)?;
    Ok(ServiceAuth::Token(token, previous.cloned()))
}

/// The limits of connections, from the settings and the file descriptors of the process.
fn connection_limits(config: &Config) -> ConnectionLimits {
    let age = config.max_connection_age_seconds;
    let max_age = MaxConnectionAge { age, grace: config.request_timeout };
    ConnectionLimits {
        max_connections: file_descriptors::allowed_connections(config),
        max_per_network: config.max_connections_per_address,
        trusted_proxies: config.trusted_proxies.clone(),
        reader_timeout: config.reader_timeout_seconds,
        max_age: (!age.is_zero()).then_some(max_age),
    }
}

/// Ends the background tasks.
async fn end_tasks(tasks: &TaskTracker, end: &CancellationToken) {
    tasks.close();
    end.cancel();
    if timeout(TASK_SHUTDOWN_TIMEOUT, tasks.wait()).await.is_err() {
        tracing::warn!("a background task did not end in time");
    }
}

/// Lets open calls finish, asks streams to end shortly before the timeout, and then closes every connection.
async fn end_calls(
    drain: &Drain,
    calls: &TaskTracker,
    end_streams: &CancellationToken,
    drain_timeout: Duration,
) {
    drain.stop_accepting.cancel();
    calls.close();
    let until_streams_end = drain_timeout.saturating_sub(STREAM_END_PERIOD).max(drain_timeout / 2);
    if timeout(until_streams_end, calls.wait()).await.is_err() {
        tracing::info!(open_calls = calls.len(), "asking open streams to end");
        end_streams.cancel();
        let rest = drain_timeout.saturating_sub(until_streams_end);
        if timeout(rest, calls.wait()).await.is_err() {
            tracing::warn!(open_calls = calls.len(), "closing open connections");
        }
    }
    drain.force_close.cancel();
}
