//! Client connections over HTTP/1.1 and HTTP/2 without TLS, to loopback only.

use std::net::Ipv4Addr;

use anyhow::Context as _;
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::net::TcpStream;
use tokio::task::AbortHandle;

/// More than any stream of a load leaves unread.
const STREAM_WINDOW_BYTES: u32 = 1 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 8 << 20;

enum Sender {
    Http1(http1::SendRequest<Full<Bytes>>),
    Http2(http2::SendRequest<Full<Bytes>>),
}

/// A connection, or one of several handles of an HTTP/2 connection.
pub(crate) struct Connection {
    sender: Sender,
    task: AbortHandle,
}

impl Connection {
    #[expect(clippy::disallowed_methods, reason = "a connection's task ends with the connection")]
    pub(crate) async fn open(port: u16, is_http2: bool) -> anyhow::Result<Self> {
        let socket = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?;
        socket.set_nodelay(true)?;
        let socket = TokioIo::new(socket);
        if is_http2 {
            let (sender, connection) = http2::Builder::new(TokioExecutor::new())
                .timer(TokioTimer::new())
                .initial_stream_window_size(STREAM_WINDOW_BYTES)
                .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
                .handshake(socket)
                .await?;
            let task = tokio::spawn(async { drop(connection.await) }).abort_handle();
            return Ok(Connection { sender: Sender::Http2(sender), task });
        }
        let (sender, connection) = http1::handshake(socket).await?;
        let task = tokio::spawn(async { drop(connection.await) }).abort_handle();
        Ok(Connection { sender: Sender::Http1(sender), task })
    }

    /// Another handle of an HTTP/2 connection.
    pub(crate) fn share(&self) -> Option<Self> {
        match &self.sender {
            Sender::Http1(_) => None,
            Sender::Http2(sender) => {
                let (sender, task) = (Sender::Http2(sender.clone()), self.task.clone());
                Some(Connection { sender, task })
            }
        }
    }

    pub(crate) fn is_http1(&self) -> bool {
        matches!(self.sender, Sender::Http1(_))
    }

    pub(crate) async fn is_ready(&mut self) -> bool {
        match &mut self.sender {
            Sender::Http1(sender) => sender.ready().await.is_ok(),
            Sender::Http2(sender) => sender.ready().await.is_ok(),
        }
    }

    pub(crate) async fn send(
        &mut self,
        request: Request<Full<Bytes>>,
    ) -> hyper::Result<Response<Incoming>> {
        match &mut self.sender {
            Sender::Http1(sender) => sender.send_request(request).await,
            Sender::Http2(sender) => sender.send_request(request).await,
        }
    }

    /// Closes the socket of an HTTP/1.1 connection. A stream of HTTP/2 is reset by the drop of its response.
    pub(crate) fn close_http1(&self) {
        if self.is_http1() {
            self.task.abort();
        }
    }
}

/// The body of a reply to GET.
pub(crate) async fn get(port: u16, path: &str) -> anyhow::Result<Bytes> {
    let mut connection = Connection::open(port, false).await?;
    let request = Request::get(path).header("host", "localhost").body(Full::default())?;
    let response = connection.send(request).await.context("the simulator did not answer")?;
    Ok(response.into_body().collect().await?.to_bytes())
}
