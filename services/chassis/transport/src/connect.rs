//! Connects to one address: TCP, optional TLS, and HTTP/2, with one timeout for all of them.
//!
//! A connection counts as established after the peer's first bytes (its HTTP/2 SETTINGS). A socket that only accepts TCP
//! may belong to a process that is starting or shutting down.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use hyper::client::conn::http2::{self, SendRequest};
use hyper::rt::Executor as _;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_util::io::InspectReader;
use tonic::body::Body;

use crate::tls::{Tls, negotiated_h2};

const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);

/// The transport security of a connection.
#[derive(Clone, Debug)]
pub enum TransportSecurity {
    /// Plaintext.
    Plaintext,
    /// Mutual TLS with this process's certificate. The peer's certificate must have the host name or one of these roles.
    MutualTls(Tls, Vec<String>),
    /// TLS without a client certificate. The peer's certificate must have the host name.
    ServerTls(Arc<ClientConfig>),
}

/// Connects to the addresses of one host name.
pub(crate) struct Connector {
    timeout: Duration,
    /// The host name that the peer's certificate must have; `None` for plaintext.
    server_name: Option<ServerName<'static>>,
    secure: TransportSecurity,
}

impl Connector {
    /// A connector. Fails if the scheme does not match the transport security.
    pub(crate) fn new(
        host: &str,
        is_tls: bool,
        secure: TransportSecurity,
        timeout: Duration,
    ) -> anyhow::Result<Connector> {
        if is_tls == matches!(secure, TransportSecurity::Plaintext) {
            anyhow::bail!(
                "an address must begin with https:// if certificates are configured, otherwise with http://"
            );
        }
        let name = ServerName::try_from(host.to_owned());
        let name = is_tls.then_some(name).transpose();
        let server_name = name.with_context(|| format!("{host} is no valid server name"))?;
        Ok(Connector { timeout, server_name, secure })
    }

    /// Connects to an address within the timeout.
    pub(crate) async fn connect(&self, address: SocketAddr) -> anyhow::Result<SendRequest<Body>> {
        let open = timeout(self.timeout, self.open(address)).await;
        open.with_context(|| format!("no connection within {} s", self.timeout.as_secs()))?
    }

    async fn open(&self, address: SocketAddr) -> anyhow::Result<SendRequest<Body>> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        // Read for each connection, because the certificate files may have been replaced.
        let config = match &self.secure {
            TransportSecurity::Plaintext => None,
            TransportSecurity::MutualTls(tls, roles) => Some(Arc::new(tls.client(roles)?)),
            TransportSecurity::ServerTls(config) => Some(Arc::clone(config)),
        };
        let (Some(config), Some(name)) = (config, &self.server_name) else {
            return http2_handshake(stream).await;
        };
        let stream = TlsConnector::from(config).connect(name.clone(), stream).await?;
        let is_h2 = negotiated_h2(stream.get_ref().1.alpn_protocol());
        anyhow::ensure!(is_h2, "the peer supports TLS, but not HTTP/2");
        http2_handshake(stream).await
    }
}

async fn http2_handshake<I>(io: I) -> anyhow::Result<SendRequest<Body>>
where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true);
    let (on_first_byte, first_byte) = oneshot::channel();
    let mut on_first_byte = Some(on_first_byte);
    let io = InspectReader::new(io, move |bytes: &[u8]| {
        if let Some(notify) = on_first_byte.take_if(|_| !bytes.is_empty()) {
            // Fails if the connect timeout has expired.
            let _ = notify.send(());
        }
    });
    let (sender, connection) = builder.handshake(TokioIo::new(io)).await?;
    // Not on the server's task tracker: the task ends with the last call and the last handle of the connection.
    TokioExecutor::new().execute(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "a connection to a peer failed");
        }
    });
    first_byte.await.context("the peer closed the connection without sending data")?;
    Ok(sender)
}
