//! What a service consists of. A service builds its [`ServiceSpec`]; the server mounts it and runs its tasks.

use std::convert::Infallible;
use std::fmt;

use axum::response::IntoResponse;
use futures_util::future::BoxFuture;
use http::Request;
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tonic::server::NamedService;
use tonic::service::RoutesBuilder;
use tower::Service;

use crate::access::Rpc;
use crate::health_check::HealthCheck;

/// A background task as a function of the token that ends it.
pub type Task = Box<dyn FnOnce(CancellationToken) -> BoxFuture<'static, ()> + Send>;

/// A gRPC service as tonic generates it.
pub trait Mountable:
    Service<Request<Body>, Error = Infallible, Response: IntoResponse, Future: Send + 'static>
    + NamedService
    + Clone
    + Send
    + Sync
    + 'static
{
}

impl<S> Mountable for S where
    S: Service<Request<Body>, Error = Infallible, Response: IntoResponse, Future: Send + 'static>
        + NamedService
        + Clone
        + Send
        + Sync
        + 'static
{
}

/// The two phases of a shutdown that streams wait for. Clones share both.
#[derive(Clone, Debug, Default)]
pub struct Shutdown {
    /// Fires when the server stops accepting connections: streams that only wait for events end at once.
    pub stop_accepting: CancellationToken,
    /// Fires a few seconds before the server closes open connections: every stream ends with E5008.
    pub end_streams: CancellationToken,
}

/// The parts of a service that the server mounts: routes, access rules, health checks and background tasks.
#[derive(Default)]
pub struct ServiceSpec {
    /// The generated services.
    pub routes: Vec<Route>,
    /// Health checks that run from before the server serves until it drains.
    pub checks: Vec<HealthCheck>,
    /// Background tasks, which start when the server mounts the service.
    pub tasks: Vec<Task>,
}

/// One generated gRPC service.
pub struct Route {
    /// The full name, such as `hapa.auth.v1.KeyService`.
    pub name: &'static str,
    /// The access rules of its RPCs.
    pub rpcs: &'static [Rpc],
    /// Whether it counts towards the readiness of the process.
    pub is_auxiliary: bool,
    /// Adds the service to the routes of a server.
    pub mount: Box<dyn FnOnce(&mut RoutesBuilder) + Send>,
}

impl ServiceSpec {
    /// Adds a generated service and the access rules of its RPCs.
    pub fn add<S: Mountable>(&mut self, service: S, rpcs: &'static [Rpc]) {
        self.push(service, rpcs, false);
    }

    /// Adds an auxiliary service (such as `SystemService`) that does not count towards readiness.
    pub fn add_auxiliary<S: Mountable>(&mut self, service: S, rpcs: &'static [Rpc]) {
        self.push(service, rpcs, true);
    }

    fn push<S: Mountable>(&mut self, service: S, rpcs: &'static [Rpc], is_auxiliary: bool) {
        let mount = Box::new(move |routes: &mut RoutesBuilder| {
            routes.add_service(service);
        });
        self.routes.push(Route { name: S::NAME, rpcs, is_auxiliary, mount });
    }

    /// Adds a health check.
    pub fn check(&mut self, check: HealthCheck) {
        self.checks.push(check);
    }

    /// Runs a background task until the server ends, which drops the task at its current await.
    pub fn spawn(&mut self, task: impl Future<Output = ()> + Send + 'static) {
        self.spawn_until(|end| async move {
            tokio::select! {
                () = task => {}
                () = end.cancelled() => {}
            }
        });
    }

    /// Runs a background task that ends by itself within 2 s after its token fires.
    pub fn spawn_until<F: Future<Output = ()> + Send + 'static>(
        &mut self,
        task: impl FnOnce(CancellationToken) -> F + Send + 'static,
    ) {
        self.tasks.push(Box::new(move |end| Box::pin(task(end))));
    }
}

impl fmt::Debug for ServiceSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = self.routes.iter().map(|route| route.name);
        f.debug_list().entries(names).finish()
    }
}

impl fmt::Debug for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}
