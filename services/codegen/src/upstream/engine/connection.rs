//! The connections on which generations run: HTTP/1.1 connections that are polled together with their response, without a
//! task of their own. So everything that a socket has received is read in one poll, and dropping a response closes its
//! connection, which aborts the engine's work.
//!
//! Idle connections wait in a pool. An engine may close one at the moment when a request is sent on it. Such a request is
//! sent once more, over a new connection. A new connection that closes is a failure of the engine.

use std::fmt;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::{Context, Poll, Waker, ready};
use std::thread::{self, ThreadId};
use std::time::Duration;

use bytes::{Buf as _, Bytes, BytesMut};
use reqwest::Url;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_util::io::{poll_read_buf, poll_write_buf};

use crate::upstream::engine::TransportError;
use crate::upstream::engine::http1::{BodyFraming, ResponseHead, parse_head};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Below the 5 s after which uvicorn, which vLLM runs on, closes idle connections.
const POOL_IDLE_TIMEOUT: Duration = Duration::from_secs(4);
/// Maximum number of idle connections to one engine.
const MAX_IDLE_COUNT: usize = 256;
/// Space for one read from a socket: some tokens, or after a full read what an engine sends without a pause.
const READ_BYTES: usize = 4 * 1024;
const LARGE_READ_BYTES: usize = 32 * 1024;

/// A request. Clones share its bytes.
#[derive(Clone)]
pub(super) struct EngineRequestMessage {
    pub(super) head: Bytes,
    pub(super) body: Bytes,
}

/// The socket of a connection.
enum Socket {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// A connection without a request in progress, or with the one whose response is being read.
struct EngineConnection {
    socket: Socket,
    /// The rest of the request.
    unsent: bytes::buf::Chain<Bytes, Bytes>,
    /// What was written has not left the TLS session yet.
    needs_flush: bool,
    /// What was received and not read yet.
    received: BytesMut,
    /// The next read may use more space, because the last one was full.
    was_full: bool,
    /// The thread whose runtime polls the socket. Another thread would have to wait for that one.
    thread: ThreadId,
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
    pub(super) head: ResponseHead,
    connection: EngineConnection,
    pool: Arc<ConnectionPool>,
    /// Bytes of `received` that `poll_data` returned last.
    returned_len: usize,
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
        // Boxed, because connecting is rare and its future is large.
        let connection = Box::pin(self.connect()).await?;
        self.exchange(connection, request).await
    }

    async fn exchange(
        self: &Arc<Self>,
        mut connection: EngineConnection,
        EngineRequestMessage { head, body }: EngineRequestMessage,
    ) -> Result<PooledResponse, TransportError> {
        connection.unsent = head.chain(body);
        let head = poll_fn(|cx| connection.poll_head(cx)).await?;
        let pool = Arc::clone(self);
        Ok(PooledResponse { head, connection, pool, returned_len: 0, has_ended: false })
    }

    /// The open connection that was used last, if there is one of this thread.
    fn take_idle(&self) -> Option<EngineConnection> {
        let (mut idle, thread) = (self.lock(), thread::current().id());
        while !idle.is_empty() {
            let own = idle.iter().rposition(|(connection, _)| connection.thread == thread);
            let index = own.unwrap_or(idle.len() - 1);
            let (mut connection, since) = idle.remove(index);
            if since.elapsed() < POOL_IDLE_TIMEOUT && connection.is_open() {
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
                return Ok(EngineConnection::new(Socket::Plain(socket)));
            }
            let name = ServerName::try_from(self.host.clone()).map_err(|_| TransportError::Tls)?;
            let connector = self.tls_connector()?;
            let socket = connector.connect(name, socket).await.map_err(|_| TransportError::Tls)?;
            Ok(EngineConnection::new(Socket::Tls(Box::new(socket))))
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

impl EngineConnection {
    fn new(socket: Socket) -> EngineConnection {
        EngineConnection {
            socket,
            unsent: Bytes::new().chain(Bytes::new()),
            needs_flush: false,
            received: BytesMut::new(),
            was_full: false,
            thread: thread::current().id(),
        }
    }

    /// Whether an idle connection can be used: the peer has neither closed it nor sent anything.
    fn is_open(&mut self) -> bool {
        self.poll_receive(&mut Context::from_waker(Waker::noop())).is_pending()
    }

    /// Sends the request, and reads up to the end of the head of its response.
    fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Result<ResponseHead, TransportError>> {
        loop {
            // A peer that refuses a request may close its side before the request is complete, with its response sent.
            let sent = self.poll_send(cx);
            let received = self.poll_receive(cx);
            match parse_head(&self.received) {
                Ok(Some((head, len))) => {
                    self.received.advance(len);
                    return Poll::Ready(Ok(head));
                }
                Ok(None) => {}
                Err(_) => return Poll::Ready(Err(TransportError::Broken)),
            }
            return Poll::Ready(Err(match (ready!(received), sent) {
                (Ok(1..), _) => continue,
                // Only a connection that closes without an answer may have been closed before the request.
                _ if !self.received.is_empty() => TransportError::Broken,
                (Err(error), _) | (Ok(_), Poll::Ready(Err(error))) => {
                    TransportError::of_open_connection(&error)
                }
                (Ok(_), _) => TransportError::Closed,
            }));
        }
    }

    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.unsent.has_remaining() {
            let sent = ready!(poll_write_buf(Pin::new(&mut self.socket), cx, &mut self.unsent))?;
            if sent == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.needs_flush = true;
        }
        if self.needs_flush {
            ready!(Pin::new(&mut self.socket).poll_flush(cx))?;
            self.needs_flush = false;
        }
        Poll::Ready(Ok(()))
    }

    /// Reads what the socket has received, up to a limit. 0: the peer has closed.
    fn poll_receive(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let space = if self.was_full { LARGE_READ_BYTES } else { READ_BYTES };
        self.received.reserve(space);
        let before = self.received.capacity() - self.received.len();
        let read = ready!(poll_read_buf(Pin::new(&mut self.socket), cx, &mut self.received))?;
        self.was_full = read == before;
        Poll::Ready(Ok(read))
    }
}

impl PooledResponse {
    /// The next bytes of the body; `None` at its end. Everything that the socket has received is available without a
    /// further wake-up.
    pub(super) fn poll_data(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<&[u8], TransportError>>> {
        let read = ready!(self.poll_part(cx));
        if read.is_err() {
            self.has_ended = true;
            self.head.keeps_alive = false;
        }
        Poll::Ready(match read {
            Ok(0) => None,
            Ok(len) => Some(Ok(&self.connection.received[..len])),
            Err(error) => Some(Err(error)),
        })
    }

    /// Finds the next bytes of the body at the start of what was received. 0: the body has ended.
    fn poll_part(&mut self, cx: &mut Context<'_>) -> Poll<Result<usize, TransportError>> {
        let connection = &mut self.connection;
        connection.received.advance(std::mem::take(&mut self.returned_len));
        while !self.has_ended {
            let part = self.head.framing.next_part(&connection.received);
            let part = part.map_err(|_| TransportError::Broken)?;
            connection.received.advance(part.framing_len);
            self.has_ended = part.is_end;
            if part.data_len > 0 {
                self.returned_len = part.data_len;
                return Poll::Ready(Ok(part.data_len));
            }
            if part.is_end {
                break;
            }
            // The peer may answer before it has read the whole request. An error is noticed by reading.
            let _ = connection.poll_send(cx);
            let received = ready!(connection.poll_receive(cx));
            match received.map_err(|error| TransportError::of_open_connection(&error))? {
                0 if self.head.framing == BodyFraming::UntilClose => self.has_ended = true,
                0 => return Poll::Ready(Err(TransportError::Closed)),
                _ => {}
            }
        }
        Poll::Ready(Ok(0))
    }

    /// Returns the connection to the pool if the response has ended, or else closes it.
    pub(super) fn release(mut self) {
        self.connection.received.advance(self.returned_len);
        let is_reusable = self.has_ended
            && self.head.keeps_alive
            && self.connection.received.is_empty()
            && !self.connection.unsent.has_remaining()
            && !self.connection.needs_flush;
        if is_reusable {
            // An idle connection needs no buffer.
            self.connection.received = BytesMut::new();
            self.connection.was_full = false;
            self.pool.put_idle(self.connection);
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Socket::Plain(socket) => Pin::new(socket).poll_read(cx, buffer),
            Socket::Tls(socket) => Pin::new(socket).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Socket::Plain(socket) => Pin::new(socket).poll_write(cx, bytes),
            Socket::Tls(socket) => Pin::new(socket).poll_write(cx, bytes),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Socket::Plain(socket) => Pin::new(socket).poll_write_vectored(cx, buffers),
            Socket::Tls(socket) => Pin::new(socket).poll_write_vectored(cx, buffers),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Socket::Plain(socket) => socket.is_write_vectored(),
            Socket::Tls(socket) => socket.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Socket::Plain(socket) => Pin::new(socket).poll_flush(cx),
            Socket::Tls(socket) => Pin::new(socket).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Socket::Plain(socket) => Pin::new(socket).poll_shutdown(cx),
            Socket::Tls(socket) => Pin::new(socket).poll_shutdown(cx),
        }
    }
}

fn classify_connect(error: &io::Error) -> TransportError {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => TransportError::Refused,
        io::ErrorKind::TimedOut => TransportError::ConnectTimeout,
        _ => TransportError::Connect,
    }
}
