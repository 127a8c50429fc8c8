//! Takes connections: the wire's settings, the first-byte guard, and an end that is always reached.
//!
//! Our own loop over hyper, because tonic's server applies grpc-timeout itself (to headers only, as
//! CANCELLED), waits for silent sockets when it ends, and can't bound what never speaks.

use std::future::pending;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use futures_util::FutureExt as _;
use hapa_transport::tls::{Tls, speaks_h2};
use http::Request;
use hyper::body::Incoming;
use hyper::rt::Executor;
use hyper::server::conn::http2;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use ipnet::IpNet;
use rustls::pki_types::CertificateDer;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep, timeout_at};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::ServiceExt as _;

use crate::client_address::{Peer, Proven};
use crate::config::Config;
use crate::file_descriptors;
use crate::network_limit::NetworkLimit;
use crate::slow_reader::Read;

/// <https://www.rfc-editor.org/rfc/rfc9113#section-3.4>
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// How every TLS connection begins: a handshake's record.
const HANDSHAKE: u8 = 0x16;
/// From connecting to the end of the preface, TLS's handshake within it.
const PREFACE_PATIENCE: Duration = Duration::from_secs(5);
/// From a connection's begin to its first request, where fewer than half of all connections are free.
const FIRST_REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// After the door closed: for who had just connected to say so. Its call must not be lost, as it would be
/// where nobody can tell whether it was seen.
const LATE_PATIENCE: Duration = Duration::from_millis(500);
/// After an accept that failed, so that a lasting cause does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);
/// Without it, 3,000 small calls at once exhaust h2's budget for small frames and all fail.
const MAX_STREAMS: u32 = 256;
/// What one caller may send before a handler reads.
const STREAM_WINDOW: u32 = 64 * 1024;
const CONNECTION_WINDOW: u32 = 1024 * 1024;
/// Equal to the gateway's `max_request_headers_kb`: a larger header must fail alone there, since
/// h2 closes the shared connection over it.
const MAX_HEADERS: u32 = 60 * 1024;
/// What one stream may hold for a slow reader.
const SEND_BUFFER: usize = 16 * 1024;
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// When to stop.
#[derive(Clone, Default)]
pub(crate) struct Door {
    /// No new connections; open ones finish their calls.
    pub(crate) closing: CancellationToken,
    /// Every connection ends now.
    pub(crate) closed: CancellationToken,
}

/// What one server takes on.
#[derive(Clone)]
pub(crate) struct Bounds {
    pub(crate) connections: u32,
    /// Of one address; 0: no bound.
    pub(crate) per_address: u32,
    /// These may hold as many as there are.
    pub(crate) trusted_proxies: Vec<IpNet>,
    /// How long a client may leave what is there for it unread.
    pub(crate) reader: Duration,
    /// When a connection is asked to go, and how much longer it may take; none: never.
    pub(crate) age: Option<(Duration, Duration)>,
}

impl Bounds {
    pub(crate) fn of(config: &Config) -> Bounds {
        let age = config.max_connection_age_seconds;
        Bounds {
            connections: file_descriptors::connections(config),
            per_address: config.max_connections_per_address,
            trusted_proxies: config.trusted_proxies.clone(),
            reader: config.reader_timeout_seconds,
            age: (age > Duration::ZERO).then_some((age, config.request_timeout)),
        }
    }
}

/// Where connections come from, and what they must speak.
pub(crate) struct Socket {
    pub(crate) listener: TcpListener,
    /// None: plain HTTP/2.
    pub(crate) tls: Option<Tls>,
}

/// Accepts until the door closes. Connections and their calls run on `tasks`.
pub(crate) async fn accept(
    socket: Socket,
    router: Router,
    bounds: Bounds,
    door: Door,
    tasks: TaskTracker,
) {
    let room = Arc::new(Semaphore::new(bounds.connections as usize));
    let networks = NetworkLimit::new(bounds.per_address as usize, &bounds.trusted_proxies);
    let half = bounds.connections as usize / 2;
    let serve = |stream, peer: SocketAddr, permit| {
        let Some(counted) = networks.enter(peer.ip()) else {
            metrics::counter!("hapa_connections_refused_total").increment(1);
            return;
        };
        let calls = OnTracker { tasks: tasks.clone(), patience: bounds.reader };
        let peer = Peer(peer.ip());
        let room = Arc::clone(&room);
        let is_crowded = Box::new(move || room.available_permits() < half);
        let life = Life { peer, age: bounds.age, door: door.clone(), calls, is_crowded };
        let connection = connection(stream, socket.tls.clone(), router.clone(), life);
        tasks.spawn(hold((permit, counted), connection));
    };
    loop {
        let accepted = async {
            let permit = Arc::clone(&room).acquire_owned().await.ok()?;
            // Out of file descriptors, or a peer that left again: neither ends the server.
            let (stream, peer) = socket.listener.accept().await.ok()?;
            Some((stream, peer, permit))
        };
        let accepted = tokio::select! {
            () = door.closing.cancelled() => break,
            accepted = accepted => accepted,
        };
        match accepted {
            Some((stream, peer, permit)) => serve(stream, peer, permit),
            None => sleep(ACCEPT_PAUSE).await,
        }
    }
    // For the kernel they are connected already, and may have sent their calls.
    while let Ok(permit) = Arc::clone(&room).try_acquire_owned()
        && let Some(Ok((stream, peer))) = socket.listener.accept().now_or_never()
    {
        serve(stream, peer, permit);
    }
}

/// What one connection is given on its way.
struct Life {
    peer: Peer,
    age: Option<(Duration, Duration)>,
    door: Door,
    calls: OnTracker,
    /// Whether the server has few places left for connections.
    is_crowded: Box<dyn Fn() -> bool + Send + Sync>,
}

async fn hold<P>(_permits: P, connection: impl Future<Output = ()>) {
    connection.await;
}

async fn connection(stream: TcpStream, tls: Option<Tls>, router: Router, life: Life) {
    if let Err(error) = stream.set_nodelay(true) {
        return tracing::debug!(%error, "a connection was gone at once");
    }
    let until = Instant::now() + PREFACE_PATIENCE;
    let closing = life.door.closing.clone();
    let late = async {
        closing.cancelled().await;
        sleep(LATE_PATIENCE).await;
    };
    let Some(tls) = tls else {
        let opened = timeout_at(until, opened(stream));
        let opened = tokio::select! {
            opened = opened => opened.ok().flatten(),
            () = late => return,
        };
        let Some(io) = opened else {
            return tracing::debug!("a connection did not speak HTTP/2");
        };
        return serve(io, None, router, life).await;
    };
    let secured = timeout_at(until, secured(stream, &tls));
    let secured = tokio::select! {
        secured = secured => secured.unwrap_or_else(|_| Err("it was too slow".to_owned())),
        () = late => return,
    };
    match secured {
        Ok((io, proven)) => serve(io, Some(proven), router, life).await,
        Err(why) => {
            metrics::counter!("hapa_handshakes_refused_total").increment(1);
            tracing::debug!(why, "a connection was refused");
        }
    }
}

/// A connection whose first bytes are those of HTTP/2.
async fn opened<I: AsyncRead + Unpin>(mut stream: I) -> Option<Replay<I>> {
    let mut preface = [0; PREFACE.len()];
    stream.read_exact(&mut preface).await.ok()?;
    (preface == *PREFACE).then_some(Replay { seen: preface, next: 0, stream })
}

/// A connection over TLS, and what the certificate at its other end proves.
async fn secured(
    stream: TcpStream,
    tls: &Tls,
) -> Result<(Replay<TlsStream<TcpStream>>, Proven), String> {
    let mut first = [0];
    // Plain text costs one byte and no handshake.
    if !matches!(stream.peek(&mut first).await, Ok(1)) || first != [HANDSHAKE] {
        return Err("it did not speak TLS".to_owned());
    }
    let acceptor = TlsAcceptor::from(tls.server());
    let stream = acceptor.accept(stream).await.map_err(|error| error.to_string())?;
    let session = stream.get_ref().1;
    if !speaks_h2(session.alpn_protocol()) {
        return Err("it did not offer HTTP/2".to_owned());
    }
    let certificate = session.peer_certificates().and_then(<[CertificateDer<'_>]>::first);
    let proven = certificate.map(|certificate| tls.proven(certificate)).unwrap_or_default();
    let io = opened(stream).await.ok_or("it did not speak HTTP/2")?;
    Ok((io, Proven(proven.into())))
}

async fn serve<I>(io: Replay<I>, proven: Option<Proven>, router: Router, life: Life)
where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let Life { peer, age, door, calls, is_crowded } = life;
    let has_called = Arc::new(AtomicBool::new(false));
    let called = Arc::clone(&has_called);
    let service = router.map_request(move |mut request: Request<Incoming>| {
        called.store(true, Ordering::Relaxed);
        request.extensions_mut().insert(peer);
        if let Some(proven) = &proven {
            request.extensions_mut().insert(proven.clone());
        }
        request
    });
    let io = TokioIo::new(io);
    let served = builder(calls).serve_connection(io, TowerToHyperService::new(service));
    let mut served = pin!(served);
    let ended = tokio::select! {
        ended = &mut served => ended,
        // None: until the server drops what is left.
        bound = asked_to_go(age, &door, &has_called, &*is_crowded) => {
            served.as_mut().graceful_shutdown();
            let late = async {
                match bound {
                    Some(more) => sleep(more).await,
                    None => pending().await,
                }
            };
            tokio::select! {
                ended = served => ended,
                () = door.closed.cancelled() => Ok(()),
                () = late => Ok(()),
            }
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection broke");
    }
}

/// Returns when a connection has to go, with how much longer its calls may take.
async fn asked_to_go(
    age: Option<(Duration, Duration)>,
    door: &Door,
    has_called: &AtomicBool,
    is_crowded: &(dyn Fn() -> bool + Send + Sync),
) -> Option<Duration> {
    let aged = async {
        match age {
            // Not all at once that came at once.
            Some((age, _)) => sleep(age.mul_f64(rand::random_range(0.9..1.1))).await,
            None => pending().await,
        }
    };
    // Services connect before they have a call to make, so silence costs a connection only where others wait.
    let silent = async {
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
        () = aged => age.map(|(_, more)| more),
        () = silent => Some(Duration::ZERO),
        () = door.closing.cancelled() => None,
    }
}

fn builder(calls: OnTracker) -> http2::Builder<OnTracker> {
    let mut builder = http2::Builder::new(calls);
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        // A client may cancel all that it has open at once; h2's own limit of 20 would end its other calls too.
        .max_pending_accept_reset_streams(MAX_STREAMS as usize)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_header_list_size(MAX_HEADERS)
        .max_send_buf_size(SEND_BUFFER)
        .keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT);
    builder
}

/// hyper's calls, on the server's tracker, each for as long as its client reads.
#[derive(Clone)]
struct OnTracker {
    tasks: TaskTracker,
    patience: Duration,
}

impl<F: Future<Output: Send> + Send + 'static> Executor<F> for OnTracker {
    fn execute(&self, call: F) {
        self.tasks.spawn(Read::new(call, self.patience));
    }
}

/// A stream whose preface was read already, as if it had not been.
struct Replay<I> {
    seen: [u8; PREFACE.len()],
    next: usize,
    stream: I,
}

impl<I: AsyncRead + Unpin> AsyncRead for Replay<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let rest = &self.seen[self.next..];
        if rest.is_empty() {
            return Pin::new(&mut self.stream).poll_read(cx, buffer);
        }
        let taken = rest.len().min(buffer.remaining());
        buffer.put_slice(&rest[..taken]);
        self.next += taken;
        Poll::Ready(Ok(()))
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for Replay<I> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
