//! HTTP readiness checks of local components.

use std::net::Ipv4Addr;
use std::pin::pin;
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
    let mut response = pin!(sender.send_request(request));
    let response = tokio::select! {
        response = &mut response => response?,
        closed = connection => {
            // A server that closes the connection after its response completes both futures at once.
            closed?;
            response.await?
        }
    };
    Ok(response.status().is_success())
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    use super::*;

    /// Serves one request with a response after which the server closes the connection.
    async fn check(response: &str) -> bool {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let serve = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; 1_024];
            let length = stream.read(&mut request).await.unwrap();
            stream.write_all(response.as_bytes()).await.unwrap();
            String::from_utf8_lossy(&request[..length]).into_owned()
        };
        let (request, result) = tokio::join!(serve, is_success(port, "/readyz", Some("key")));
        assert!(request.starts_with("GET /readyz HTTP/1.1\r\n"), "{request}");
        assert!(request.contains("x-api-key: key\r\n"), "{request}");
        result
    }

    #[tokio::test]
    async fn only_a_response_with_a_success_status_is_a_success() {
        let close = "connection: close\r\ncontent-length: 0\r\n\r\n";
        assert!(check(&format!("HTTP/1.1 200 OK\r\n{close}")).await);
        assert!(!check(&format!("HTTP/1.1 503 Service Unavailable\r\n{close}")).await);
        assert!(!check("").await);
    }
}
