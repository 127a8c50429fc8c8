//! One connection to one address: TCP, TLS where it is asked for, and HTTP/2, all within one bound.
//!
//! It is one when the other end has spoken: who only listens does not serve yet, or not any more, and a
//! call that went there would wait or be lost.

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

use crate::tls::{Tls, speaks_h2};

const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);

/// How the other end is believed, and what is shown to it.
#[derive(Clone, Debug)]
pub enum Secure {
    /// Nothing: what is dialled is plain.
    No,
    /// This process's certificate, to who has the name that is dialled or one of these roles.
    Mutual(Tls, Vec<String>),
    /// No certificate, to who has the name that is dialled.
    Believing(Arc<ClientConfig>),
}

pub struct Dial {
    patience: Duration,
    /// The name of the other end, where it has to prove it.
    name: Option<ServerName<'static>>,
    secure: Secure,
}

impl Dial {
    pub fn new(
        host: &str,
        https: bool,
        secure: Secure,
        patience: Duration,
    ) -> anyhow::Result<Dial> {
        if https == matches!(secure, Secure::No) {
            anyhow::bail!(
                "an address begins with https:// where certificates are set, and with http:// where none are"
            );
        }
        let name = ServerName::try_from(host.to_owned());
        let name = https.then_some(name).transpose();
        let name = name.with_context(|| format!("{host} can't be a name in a certificate"))?;
        Ok(Dial { patience, name, secure })
    }

    pub async fn dial(&self, address: SocketAddr) -> anyhow::Result<SendRequest<Body>> {
        let open = timeout(self.patience, self.open(address)).await;
        open.with_context(|| format!("no connection within {} s", self.patience.as_secs()))?
    }

    async fn open(&self, address: SocketAddr) -> anyhow::Result<SendRequest<Body>> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        // As they are now: files may have been replaced since the last time.
        let config = match &self.secure {
            Secure::No => None,
            Secure::Mutual(tls, roles) => Some(Arc::new(tls.client(roles)?)),
            Secure::Believing(config) => Some(Arc::clone(config)),
        };
        let (Some(config), Some(name)) = (config, &self.name) else {
            return speak(stream).await;
        };
        let stream = TlsConnector::from(config).connect(name.clone(), stream).await?;
        let speaks = speaks_h2(stream.get_ref().1.alpn_protocol());
        anyhow::ensure!(speaks, "the other end speaks TLS, but not HTTP/2");
        speak(stream).await
    }
}

async fn speak<I>(io: I) -> anyhow::Result<SendRequest<Body>>
where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true);
    let (tell, heard) = oneshot::channel();
    let mut tell = Some(tell);
    let io = InspectReader::new(io, move |bytes: &[u8]| {
        if let Some(tell) = tell.take_if(|_| !bytes.is_empty()) {
            // Nobody waits where it came too late.
            let _ = tell.send(());
        }
    });
    let (sender, connection) = builder.handshake(TokioIo::new(io)).await?;
    // No task of the server's: it ends with the last of its calls and of those who could make one.
    TokioExecutor::new().execute(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "a connection to a peer broke");
        }
    });
    heard.await.context("the other end closed the connection and said nothing")?;
    Ok(sender)
}
