//! Takes connections: the wire's settings, the first-byte guard, and an end that is always reached.
//!
//! Our own loop over hyper, because tonic's server applies grpc-timeout itself (to headers only, as
//! CANCELLED), waits for silent sockets when it ends, and can't bound what never speaks.

use std::convert::Infallible;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::response::Response;
use http::Request;
use hyper::body::Incoming;
use hyper::rt::Executor;
use hyper::server::conn::http2;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::{Service, ServiceExt as _};

use crate::context::Peer;
use crate::reader::Read;

/// <https://www.rfc-editor.org/rfc/rfc9113#section-3.4>
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// From connecting to the end of the preface.
const PREFACE_PATIENCE: Duration = Duration::from_secs(5);
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
#[derive(Clone, Copy)]
pub(crate) struct Bounds {
    pub(crate) connections: u32,
    /// How long a client may leave what is there for it unread.
    pub(crate) reader: Duration,
}

/// Accepts until the door closes. Connections and their calls run on `tasks`.
pub(crate) async fn accept(
    listener: TcpListener,
    router: Router,
    bounds: Bounds,
    door: Door,
    tasks: TaskTracker,
) {
    let room = Arc::new(Semaphore::new(bounds.connections as usize));
    loop {
        let accepted = async {
            let permit = Arc::clone(&room).acquire_owned().await.ok()?;
            // Out of file descriptors, or a peer that left again: neither ends the server.
            let (stream, peer) = listener.accept().await.ok()?;
            Some((stream, Peer(peer.ip()), permit))
        };
        let accepted = tokio::select! {
            () = door.closing.cancelled() => return,
            accepted = accepted => accepted,
        };
        let Some((stream, peer, permit)) = accepted else {
            sleep(ACCEPT_PAUSE).await;
            continue;
        };
        let router = router.clone().map_request(move |mut request: Request<Incoming>| {
            request.extensions_mut().insert(peer);
            request
        });
        let calls = OnTracker { tasks: tasks.clone(), patience: bounds.reader };
        let connection = connection(stream, router, door.clone(), calls);
        tasks.spawn(hold(permit, connection));
    }
}

async fn hold(_permit: OwnedSemaphorePermit, connection: impl Future<Output = ()>) {
    connection.await;
}

async fn connection<S>(mut stream: TcpStream, service: S, door: Door, calls: OnTracker)
where
    S: Service<Request<Incoming>, Response = Response, Error = Infallible, Future: Send>
        + Clone
        + Send
        + 'static,
{
    if let Err(error) = stream.set_nodelay(true) {
        return tracing::debug!(%error, "a connection was gone at once");
    }
    let mut preface = [0; PREFACE.len()];
    let spoke = timeout(PREFACE_PATIENCE, stream.read_exact(&mut preface));
    let spoke = tokio::select! {
        spoke = spoke => spoke,
        () = door.closing.cancelled() => return,
    };
    if !matches!(spoke, Ok(Ok(_))) || preface != *PREFACE {
        return tracing::debug!("a connection did not speak HTTP/2");
    }
    let io = TokioIo::new(Replay { seen: preface, next: 0, stream });
    let served = builder(calls).serve_connection(io, TowerToHyperService::new(service));
    let mut served = pin!(served);
    let ended = tokio::select! {
        ended = &mut served => ended,
        () = door.closing.cancelled() => {
            served.as_mut().graceful_shutdown();
            tokio::select! {
                ended = served => ended,
                () = door.closed.cancelled() => Ok(()),
            }
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection broke");
    }
}

fn builder(calls: OnTracker) -> http2::Builder<OnTracker> {
    let mut builder = http2::Builder::new(calls);
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
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
struct Replay {
    seen: [u8; PREFACE.len()],
    next: usize,
    stream: TcpStream,
}

impl AsyncRead for Replay {
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

impl AsyncWrite for Replay {
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
