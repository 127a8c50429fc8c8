//! What services are mounted on, and the life of a process: ready, serving, draining, gone.
//!
//! The drain is bounded by us and not by the slowest peer: not ready, door closed, streams told,
//! and at the end of DRAIN_TIMEOUT_SECONDS every connection is dropped.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use axum::response::IntoResponse;
use http::Request;
use secrecy::SecretString;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::body::Body;
use tonic::server::NamedService;
use tonic::service::RoutesBuilder;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;
use tower::Service;

use crate::accept::{Door, accept};
use crate::admission::Admission;
use crate::config::{Config, Wrong};
use crate::credential::Callers;
use crate::layers::{Shared, stack};
use crate::limit::Limiter;
use crate::peer::AuthClient;
use crate::rpc::{BUILT_IN, Rpc, Table};
use crate::{peer, probes, secret, telemetry};

/// How long background tasks may take to notice the end.
const TASKS_PATIENCE: Duration = Duration::from_secs(2);

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
    mesh_token: SecretString,
    routes: RoutesBuilder,
    table: Table,
    health: HealthReporter,
    names: Vec<&'static str>,
    tasks: TaskTracker,
    tasks_end: CancellationToken,
    streams_end: CancellationToken,
    door: Door,
}

impl Server {
    /// A server with health and reflection, and nothing else yet.
    pub async fn new(config: Config, listeners: Listeners) -> anyhow::Result<Self> {
        config.check()?;
        telemetry::metrics()?;
        let mesh_token =
            secret::set_or_kept(config.mesh_token.as_ref(), &config.data_dir.join("mesh-token"))?;
        let (health, health_service) = tonic_health::server::health_reporter();
        health.set_service_status("", ServingStatus::NotServing).await;
        let mut server = Server {
            config,
            listeners,
            mesh_token,
            routes: RoutesBuilder::default(),
            table: Table::default(),
            health,
            names: vec![""],
            tasks: TaskTracker::new(),
            tasks_end: CancellationToken::new(),
            streams_end: CancellationToken::new(),
            door: Door::default(),
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

    /// Fires when streams must end within a few seconds.
    pub fn streams_end(&self) -> CancellationToken {
        self.streams_end.clone()
    }

    /// Fires when the door closes: what only waits for news must end at once.
    pub fn closing(&self) -> CancellationToken {
        self.door.closing.clone()
    }

    /// A client of the auth service, which may be in this process.
    pub fn auth(&self) -> anyhow::Result<AuthClient> {
        let address = match &self.config.auth_address {
            Some(address) => address.clone(),
            None if self.names.contains(&"hapa.auth.v1.AuthService") => {
                format!("http://{}", dialable(self.listeners.mesh.local_addr()?))
            }
            None => {
                let words = "this role needs the address of auth";
                return Err(Wrong::new("AUTH_ADDRESS", words).into());
            }
        };
        peer::auth(&address, &self.mesh_token).context("AUTH_ADDRESS")
    }

    /// Adds a gRPC service and its rows of the access table.
    pub async fn add<S>(&mut self, service: S, rpcs: &'static [Rpc])
    where
        S: Service<Request<Body>, Error = Infallible>
            + NamedService
            + Clone
            + Send
            + Sync
            + 'static,
        S::Response: IntoResponse,
        S::Future: Send + 'static,
    {
        self.health.set_service_status(S::NAME, ServingStatus::NotServing).await;
        self.names.push(S::NAME);
        self.table.add(rpcs);
        self.routes.add_service(service);
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
    pub async fn serve(self, shutdown: impl Future<Output = ()>) -> anyhow::Result<()> {
        let address = self.listeners.mesh.local_addr()?;
        let metrics_address = self.listeners.metrics.local_addr()?;
        let shared = Arc::new(self.shared()?);
        let router = stack(self.routes.routes().into_axum_router().with_state(()), &shared);
        let (door, calls) = (self.door, TaskTracker::new());
        let (draining, config) = (CancellationToken::new(), &self.config);
        let probes = probes::serve(
            self.listeners.metrics,
            telemetry::metrics()?,
            Arc::clone(&shared.admission.limiter),
            draining.clone(),
            self.tasks_end.clone(),
        );
        self.tasks.spawn(probes);
        let accepting = accept(
            self.listeners.mesh,
            router,
            config.max_connections,
            door.clone(),
            calls.clone(),
        );
        calls.spawn(accepting);
        for name in &self.names {
            self.health.set_service_status(name, ServingStatus::Serving).await;
        }
        tracing::info!(%address, %metrics_address, "serving");

        shutdown.await;
        tracing::info!("draining");
        draining.cancel();
        for name in &self.names {
            self.health.set_service_status(name, ServingStatus::NotServing).await;
        }
        tokio::time::sleep(config.drain_delay_seconds).await;
        drain(&door, &calls, &self.streams_end, config.drain_timeout_seconds).await;
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
        let callers = Callers::new(self.auth()?);
        // On a connection of its own: news must not wait behind questions.
        self.spawn(callers.clone().watch(self.auth()?));
        self.spawn(callers.clone().expire());
        self.spawn(callers.clone().follow());
        let limiter = Arc::new(Limiter::new(&config.limits, config.redis_url())?);
        let token = self.mesh_token.clone();
        Ok(Shared {
            table: self.table.clone(),
            request_timeout: config.request_timeout,
            trusted_proxies: config.trusted_proxies.clone(),
            in_flight: Arc::new(Semaphore::new(config.max_in_flight as usize)),
            admission: Admission::new(token, callers, limiter, &config.limits),
        })
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

/// The address by which a process reaches its own listener.
fn dialable(mut address: SocketAddr) -> SocketAddr {
    if address.ip().is_unspecified() {
        address.set_ip(if address.is_ipv4() {
            [127, 0, 0, 1].into()
        } else {
            [0, 0, 0, 0, 0, 0, 0, 1].into()
        });
    }
    address
}
