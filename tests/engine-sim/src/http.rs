//! A minimal HTTP/1.1: requests with a body, and responses in one piece.
//!
//! Invariant: the read half is always polled. [`Reader::disconnected`] reads from it during a response, and
//! so detects a client that closes the connection during silence.

use std::io::Write as _;

use tokio::io::AsyncReadExt as _;
use tokio::net::tcp::ReadHalf;

const MAX_HEAD_BYTES: usize = 64 * 1024;
const MAX_BODY_BYTES: usize = 64 * 1024 * 1024;

#[derive(Debug, Default)]
pub(super) struct Request {
    pub(super) method: String,
    pub(super) path: String,
    pub(super) headers: Vec<(String, String)>,
    pub(super) body: Vec<u8>,
}

impl Request {
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    pub(super) fn has(&self, name: &str, word: &str) -> bool {
        let value = self.header(name).unwrap_or_default();
        value.split(',').any(|part| part.trim().eq_ignore_ascii_case(word))
    }

    fn parse(head: &str) -> Option<Self> {
        let mut lines = head.split("\r\n");
        let mut first = lines.next()?.split(' ');
        let method = first.next()?.to_owned();
        let path = first.next()?.split('?').next()?.to_owned();
        let header = |line: &str| {
            let (name, value) = line.split_once(':')?;
            Some((name.to_ascii_lowercase(), value.trim().to_owned()))
        };
        let headers = lines.map(header).collect::<Option<_>>()?;
        Some(Self { method, path, headers, body: Vec::new() })
    }
}

pub(super) struct Reader<'a> {
    half: ReadHalf<'a>,
    buffer: Vec<u8>,
}

impl<'a> Reader<'a> {
    pub(super) fn new(half: ReadHalf<'a>) -> Self {
        Self { half, buffer: Vec::new() }
    }

    /// The next request; `None` if the connection ended or the request is not HTTP/1.1.
    pub(super) async fn request(&mut self) -> Option<Request> {
        let head = self.until(b"\r\n\r\n").await?;
        let mut request = Request::parse(std::str::from_utf8(&head).ok()?)?;
        request.body = if request.has("transfer-encoding", "chunked") {
            self.chunked().await?
        } else {
            let length = request.header("content-length").unwrap_or("0").parse().ok()?;
            self.exactly(length).await?
        };
        Some(request)
    }

    /// Returns when the client has closed its side, or when it sends more than a head's limit.
    pub(super) async fn disconnected(&mut self) {
        while self.buffer.len() <= MAX_HEAD_BYTES && self.fill().await.is_some() {}
    }

    async fn chunked(&mut self) -> Option<Vec<u8>> {
        let mut body = Vec::new();
        loop {
            let line = self.until(b"\r\n").await?;
            let size = std::str::from_utf8(&line).ok()?.split(';').next()?.trim();
            let size = usize::from_str_radix(size, 16).ok()?;
            if size == 0 {
                while !self.until(b"\r\n").await?.is_empty() {}
                return Some(body);
            }
            body.append(&mut self.exactly(size).await?);
            self.exactly(2).await?;
            if body.len() > MAX_BODY_BYTES {
                return None;
            }
        }
    }

    /// The bytes before `mark`; both are removed from the buffer.
    async fn until(&mut self, mark: &[u8]) -> Option<Vec<u8>> {
        let mut searched: usize = 0;
        loop {
            let from = searched.saturating_sub(mark.len());
            if let Some(at) = self.buffer[from..].windows(mark.len()).position(|w| w == mark) {
                let mut found: Vec<u8> = self.buffer.drain(..from + at + mark.len()).collect();
                found.truncate(from + at);
                return Some(found);
            }
            searched = self.buffer.len();
            if searched > MAX_HEAD_BYTES {
                return None;
            }
            self.fill().await?;
        }
    }

    async fn exactly(&mut self, length: usize) -> Option<Vec<u8>> {
        if length > MAX_BODY_BYTES {
            return None;
        }
        while self.buffer.len() < length {
            self.fill().await?;
        }
        Some(self.buffer.drain(..length).collect())
    }

    /// Reads once; `None` at the end. It is cancel-safe: all read bytes are in the buffer.
    async fn fill(&mut self) -> Option<()> {
        match self.half.read_buf(&mut self.buffer).await {
            Ok(0) | Err(_) => None,
            Ok(_) => Some(()),
        }
    }
}

/// A response of known length.
#[derive(Debug)]
pub(super) struct Response {
    pub(super) status: u16,
    pub(super) kind: &'static str,
    pub(super) retry_after: Option<u32>,
    pub(super) body: Vec<u8>,
}

impl Response {
    pub(super) fn new(status: u16, kind: &'static str, body: impl Into<Vec<u8>>) -> Self {
        Self { status, kind, retry_after: None, body: body.into() }
    }

    pub(super) fn json(status: u16, body: &serde_json::Value) -> Self {
        Self::new(status, "application/json", body.to_string())
    }

    pub(super) fn head(&self) -> Vec<u8> {
        let mut head = status_line(self.status);
        let (kind, length) = (self.kind, self.body.len());
        let _ = write!(head, "content-type: {kind}\r\ncontent-length: {length}\r\n");
        if let Some(seconds) = self.retry_after {
            let _ = write!(head, "retry-after: {seconds}\r\n");
        }
        head.extend_from_slice(b"\r\n");
        head
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.head();
        bytes.extend_from_slice(&self.body);
        bytes
    }
}

/// The head of an event stream; its body is chunked.
pub(super) fn stream_head() -> Vec<u8> {
    let mut head = status_line(200);
    head.extend_from_slice(
        b"content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n",
    );
    head
}

/// Frames a piece of a chunked body. An empty piece is skipped, because it would mean the end.
pub(super) fn frame(piece: &[u8], into: &mut Vec<u8>) {
    if !piece.is_empty() {
        let _ = write!(into, "{:x}\r\n", piece.len());
        into.extend_from_slice(piece);
        into.extend_from_slice(b"\r\n");
    }
}

/// The end of a chunked body.
pub(super) const LAST_FRAME: &[u8] = b"0\r\n\r\n";

fn status_line(status: u16) -> Vec<u8> {
    let reason = match status {
        200 => "OK",
        400 => "Bad Request",
        401 => "Unauthorized",
        404 => "Not Found",
        405 => "Method Not Allowed",
        429 => "Too Many Requests",
        500 => "Internal Server Error",
        503 => "Service Unavailable",
        _ => "Status",
    };
    format!("HTTP/1.1 {status} {reason}\r\nserver: uvicorn\r\n").into_bytes()
}
