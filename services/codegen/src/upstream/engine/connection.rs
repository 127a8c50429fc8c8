//! The connections on which generations run: HTTP/1.1 connections that are polled together with their response, without a
//! task of their own. So everything that a socket has received is read in one poll, and dropping a response closes its
//! connection, which aborts the engine's work.
//!
//! Idle connections wait in a pool. An engine may close one at the moment when a request is sent on it. Such a request is
//! sent once more, over a new connection. A new connection that closes is a failure of the engine.

use std::fmt;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body::Body as _;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use reqwest::Url;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::upstream::engine::TransportError;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Below the 5 s after which uvicorn, which vLLM runs on, closes idle connections.
const POOL_IDLE_TIMEOUT: Duration = Duration::from_secs(4);
/// Maximum number of idle connections to one engine.
const MAX_IDLE_COUNT: usize = 256;

pub(super) type EngineRequestMessage = http::Request<Full<Bytes>>;

type Driver<S> = http1::Connection<TokioIo<S>, Full<Bytes>>;

/// Performs the input and output of one connection.
enum ConnectionDriver {
    Plain(Box<Driver<TcpStream>>),
    Tls(Box<Driver<TlsStream<TcpStream>>>),
}

/// A connection without a request in progress, or with the one whose response is being read.
struct EngineConnection {
    sender: http1::SendRequest<Full<Bytes>>,
    /// `None` after the connection has ended.
    driver: Option<ConnectionDriver>,
}

/// The connections to one engine.
pub(super) struct ConnectionPool {
    host: String,
    port: u16,
    /// Overrides the DNS lookup of the host name.
    address: Option<SocketAddr>,
    uses_tls: bool,
    tls: OnceLock<TlsConnector>,
    /// The latest last.
    idle: Mutex<Vec<(EngineConnection, Instant)>>,
}

/// A response, with the connection that it is read from.
pub(super) struct PooledResponse {
    pub(super) head: http::response::Parts,
    body: Incoming,
    connection: EngineConnection,
    pool: Arc<ConnectionPool>,
    has_ended: bool,
}

impl fmt::Debug for ConnectionPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConnectionPool").field("port", &self.port).finish_non_exhaustive()
    }
}

impl fmt::Debug for PooledResponse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PooledResponse").field("status", &self.head.status).finish_non_exhaustive()
    }
}

impl ConnectionPool {
    /// For an engine at this base URL.
    pub(super) fn new(base: &Url, address: Option<SocketAddr>) -> ConnectionPool {
        ConnectionPool {
            // Without the brackets of an IPv6 address.
            host: base.host_str().unwrap_or_default().trim_matches(['[', ']']).to_owned(),
            port: base.port_or_known_default().unwrap_or(80),
            address,
            uses_tls: base.scheme() == "https",
            tls: OnceLock::new(),
            idle: Mutex::default(),
        }
    }

    /// Sends a request and waits for the head of its response. Cancel-safe: dropping the future closes the connection.
    pub(super) async fn send(
        self: &Arc<Self>,
        request: EngineRequestMessage,
    ) -> Result<PooledResponse, TransportError> {
        if let Some(connection) = self.take_idle() {
            let result = self.exchange(connection, request.clone()).await;
            if !matches!(result, Err(TransportError::Closed)) {
                return result;
            }
        }
        self.exchange(self.connect().await?, request).await
    }

    async fn exchange(
        self: &Arc<Self>,
        mut connection: EngineConnection,
        request: EngineRequestMessage,
    ) -> Result<PooledResponse, TransportError> {
        let mut response = Box::pin(connection.sender.send_request(request));
        let driver = &mut connection.driver;
        let response = poll_fn(|cx| {
            // Reads what the engine has sent, and writes the request.
            let has_ended = poll_driver(driver, cx).is_ready();
            match response.as_mut().poll(cx) {
                Poll::Pending if has_ended => Poll::Ready(Err(TransportError::Closed)),
                Poll::Pending => Poll::Pending,
                Poll::Ready(result) => {
                    Poll::Ready(result.map_err(|error| TransportError::classify_hyper(&error)))
                }
            }
        })
        .await;
        let (head, body) = response?.into_parts();
        Ok(PooledResponse { head, body, connection, pool: Arc::clone(self), has_ended: false })
    }

    /// The connection that was used last, and is still open.
    fn take_idle(&self) -> Option<EngineConnection> {
        let mut idle = self.lock();
        while let Some((mut connection, since)) = idle.pop() {
            if since.elapsed() >= POOL_IDLE_TIMEOUT {
                idle.clear();
                return None;
            }
            let cx = &mut Context::from_waker(Waker::noop());
            if poll_driver(&mut connection.driver, cx).is_pending() && connection.sender.is_ready()
            {
                return Some(connection);
            }
        }
        None
    }

    /// Closes the connections that have been idle too long.
    pub(super) fn evict_idle(&self) {
        self.lock().retain(|(_, since)| since.elapsed() < POOL_IDLE_TIMEOUT);
    }

    fn put_idle(&self, connection: EngineConnection) {
        let mut idle = self.lock();
        if idle.len() >= MAX_IDLE_COUNT {
            idle.remove(0);
        }
        idle.push((connection, Instant::now()));
    }

    async fn connect(&self) -> Result<EngineConnection, TransportError> {
        let connect = async {
            let socket = self.connect_socket().await?;
            let _ = socket.set_nodelay(true);
            if !self.uses_tls {
                let (sender, driver) = handshake(socket).await?;
                let driver = Some(ConnectionDriver::Plain(Box::new(driver)));
                return Ok(EngineConnection { sender, driver });
            }
            let name = ServerName::try_from(self.host.clone()).map_err(|_| TransportError::Tls)?;
            let connector = self.tls_connector()?;
            let socket = connector.connect(name, socket).await.map_err(|_| TransportError::Tls)?;
            let (sender, driver) = handshake(socket).await?;
            let driver = Some(ConnectionDriver::Tls(Box::new(driver)));
            Ok(EngineConnection { sender, driver })
        };
        timeout(CONNECT_TIMEOUT, connect).await.map_err(|_| TransportError::ConnectTimeout)?
    }

    async fn connect_socket(&self) -> Result<TcpStream, TransportError> {
        if let Some(address) = self.address {
            return TcpStream::connect(address).await.map_err(|error| classify_connect(&error));
        }
        let found = tokio::net::lookup_host((self.host.as_str(), self.port)).await;
        let addresses: Vec<_> = found.map_err(|_| TransportError::NoAddress)?.collect();
        if addresses.is_empty() {
            return Err(TransportError::NoAddress);
        }
        TcpStream::connect(&addresses[..]).await.map_err(|error| classify_connect(&error))
    }

    /// Built when it is first needed, because reading the system's authorities takes time.
    fn tls_connector(&self) -> Result<&TlsConnector, TransportError> {
        if self.tls.get().is_none() {
            let mut config =
                hapa_transport::tls::trust_roots(None).map_err(|_| TransportError::Tls)?;
            config.alpn_protocols = vec![b"http/1.1".to_vec()];
            let _ = self.tls.set(TlsConnector::from(Arc::new(config)));
        }
        self.tls.get().ok_or(TransportError::Tls)
    }

    fn lock(&self) -> MutexGuard<'_, Vec<(EngineConnection, Instant)>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PooledResponse {
    /// The next chunk of the body; `None` at its end. Everything that the socket has received is available without a
    /// further wake-up.
    pub(super) fn poll_chunk(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Bytes, TransportError>>> {
        loop {
            if self.has_ended {
                return Poll::Ready(None);
            }
            let mut frame = Pin::new(&mut self.body).poll_frame(cx);
            if frame.is_pending() {
                let driver_has_ended = poll_driver(&mut self.connection.driver, cx).is_ready();
                frame = Pin::new(&mut self.body).poll_frame(cx);
                if frame.is_pending() && driver_has_ended {
                    self.has_ended = true;
                    return Poll::Ready(Some(Err(TransportError::Closed)));
                }
            }
            match ready!(frame) {
                Some(Ok(frame)) => {
                    if let Ok(bytes) = frame.into_data() {
                        return Poll::Ready(Some(Ok(bytes)));
                    }
                }
                Some(Err(error)) => {
                    self.has_ended = true;
                    self.connection.driver = None;
                    return Poll::Ready(Some(Err(TransportError::classify_hyper(&error))));
                }
                None => self.has_ended = true,
            }
        }
    }

    /// Returns the connection to the pool if the response has ended, or else closes it.
    pub(super) fn release(mut self) {
        if !self.has_ended || self.connection.driver.is_none() {
            return;
        }
        // Reads the end of the message, after which the connection accepts another request.
        let cx = &mut Context::from_waker(Waker::noop());
        if poll_driver(&mut self.connection.driver, cx).is_pending()
            && self.connection.sender.is_ready()
        {
            self.pool.put_idle(self.connection);
        }
    }
}

async fn handshake<S>(
    socket: S,
) -> Result<(http1::SendRequest<Full<Bytes>>, Driver<S>), TransportError>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin + 'static,
{
    let handshake = http1::handshake(TokioIo::new(socket)).await;
    handshake.map_err(|_| TransportError::Connect)
}

/// Ready when the connection has ended.
fn poll_driver(driver: &mut Option<ConnectionDriver>, cx: &mut Context<'_>) -> Poll<()> {
    let poll = match driver {
        None => return Poll::Ready(()),
        Some(ConnectionDriver::Plain(driver)) => Pin::new(driver).poll(cx),
        Some(ConnectionDriver::Tls(driver)) => Pin::new(driver).poll(cx),
    };
    // The error reaches the response too.
    let _ = ready!(poll);
    *driver = None;
    Poll::Ready(())
}

fn classify_connect(error: &std::io::Error) -> TransportError {
    match error.kind() {
        std::io::ErrorKind::ConnectionRefused => TransportError::Refused,
        std::io::ErrorKind::TimedOut => TransportError::ConnectTimeout,
        _ => TransportError::Connect,
    }
}
