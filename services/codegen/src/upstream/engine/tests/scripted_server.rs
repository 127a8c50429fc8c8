//! A scripted HTTP server for tests of the engine client.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

#[derive(Clone, Debug)]
pub(in crate::upstream) struct Received {
    /// Path and query.
    pub(in crate::upstream) path: String,
    pub(in crate::upstream) head: String,
    /// `null` if it is not JSON.
    pub(in crate::upstream) body: Value,
    /// Number of requests before this one.
    pub(in crate::upstream) index: usize,
}

pub(in crate::upstream) enum Reply {
    /// Status, content type and body.
    Whole(u16, &'static str, String),
    /// The connection closes without a byte.
    Close,
    /// The connection closes in the middle of the body.
    CutBody,
}

impl Reply {
    pub(in crate::upstream) fn json(status: u16, body: &Value) -> Reply {
        Reply::Whole(status, "application/json", body.to_string())
    }

    /// A stream of these events.
    pub(in crate::upstream) fn events(events: &[&str]) -> Reply {
        let body = events.iter().flat_map(|event| ["data: ", event, "\n\n"]).collect();
        Reply::Whole(200, "text/event-stream", body)
    }

    fn bytes(&self) -> String {
        match self {
            Reply::Whole(status, kind, body) => format!(
                "HTTP/1.1 {status} S\r\ncontent-type: {kind}\r\ncontent-length: {}\r\n\r\n{body}",
                body.len()
            ),
            Reply::Close => String::new(),
            Reply::CutBody => "HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\ndata: ".to_owned(),
        }
    }
}

type Script = dyn Fn(&Received) -> Reply + Send + Sync;

/// A running server. Dropping it stops it.
pub(in crate::upstream) struct ScriptedServer {
    pub(in crate::upstream) address: SocketAddr,
    received: Arc<Mutex<Vec<Received>>>,
    _serving: JoinSet<()>,
}

impl ScriptedServer {
    pub(in crate::upstream) async fn start(
        script: impl Fn(&Received) -> Reply + Send + Sync + 'static,
    ) -> ScriptedServer {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let received = Arc::<Mutex<Vec<Received>>>::default();
        let (script, log): (Arc<Script>, _) = (Arc::new(script), Arc::clone(&received));
        let mut serving = JoinSet::new();
        serving.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.spawn(serve(stream, Arc::clone(&script), Arc::clone(&log)));
            }
        });
        ScriptedServer { address, received, _serving: serving }
    }

    /// The requests to a path, without its query.
    pub(in crate::upstream) fn received(&self, path: &str) -> Vec<Received> {
        let all = self.received.lock().unwrap_or_else(PoisonError::into_inner);
        all.iter().filter(|one| one.path.split('?').next() == Some(path)).cloned().collect()
    }
}

async fn serve(mut stream: TcpStream, script: Arc<Script>, log: Arc<Mutex<Vec<Received>>>) {
    let mut buffer = Vec::new();
    while let Some(mut request) = read(&mut stream, &mut buffer).await {
        {
            let mut log = log.lock().unwrap_or_else(PoisonError::into_inner);
            request.index = log.len();
            log.push(request.clone());
        }
        let reply = script(&request);
        let written = stream.write_all(reply.bytes().as_bytes()).await;
        if written.is_err() || !matches!(reply, Reply::Whole(..)) {
            return;
        }
    }
}

async fn read(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> Option<Received> {
    let end = loop {
        if let Some(end) = buffer.windows(4).position(|four| four == b"\r\n\r\n") {
            break end + 4;
        }
        if stream.read_buf(buffer).await.ok()? == 0 {
            return None;
        }
    };
    let head = String::from_utf8_lossy(&buffer[..end]).to_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
    let length: usize = length.and_then(|text| text.parse().ok()).unwrap_or(0);
    while buffer.len() < end + length {
        if stream.read_buf(buffer).await.ok()? == 0 {
            return None;
        }
    }
    let path = head.split(' ').nth(1)?.to_owned();
    let body = serde_json::from_slice(&buffer[end..end + length]).unwrap_or_default();
    buffer.drain(..end + length);
    Some(Received { path, head, body, index: 0 })
}
