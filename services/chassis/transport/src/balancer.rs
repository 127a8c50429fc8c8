//! A client-side load balancer over the addresses of a host name: each call goes to the reachable replica with the fewest
//! calls in flight.
//!
//! Invariant: a call is retried on another replica only if no replica has started to process it, so no call runs twice.
//! The name is resolved again every 3 s. A replica that is no longer among the addresses receives no new calls and
//! finishes its calls in progress.
//!
//! tonic's balanced channel does not serve. It treats an unreachable replica as ready and fails a third of all calls
//! (330 of 1,000 with one of two replicas down). It also hangs on a name without addresses.

use std::collections::HashSet;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use anyhow::Context as _;
use hapa_core::grpc_timeout::grpc_timeout;
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{Request, Response, Uri};
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http2::SendRequest;
use tokio::sync::Mutex as AsyncMutex;
use tokio::time::{Instant, sleep, timeout};
use tonic::Status;
use tonic::body::Body;
use tower::Service;

use crate::connect::{Connector, TransportSecurity};

/// Interval of name resolution, and the time for which a failed replica cools down.
const REFRESH_INTERVAL: Duration = Duration::from_secs(3);
/// Maximum duration of a name resolution.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(2);
/// Maximum number of replicas.
const MAX_REPLICAS: usize = 64;
/// Maximum number of replicas that one call tries.
const MAX_ATTEMPTS: usize = 4;

type Resolution = Pin<Box<dyn Future<Output = io::Result<Vec<SocketAddr>>> + Send>>;
/// Resolves the host names.
type Resolve = Box<dyn Fn() -> Resolution + Send + Sync>;

/// A channel over all replicas of a service. Clones share the connections.
#[derive(Clone)]
pub struct BalancedChannel(Arc<Balancer>);

struct Balancer {
    scheme: Scheme,
    authority: Authority,
    connector: Connector,
    resolve: Resolve,
    replicas: Mutex<Vec<Arc<Replica>>>,
    /// Rotates the order of replicas, so that equally busy ones take turns.
    rotation: AtomicUsize,
}

/// One address, and the connection to it.
struct Replica {
    address: SocketAddr,
    connection: AsyncMutex<Option<SendRequest<Body>>>,
    failed_at: Mutex<Option<Instant>>,
    in_flight: AtomicUsize,
}

impl std::fmt::Debug for BalancedChannel {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_tuple("Balanced").field(&self.0.authority).finish()
    }
}

impl BalancedChannel {
    /// A channel to an address such as `http://auth:50051`, or to several, separated by commas. It connects on first
    /// use, and waits up to `connect_timeout` for each replica.
    pub fn new(
        address: &str,
        secure: TransportSecurity,
        connect_timeout: Duration,
    ) -> anyhow::Result<BalancedChannel> {
        let hosts: Vec<_> = address.split(',').map(parse_address).collect::<Result<_, _>>()?;
        let names: Arc<[_]> = hosts.iter().map(|host| (host.name.clone(), host.port)).collect();
        let mut hosts = hosts.into_iter();
        let host = hosts.next().with_context(|| format!("{address:?} is not an address"))?;
        if hosts.any(|other| other.scheme != host.scheme) {
            anyhow::bail!("{address} mixes http:// and https://");
        }
        let resolve = move || {
            let names = Arc::clone(&names);
            Box::pin(async move { resolve_all(&names).await }) as Resolution
        };
        let is_tls = host.scheme == Scheme::HTTPS;
        let connector = Connector::new(&host.name, is_tls, secure, connect_timeout)?;
        Ok(BalancedChannel::from_parts(host, connector, Box::new(resolve)))
    }

    fn from_parts(host: HostAddress, connector: Connector, resolve: Resolve) -> BalancedChannel {
        BalancedChannel(Arc::new(Balancer {
            scheme: host.scheme,
            authority: host.authority,
            connector,
            resolve,
            replicas: Mutex::default(),
            rotation: AtomicUsize::new(rand::random_range(0..MAX_REPLICAS)),
        }))
    }

    /// The host name and port, of the first address if there are several.
    pub fn authority(&self) -> &str {
        self.0.authority.as_str()
    }

    /// Resolves the names again and again; a background task of the server.
    pub async fn refresh_addresses(self) {
        loop {
            sleep(REFRESH_INTERVAL).await;
            if let Err(error) = self.0.refresh().await {
                tracing::debug!(peer = %self.0.authority, %error, "a host name can't be resolved");
            }
        }
    }

    /// Connects to a replica now, so that an error is visible before the first call.
    pub async fn connect(&self) -> Result<(), Status> {
        let mut tried = HashSet::new();
        self.0.open(&mut tried).await.map(drop)
    }

    async fn send(self, mut request: Request<Body>) -> Result<Response<Body>, Status> {
        let path = request.uri().path_and_query().cloned();
        *request.uri_mut() = Uri::builder()
            .scheme(self.0.scheme.clone())
            .authority(self.0.authority.clone())
            .path_and_query(path.unwrap_or_else(|| PathAndQuery::from_static("/")))
            .build()
            .map_err(|error| Status::internal(error.to_string()))?;
        let limit = grpc_timeout(request.headers()).ok().flatten();
        let reply = self.send_to_any_replica(request);
        match limit {
            Some(limit) => timeout(limit, reply)
                .await
                .map_err(|_| Status::deadline_exceeded("the peer did not answer in time"))?,
            None => reply.await,
        }
    }

    /// Buffers the request message, because hyper does not return a message that it has begun to send. A call between
    /// services has exactly one request message, which is complete when the call starts.
    async fn send_to_any_replica(&self, request: Request<Body>) -> Result<Response<Body>, Status> {
        let (head, body) = request.into_parts();
        let message = body.collect().await?.to_bytes();
        let mut tried = HashSet::new();
        for _ in 0..MAX_ATTEMPTS {
            let (in_flight, mut connection) = self.0.open(&mut tried).await?;
            let body = Body::new(Full::new(message.clone()));
            let request = Request::from_parts(head.clone(), body);
            let reply = connection.try_send_request(request).await;
            drop(in_flight);
            match reply {
                Ok(response) => return Ok(response.map(Body::new)),
                Err(mut failure) => {
                    let was_not_sent = failure.take_message().is_some();
                    let error = failure.into_error();
                    // Another replica may take a call that was not sent or not processed.
                    if !was_not_sent && !was_not_processed(&error) {
                        return Err(ambiguous_failure(error));
                    }
                }
            }
        }
        Err(Status::unavailable(format!("{} keeps closing connections", self.0.authority)))
    }
}

impl Service<Request<Body>> for BalancedChannel {
    type Response = Response<Body>;
    type Error = Status;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Status>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Status>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        Box::pin(self.clone().send(request))
    }
}

/// Counts a call in flight until it is dropped.
struct InFlightGuard(Arc<Replica>);

impl InFlightGuard {
    fn new(replica: Arc<Replica>) -> InFlightGuard {
        replica.in_flight.fetch_add(1, Ordering::Relaxed);
        InFlightGuard(replica)
    }
}

impl Drop for InFlightGuard {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Balancer {
    /// A connection to the best replica that has a connection or can be connected to.
    async fn open(
        &self,
        tried: &mut HashSet<SocketAddr>,
    ) -> Result<(InFlightGuard, SendRequest<Body>), Status> {
        let mut problem = None;
        // Names are resolved if there are no replicas, and once more if none is reachable.
        for round in 0..2 {
            if round > 0 || self.replicas().is_empty() {
                let describe = |error| format!("{} can't be resolved: {error}", self.authority);
                problem = self.refresh().await.err().map(describe).or(problem);
            }
            while let Some(replica) = self.best(tried).filter(|_| tried.len() < MAX_ATTEMPTS) {
                let address = replica.address;
                let in_flight = InFlightGuard::new(replica);
                match in_flight.0.connection(&self.connector).await {
                    Ok(connection) => return Ok((in_flight, connection)),
                    Err(error) => {
                        tried.insert(address);
                        problem = Some(format!("{} ({address}): {error}", self.authority));
                    }
                }
            }
        }
        let problem = problem.unwrap_or_else(|| format!("{} has no address", self.authority));
        tracing::debug!(problem, "a peer can't be connected to");
        Err(Status::unavailable(format!("can't connect to {problem}")))
    }

    /// The replica with the fewest calls in flight. Replicas that cool down come last; equal ones take turns.
    fn best(&self, tried: &HashSet<SocketAddr>) -> Option<Arc<Replica>> {
        let replicas = self.replicas().clone();
        let first = self.rotation.fetch_add(1, Ordering::Relaxed) % replicas.len().max(1);
        let (after, before) = replicas.split_at(first);
        let rest = before.iter().chain(after).filter(|one| !tried.contains(&one.address));
        let rank =
            |one: &&Arc<Replica>| (one.is_cooling_down(), one.in_flight.load(Ordering::Relaxed));
        rest.min_by_key(rank).cloned()
    }

    async fn refresh(&self) -> io::Result<()> {
        let addresses = timeout(RESOLVE_TIMEOUT, (self.resolve)()).await;
        let mut addresses = addresses.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))?;
        addresses.sort_unstable();
        addresses.dedup();
        addresses.truncate(MAX_REPLICAS);
        if addresses.is_empty() {
            // An empty reply may be an error of the name server, so the replicas stay.
            return Ok(());
        }
        let mut replicas = self.replicas();
        let new = addresses.into_iter().map(|address| {
            let old = replicas.iter().find(|replica| replica.address == address);
            old.map_or_else(|| Arc::new(Replica::new(address)), Arc::clone)
        });
        *replicas = new.collect();
        Ok(())
    }

    fn replicas(&self) -> MutexGuard<'_, Vec<Arc<Replica>>> {
        self.replicas.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Replica {
    fn new(address: SocketAddr) -> Replica {
        Replica {
            address,
            connection: AsyncMutex::new(None),
            failed_at: Mutex::default(),
            in_flight: AtomicUsize::new(0),
        }
    }

    /// The replica's connection, which is opened if there is none. Concurrent callers share one attempt and its result.
    async fn connection(&self, connector: &Connector) -> Result<SendRequest<Body>, String> {
        let begin = Instant::now();
        let mut slot = self.connection.lock().await;
        if let Some(open) = slot.as_ref().filter(|open| !open.is_closed()) {
            return Ok(open.clone());
        }
        if self.failed_at().is_some_and(|failed_at| failed_at > begin) {
            return Err("the previous attempt to connect has just failed".to_owned());
        }
        match connector.connect(self.address).await {
            Ok(open) => {
                self.set_failed_at(None);
                Ok(slot.insert(open).clone())
            }
            Err(error) => {
                *slot = None;
                self.set_failed_at(Some(Instant::now()));
                Err(format!("{error:#}"))
            }
        }
    }

    fn is_cooling_down(&self) -> bool {
        self.failed_at().is_some_and(|failed_at| failed_at.elapsed() < REFRESH_INTERVAL)
    }

    fn failed_at(&self) -> Option<Instant> {
        *self.failed_at.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_failed_at(&self, failed_at: Option<Instant>) {
        *self.failed_at.lock().unwrap_or_else(PoisonError::into_inner) = failed_at;
    }
}

/// The addresses of all names. Fails only if no name can be resolved.
async fn resolve_all(names: &[(String, u16)]) -> io::Result<Vec<SocketAddr>> {
    let (mut resolved, mut failure) = (Vec::new(), None);
    for (name, port) in names {
        match tokio::net::lookup_host((name.as_str(), *port)).await {
            Ok(addresses) => resolved.extend(addresses),
            Err(error) => failure = Some(error),
        }
    }
    match failure {
        Some(error) if resolved.is_empty() => Err(error),
        _ => Ok(resolved),
    }
}

/// The parts of an address.
struct HostAddress {
    scheme: Scheme,
    authority: Authority,
    name: String,
    port: u16,
}

fn parse_address(address: &str) -> anyhow::Result<HostAddress> {
    let uri = address.parse::<Uri>().ok().map(Uri::into_parts);
    let parts = uri.and_then(|parts| parts.scheme.zip(parts.authority));
    let is_http =
        |(scheme, _): &(Scheme, Authority)| *scheme == Scheme::HTTP || *scheme == Scheme::HTTPS;
    let Some((scheme, authority)) = parts.filter(is_http) else {
        anyhow::bail!("{address} is not an address like http://host:port");
    };
    let default_port = if scheme == Scheme::HTTPS { 443 } else { 80 };
    let name = authority.host().trim_matches(['[', ']']).to_owned();
    let port = authority.port_u16().unwrap_or(default_port);
    Ok(HostAddress { scheme, authority, name, port })
}

/// Whether the replica has stated that it did not process the call, by GOAWAY or REFUSED_STREAM.
/// <https://www.rfc-editor.org/rfc/rfc9113#section-8.7>
fn was_not_processed(error: &hyper::Error) -> bool {
    let cause =
        std::error::Error::source(error).and_then(|cause| cause.downcast_ref::<h2::Error>());
    let refused = |cause: &h2::Error| cause.reason() == Some(h2::Reason::REFUSED_STREAM);
    cause.is_some_and(|cause| cause.is_remote() && (cause.is_go_away() || refused(cause)))
}

/// The status of a call that the replica may have processed. Only the caller can decide whether to retry it.
fn ambiguous_failure(error: hyper::Error) -> Status {
    let status = Status::from_error(Box::new(error));
    match status.code() {
        tonic::Code::Unknown => Status::unavailable(status.message()),
        _ => status,
    }
}

#[cfg(test)]
mod tests;
