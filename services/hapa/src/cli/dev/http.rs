//! HTTP readiness checks of local components.

use std::net::Ipv4Addr;
use std::time::Duration;

use hyper::Request;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::timeout;

const REQUEST_TIMEOUT: Duration = Duration::from_secs(2);

/// Whether `GET path` on a loopback port is answered with a status of 200 to 299 in time.
pub(super) async fn is_success(port: u16, path: &str, api_key: Option<&str>) -> bool {
    matches!(timeout(REQUEST_TIMEOUT, get(port, path, api_key)).await, Ok(Ok(true)))
}

async fn get(port: u16, path: &str, api_key: Option<&str>) -> anyhow::Result<bool> {
    let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let mut request = Request::get(path).header("host", format!("127.0.0.1:{port}"));
    if let Some(key) = api_key {
        request = request.header("x-api-key", key);
    }
    let request = request.body(String::new())?;
    tokio::select! {
        response = sender.send_request(request) => Ok(response?.status().is_success()),
        closed = connection => {
            closed?;
            Ok(false)
        }
    }
}
