//! Accept loop: connection settings, the time limit for the first bytes, and a bounded drain.
//!
//! It is an own loop over hyper because tonic's server has three properties that do not fit. It applies grpc-timeout
//! itself (to headers only, as CANCELLED). It waits for silent sockets at shutdown. It can't limit connections that
//! never send a byte.

use std::convert::Infallible;
use std::future::pending;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::FutureExt as _;
use hapa_transport::tls::{Tls, negotiated_h2};
use http::Request;
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::rt::Executor;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use ipnet::IpNet;
use rustls::pki_types::CertificateDer;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep, timeout_at};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::client_address::{CertificateRoles, PeerAddress};
use crate::middleware::LayeredServices;
use crate::network_limit::NetworkLimit;
use crate::rewind_io::RewindIo;
use crate::slow_reader::{ReaderHandoff, SlowReaderTimeout};
use crate::workers::Workers;

/// <https://www.rfc-editor.org/rfc/rfc9113#section-3.4>
const PREFACE: &[u8; PREFACE_LEN] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const PREFACE_LEN: usize = 24;
/// The first byte of every TLS connection: the record type of a handshake.
const TLS_HANDSHAKE_RECORD: u8 = 0x16;
/// Maximum time from connecting to the end of the preface, including the TLS handshake.
const PREFACE_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum time from the start of a connection to its first request, while fewer than half of all connections are
/// free.
const FIRST_REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// How long after the end of accepting a new connection may still send its preface. A call that is lost on the way
/// can't be retried, because its client can't know whether it was processed.
const LATE_PREFACE_TIMEOUT: Duration = Duration::from_millis(500);
/// Delay after a failed accept, so that a lasting cause does not make the loop spin.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(20);
/// Maximum number of concurrent streams of a connection. Without a limit, 3,000 small calls at once exhaust h2's
/// budget for small frames, and all of them fail.
const MAX_STREAMS: u32 = 256;
/// Bytes that a client may send on one stream before a handler reads them.
const STREAM_WINDOW_BYTES: u32 = 64 * 1024;
/// Bytes that a client may send on one connection before handlers read them.
const CONNECTION_WINDOW_BYTES: u32 = 1024 * 1024;
/// Equal to the gateway's `max_request_headers_kb`. The gateway must refuse a larger header, because h2 closes the
/// whole connection over it.
const MAX_HEADER_BYTES: u32 = 60 * 1024;
/// Bytes that one stream may buffer for a slow reader.
const MAX_SEND_BUFFER_BYTES: usize = 16 * 1024;
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// The two steps of a shutdown, for the accept loop and its connections.
#[derive(Clone, Default)]
pub(crate) struct Drain {
    /// Fires when no new connections are accepted; open ones finish their calls.
    pub(crate) stop_accepting: CancellationToken,
    /// Fires when every connection must close.
    pub(crate) force_close: CancellationToken,
}

/// The limits of connections.
#[derive(Clone)]
pub(crate) struct ConnectionLimits {
    pub(crate) max_connections: u32,
    /// Maximum for one client network; 0: no limit.
    pub(crate) max_per_network: u32,
    /// Networks without a limit of their own.
    pub(crate) trusted_proxies: Vec<IpNet>,
    /// How long a client may leave response data unread.
    pub(crate) reader_timeout: Duration,
    /// When a connection is asked to close. `None`: never.
    pub(crate) max_age: Option<MaxConnectionAge>,
}

/// The maximum age of a connection.
#[derive(Clone, Copy)]
pub(crate) struct MaxConnectionAge {
    /// When the connection is asked to close, give or take a tenth.
    pub(crate) age: Duration,
    /// How long its calls may go on after that.
    pub(crate) grace: Duration,
}

/// A listening socket and the protocol of its connections.
pub(crate) struct Socket {
    pub(crate) listener: TcpListener,
    /// `None`: HTTP/2 without TLS.
    pub(crate) tls: Option<Tls>,
}

/// Accepts connections until `drain.stop_accepting`. Connections and their calls run on `workers`, counted by `tasks`.
pub(crate) async fn accept(
    socket: Socket,
    services: LayeredServices,
    limits: ConnectionLimits,
    drain: Drain,
    (workers, tasks): (Arc<Workers>, TaskTracker),
) {
    let permits = Arc::new(Semaphore::new(limits.max_connections as usize));
    let networks = NetworkLimit::new(limits.max_per_network as usize, &limits.trusted_proxies);
    let half = limits.max_connections as usize / 2;
    let serve = |stream: TcpStream, peer: SocketAddr, permit| {
        let Some(network_permit) = networks.enter(peer.ip()) else {
            metrics::counter!("hapa_connections_refused_total").increment(1);
            return;
        };
        let permits = Arc::clone(&permits);
        let context = ConnectionContext {
            peer: PeerAddress(peer.ip()),
            max_age: limits.max_age,
            drain: drain.clone(),
            tasks: tasks.clone(),
            reader_timeout: limits.reader_timeout,
            is_crowded: Box::new(move || permits.available_permits() < half),
        };
        // The worker registers the socket with its own runtime.
        let Ok(stream) = stream.into_std() else { return };
        let connection = connection(stream, socket.tls.clone(), services.clone(), context);
        workers.spawn(&tasks, hold((permit, network_permit), connection));
    };
    loop {
        let accepted = async {
            let permit = Arc::clone(&permits).acquire_owned().await.ok()?;
            // Neither exhausted file descriptors nor a peer that has left may end the server.
            let (stream, peer) = socket.listener.accept().await.ok()?;
            Some((stream, peer, permit))
        };
        let accepted = tokio::select! {
            () = drain.stop_accepting.cancelled() => break,
            accepted = accepted => accepted,
        };
        match accepted {
            Some((stream, peer, permit)) => serve(stream, peer, permit),
            None => sleep(ACCEPT_RETRY_DELAY).await,
        }
    }
    // The kernel has accepted these connections already, and they may have sent calls.
    while let Ok(permit) = Arc::clone(&permits).try_acquire_owned()
        && let Some(Ok((stream, peer))) = socket.listener.accept().now_or_never()
    {
        serve(stream, peer, permit);
    }
}

/// The context of one connection.
struct ConnectionContext {
    peer: PeerAddress,
    max_age: Option<MaxConnectionAge>,
    drain: Drain,
    tasks: TaskTracker,
    reader_timeout: Duration,
    /// Whether fewer than half of the server's connections are free.
    is_crowded: Box<dyn Fn() -> bool + Send + Sync>,
}

async fn hold<P>(_permits: P, connection: impl Future<Output = ()>) {
    connection.await;
}

async fn connection(
    stream: std::net::TcpStream,
    tls: Option<Tls>,
    services: LayeredServices,
    context: ConnectionContext,
) {
    let stream = stream.set_nodelay(true).and_then(|()| TcpStream::from_std(stream));
    let stream = match stream {
        Ok(stream) => stream,
        Err(error) => return tracing::debug!(%error, "a connection closed at once"),
    };
    let deadline = Instant::now() + PREFACE_TIMEOUT;
    let stop_accepting = context.drain.stop_accepting.clone();
    let too_late = async {
        stop_accepting.cancelled().await;
        sleep(LATE_PREFACE_TIMEOUT).await;
    };
    let Some(tls) = tls else {
        let preface = timeout_at(deadline, read_preface(stream));
        let preface = tokio::select! {
            preface = preface => preface.ok().flatten(),
            () = too_late => return,
        };
        let Some(io) = preface else {
            return tracing::debug!("a connection did not start with the HTTP/2 preface");
        };
        return serve(io, None, services, context).await;
    };
    let handshake = timeout_at(deadline, tls_handshake(stream, &tls));
    let handshake = tokio::select! {
        handshake = handshake => handshake.unwrap_or_else(|_| Err("it was too slow".to_owned())),
        () = too_late => return,
    };
    match handshake {
        Ok((io, roles)) => serve(io, Some(roles), services, context).await,
        Err(why) => {
            metrics::counter!("hapa_handshakes_refused_total").increment(1);
            tracing::debug!(why, "a TLS handshake failed");
        }
    }
}

/// A connection after `read_preface`.
type PrefacedIo<I> = RewindIo<I, PREFACE_LEN>;

/// Reads the HTTP/2 preface. `None`: the connection starts with other bytes.
async fn read_preface<I: AsyncRead + Unpin>(mut stream: I) -> Option<PrefacedIo<I>> {
    let mut preface = [0; PREFACE_LEN];
    stream.read_exact(&mut preface).await.ok()?;
    (preface == *PREFACE).then(|| RewindIo::new(preface, stream))
}

/// Runs the TLS handshake and reads the preface. Returns the roles of the client certificate as well.
async fn tls_handshake(
    stream: TcpStream,
    tls: &Tls,
) -> Result<(PrefacedIo<TlsStream<TcpStream>>, CertificateRoles), String> {
    let mut first = [0];
    // A plain-text client is refused after one byte, without a handshake.
    if !matches!(stream.peek(&mut first).await, Ok(1)) || first != [TLS_HANDSHAKE_RECORD] {
        return Err("it did not start with a TLS handshake".to_owned());
    }
    let acceptor = TlsAcceptor::from(tls.server());
    let stream = acceptor.accept(stream).await.map_err(|error| error.to_string())?;
    let session = stream.get_ref().1;
    if !negotiated_h2(session.alpn_protocol()) {
        return Err("it did not offer HTTP/2".to_owned());
    }
    let certificate = session.peer_certificates().and_then(<[CertificateDer<'_>]>::first);
    let roles = certificate.map(|certificate| tls.peer_roles(certificate)).unwrap_or_default();
    let io = read_preface(stream).await.ok_or("it did not start with the HTTP/2 preface")?;
    Ok((io, CertificateRoles(roles.into())))
}

/// Serves the calls of a connection until it closes.
async fn serve<I>(
    io: PrefacedIo<I>,
    roles: Option<CertificateRoles>,
    services: LayeredServices,
    context: ConnectionContext,
) where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let ConnectionContext { peer, max_age, drain, tasks, reader_timeout, is_crowded } = context;
    let has_called = Arc::new(AtomicBool::new(false));
    let called = Arc::clone(&has_called);
    let readers = ReaderHandoff::default();
    let executor = TrackedExecutor { tasks, reader_timeout, readers: readers.clone() };
    let service = service_fn(move |mut request: Request<Incoming>| {
        called.store(true, Ordering::Relaxed);
        request.extensions_mut().insert(readers.start());
        request.extensions_mut().insert(peer);
        if let Some(roles) = &roles {
            request.extensions_mut().insert(roles.clone());
        }
        let call = services.clone().call(request.map(|body| body.map_err(axum::Error::new)));
        Box::pin(call.map(Ok::<_, Infallible>))
    });
    let served = http2_builder(executor).serve_connection(TokioIo::new(io), service);
    let mut served = pin!(served);
    let outcome = tokio::select! {
        outcome = &mut served => outcome,
        // Without a grace period the calls may go on until the server drops them.
        grace = close_requested(max_age, &drain, &has_called, &*is_crowded) => {
            served.as_mut().graceful_shutdown();
            let grace_ended = async {
                match grace {
                    Some(grace) => sleep(grace).await,
                    None => pending().await,
                }
            };
            tokio::select! {
                outcome = served => outcome,
                () = drain.force_close.cancelled() => Ok(()),
                () = grace_ended => Ok(()),
            }
        }
    };
    if let Err(error) = outcome {
        tracing::debug!(%error, "a connection failed");
    }
}

/// Completes when a connection must close. Returns the grace period for its calls, if it has one.
async fn close_requested(
    max_age: Option<MaxConnectionAge>,
    drain: &Drain,
    has_called: &AtomicBool,
    is_crowded: &(dyn Fn() -> bool + Send + Sync),
) -> Option<Duration> {
    let too_old = async {
        match max_age {
            // Spread, so that connections that were opened together do not close together.
            Some(MaxConnectionAge { age, .. }) => {
                sleep(age.mul_f64(rand::random_range(0.9..1.1))).await;
            }
            None => pending().await,
        }
    };
    // Services connect before they have a call, so an unused connection is closed only while few are free.
    let unused = async {
        loop {
            sleep(FIRST_REQUEST_TIMEOUT).await;
            if has_called.load(Ordering::Relaxed) {
                pending::<()>().await;
            }
            if is_crowded() {
                return;
            }
        }
    };
    tokio::select! {
        () = too_old => max_age.map(|max_age| max_age.grace),
        () = unused => Some(Duration::ZERO),
        () = drain.stop_accepting.cancelled() => None,
    }
}

fn http2_builder(executor: TrackedExecutor) -> http2::Builder<TrackedExecutor> {
    let mut builder = http2::Builder::new(executor);
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        // A client may cancel all of its streams at once. h2's default of 20 would end the whole connection.
        .max_pending_accept_reset_streams(MAX_STREAMS as usize)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_header_list_size(MAX_HEADER_BYTES)
        .max_send_buf_size(MAX_SEND_BUFFER_BYTES)
        .keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT);
    builder
}

/// Runs the calls of one connection on the server's task tracker, with the slow-reader guard.
#[derive(Clone)]
struct TrackedExecutor {
    tasks: TaskTracker,
    reader_timeout: Duration,
    readers: ReaderHandoff,
}

impl<F: Future<Output: Send> + Send + 'static> Executor<F> for TrackedExecutor {
    fn execute(&self, call: F) {
        let reader = self.readers.take();
        self.tasks.spawn(SlowReaderTimeout::new(call, self.reader_timeout, reader));
    }
}
