//! A peer's replicas behind one name: each call goes to the least busy one that can be reached.
//!
//! A call moves on to the next replica only while none has seen it, so nothing is done twice. What a
//! name stands for is looked up again every few seconds; who left it gets nothing new, and finishes.
//!
//! Not tonic's balanced channel: there a replica that can't be dialled counts as ready and fails a third
//! of all calls (330 of 1,000 with one of two dead), and a name without replicas hangs.

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
use tokio::sync::Mutex as Turns;
use tokio::time::{Instant, sleep, timeout};
use tonic::Status;
use tonic::body::Body;
use tower::Service;

use crate::connect::{Dial, Secure};

/// Between two looks at a name.
const REFRESH: Duration = Duration::from_secs(3);
/// How long a name server may take.
const RESOLVING: Duration = Duration::from_secs(2);
/// Replicas of one name that are known at most.
const MOST: usize = 64;
/// Replicas that one call tries.
const TRIES: usize = 4;

type Finding = Pin<Box<dyn Future<Output = io::Result<Vec<SocketAddr>>> + Send>>;
/// Looks a name up.
type Resolve = Box<dyn Fn() -> Finding + Send + Sync>;

/// See the module. Clones are one.
#[derive(Clone)]
pub struct Balanced(Arc<Inner>);

struct Inner {
    scheme: Scheme,
    authority: Authority,
    dial: Dial,
    resolve: Resolve,
    replicas: Mutex<Vec<Arc<Replica>>>,
    /// Whom to look at first, so that those who are equally busy take turns.
    turn: AtomicUsize,
}

/// One address, and the connection to it.
struct Replica {
    address: SocketAddr,
    connection: Turns<Option<SendRequest<Body>>>,
    failed: Mutex<Option<Instant>>,
    in_flight: AtomicUsize,
}

impl std::fmt::Debug for Balanced {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_tuple("Balanced").field(&self.0.authority).finish()
    }
}

impl Balanced {
    /// To an address such as `http://auth:50051`, or several with commas between; it connects when
    /// it is first used, and gives each replica so long for it.
    pub fn new(address: &str, secure: Secure, patience: Duration) -> anyhow::Result<Balanced> {
        let hosts: Vec<_> = address.split(',').map(place).collect::<Result<_, _>>()?;
        let names: Arc<[_]> = hosts.iter().map(|host| (host.name.clone(), host.port)).collect();
        let mut hosts = hosts.into_iter();
        let host = hosts.next().with_context(|| format!("{address:?} is no address"))?;
        if hosts.any(|other| other.scheme != host.scheme) {
            anyhow::bail!("of {address} some are plain and some are not");
        }
        let resolve = move || {
            let names = Arc::clone(&names);
            Box::pin(async move { look_up(&names).await }) as Finding
        };
        let dial = Dial::new(&host.name, host.scheme == Scheme::HTTPS, secure, patience)?;
        Ok(Balanced::with(host, dial, Box::new(resolve)))
    }

    fn with(host: Place, dial: Dial, resolve: Resolve) -> Balanced {
        Balanced(Arc::new(Inner {
            scheme: host.scheme,
            authority: host.authority,
            dial,
            resolve,
            replicas: Mutex::default(),
            turn: AtomicUsize::new(rand::random_range(0..MOST)),
        }))
    }

    /// The name that it balances, or the first of them: `host:port`.
    pub fn place(&self) -> &str {
        self.0.authority.as_str()
    }

    /// Keeps up with what the name stands for; the task of a server.
    pub async fn follow(self) {
        loop {
            sleep(REFRESH).await;
            if let Err(error) = self.0.refresh().await {
                tracing::debug!(peer = %self.0.authority, %error, "a name can't be looked up");
            }
        }
    }

    /// Connects now, to say so where it can't be done.
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
        let bound = grpc_timeout(request.headers()).ok().flatten();
        let sent = self.try_each(request);
        match bound {
            Some(bound) => timeout(bound, sent)
                .await
                .map_err(|_| Status::deadline_exceeded("the peer did not answer in time"))?,
            None => sent.await,
        }
    }

    /// The message is kept, since hyper gives back none that it has begun to send: a call of the mesh
    /// sends one alone, which is there when the call is made.
    async fn try_each(&self, request: Request<Body>) -> Result<Response<Body>, Status> {
        let (head, body) = request.into_parts();
        let message = body.collect().await?.to_bytes();
        let mut tried = HashSet::new();
        for _ in 0..TRIES {
            let (busy, mut connection) = self.0.open(&mut tried).await?;
            let body = Body::new(Full::new(message.clone()));
            let request = Request::from_parts(head.clone(), body);
            let replied = connection.try_send_request(request).await;
            drop(busy);
            match replied {
                Ok(response) => return Ok(response.map(Body::new)),
                Err(mut failed) => {
                    let unsent = failed.take_message().is_some();
                    let error = failed.into_error();
                    // Its connection ended before it was sent, or the replica has not seen it: another takes it.
                    if !unsent && !unseen(&error) {
                        return Err(lost(error));
                    }
                }
            }
        }
        Err(Status::unavailable(format!("{} keeps closing connections", self.0.authority)))
    }
}

impl Service<Request<Body>> for Balanced {
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

/// A call that a replica has.
struct Busy(Arc<Replica>);

impl Busy {
    fn with(replica: Arc<Replica>) -> Busy {
        replica.in_flight.fetch_add(1, Ordering::Relaxed);
        Busy(replica)
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Inner {
    /// A connection to the best replica that has one or can be dialled.
    async fn open(
        &self,
        tried: &mut HashSet<SocketAddr>,
    ) -> Result<(Busy, SendRequest<Body>), Status> {
        let mut why = None;
        // Names are looked up where nothing is known, and once more where nobody answers.
        for round in 0..2 {
            if round > 0 || self.known().is_empty() {
                let refreshed = self.refresh().await;
                let words = |error| format!("{} can't be looked up: {error}", self.authority);
                why = refreshed.err().map(words).or(why);
            }
            while let Some(replica) = self.best(tried).filter(|_| tried.len() < TRIES) {
                let address = replica.address;
                let busy = Busy::with(replica);
                match busy.0.connection(&self.dial).await {
                    Ok(connection) => return Ok((busy, connection)),
                    Err(words) => {
                        tried.insert(address);
                        why = Some(format!("{} ({address}): {words}", self.authority));
                    }
                }
            }
        }
        let why = why.unwrap_or_else(|| format!("{} has no address", self.authority));
        tracing::debug!(why, "a peer can't be connected to");
        Err(Status::unavailable(format!("can't connect to {why}")))
    }

    /// Who did not fail lately, then who has least to do, then whose turn it is.
    fn best(&self, tried: &HashSet<SocketAddr>) -> Option<Arc<Replica>> {
        let replicas = self.known().clone();
        let turn = self.turn.fetch_add(1, Ordering::Relaxed) % replicas.len().max(1);
        let (after, before) = replicas.split_at(turn);
        let rest = before.iter().chain(after).filter(|one| !tried.contains(&one.address));
        let rank = |one: &&Arc<Replica>| (one.rests(), one.in_flight.load(Ordering::Relaxed));
        rest.min_by_key(rank).cloned()
    }

    async fn refresh(&self) -> io::Result<()> {
        let found = timeout(RESOLVING, (self.resolve)()).await;
        let mut found = found.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))?;
        found.sort_unstable();
        found.dedup();
        found.truncate(MOST);
        if found.is_empty() {
            // A name server that forgot is no reason to leave who answers.
            return Ok(());
        }
        let mut known = self.known();
        let replicas = found.into_iter().map(|address| {
            let old = known.iter().find(|replica| replica.address == address);
            old.map_or_else(|| Arc::new(Replica::at(address)), Arc::clone)
        });
        *known = replicas.collect();
        Ok(())
    }

    fn known(&self) -> MutexGuard<'_, Vec<Arc<Replica>>> {
        self.replicas.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Replica {
    fn at(address: SocketAddr) -> Replica {
        Replica {
            address,
            connection: Turns::new(None),
            failed: Mutex::default(),
            in_flight: AtomicUsize::new(0),
        }
    }

    /// Its one connection, dialled where there is none; who waits for that is told what came of it.
    async fn connection(&self, dial: &Dial) -> Result<SendRequest<Body>, String> {
        let began = Instant::now();
        let mut kept = self.connection.lock().await;
        if let Some(open) = kept.as_ref().filter(|open| !open.is_closed()) {
            return Ok(open.clone());
        }
        if self.failed_at().is_some_and(|failed| failed > began) {
            return Err("it could not be reached a moment ago".to_owned());
        }
        match dial.dial(self.address).await {
            Ok(open) => {
                self.note(None);
                Ok(kept.insert(open).clone())
            }
            Err(error) => {
                *kept = None;
                self.note(Some(Instant::now()));
                Err(format!("{error:#}"))
            }
        }
    }

    fn rests(&self) -> bool {
        self.failed_at().is_some_and(|failed| failed.elapsed() < REFRESH)
    }

    fn failed_at(&self) -> Option<Instant> {
        *self.failed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, failed: Option<Instant>) {
        *self.failed.lock().unwrap_or_else(PoisonError::into_inner) = failed;
    }
}

/// All that names stand for. One that is not known hides none of the others.
async fn look_up(names: &[(String, u16)]) -> io::Result<Vec<SocketAddr>> {
    let (mut found, mut failed) = (Vec::new(), None);
    for (name, port) in names {
        match tokio::net::lookup_host((name.as_str(), *port)).await {
            Ok(addresses) => found.extend(addresses),
            Err(error) => failed = Some(error),
        }
    }
    match failed {
        Some(error) if found.is_empty() => Err(error),
        _ => Ok(found),
    }
}

/// An address, taken apart.
struct Place {
    scheme: Scheme,
    authority: Authority,
    name: String,
    port: u16,
}

fn place(address: &str) -> anyhow::Result<Place> {
    let uri = address.parse::<Uri>().ok().map(Uri::into_parts);
    let parts = uri.and_then(|parts| parts.scheme.zip(parts.authority));
    let plain =
        |(scheme, _): &(Scheme, Authority)| *scheme == Scheme::HTTP || *scheme == Scheme::HTTPS;
    let Some((scheme, authority)) = parts.filter(plain) else {
        anyhow::bail!("{address} is not an address like http://host:port");
    };
    let usual = if scheme == Scheme::HTTPS { 443 } else { 80 };
    let name = authority.host().trim_matches(['[', ']']).to_owned();
    let port = authority.port_u16().unwrap_or(usual);
    Ok(Place { scheme, authority, name, port })
}

/// Whether the replica itself says that it has not begun the call: it went away before, or refused it.
/// <https://www.rfc-editor.org/rfc/rfc9113#section-8.7>
fn unseen(error: &hyper::Error) -> bool {
    let cause =
        std::error::Error::source(error).and_then(|cause| cause.downcast_ref::<h2::Error>());
    let refused = |cause: &h2::Error| cause.reason() == Some(h2::Reason::REFUSED_STREAM);
    cause.is_some_and(|cause| cause.is_remote() && (cause.is_go_away() || refused(cause)))
}

/// A call that a peer may have seen: whoever made it decides whether to make it again.
fn lost(error: hyper::Error) -> Status {
    let status = Status::from_error(Box::new(error));
    match status.code() {
        tonic::Code::Unknown => Status::unavailable(status.message()),
        _ => status,
    }
}

#[cfg(test)]
mod tests;
