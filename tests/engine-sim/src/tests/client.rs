//! A client over a bare socket: it records every byte, every HTTP chunk and the end of the connection.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::super::Engine;

const WAIT_TIMEOUT: Duration = Duration::from_secs(10);

/// The bytes of a connection until its end, or until the reader stops.
#[derive(Debug)]
pub(super) struct Reply {
    pub(super) status: u16,
    pub(super) head: String,
    /// The pieces of the body: HTTP chunks, or one piece for a body with a length.
    pub(super) pieces: Vec<Vec<u8>>,
    /// Whether the body ended by HTTP framing, and not by a closed connection.
    pub(super) complete: bool,
}

impl Reply {
    pub(super) fn bytes(&self) -> Vec<u8> {
        self.pieces.concat()
    }

    pub(super) fn text(&self) -> String {
        String::from_utf8(self.bytes()).unwrap()
    }

    pub(super) fn json(&self) -> Value {
        serde_json::from_slice(&self.bytes()).unwrap()
    }

    /// The `data:` of every event; `[DONE]` is a string.
    pub(super) fn events(&self) -> Vec<Value> {
        let text = self.text();
        let data = text.lines().filter_map(|line| line.strip_prefix("data: "));
        data.map(|data| serde_json::from_str(data).unwrap_or_else(|_| data.into())).collect()
    }

    /// The text of all deltas.
    pub(super) fn said(&self) -> String {
        let events = self.events();
        events.iter().filter_map(|e| e["choices"][0]["delta"]["content"].as_str()).collect()
    }
}

pub(super) struct Client {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Client {
    pub(super) async fn to(engine: &Engine) -> Self {
        let stream = TcpStream::connect(engine.address()).await.unwrap();
        Self { stream, buffer: Vec::new() }
    }

    /// Connects and requests a stream.
    pub(super) async fn streaming(engine: &Engine) -> Self {
        let mut client = Self::to(engine).await;
        client.post(&ask()).await;
        client
    }

    pub(super) async fn send(&mut self, raw: &str) {
        self.stream.write_all(raw.as_bytes()).await.unwrap();
    }

    pub(super) async fn get(&mut self, path: &str) -> Reply {
        self.send(&format!("GET {path} HTTP/1.1\r\nhost: sim\r\n\r\n")).await;
        self.reply().await
    }

    pub(super) async fn post(&mut self, body: &Value) {
        self.post_with("", &body.to_string()).await;
    }

    /// `headers` as lines, each with its line end.
    pub(super) async fn post_with(&mut self, headers: &str, body: &str) {
        self.post_to("/v1/chat/completions", headers, body).await;
    }

    pub(super) async fn post_to(&mut self, path: &str, headers: &str, body: &str) {
        let length = body.len();
        self.send(&format!(
            "POST {path} HTTP/1.1\r\nhost: sim\r\ncontent-type: application/json\r\n\
             content-length: {length}\r\n{headers}\r\n{body}"
        ))
        .await;
    }

    /// Reads one response up to its end.
    pub(super) async fn reply(&mut self) -> Reply {
        let head = self.head().await;
        let status = head[9..12].parse().unwrap();
        let lower = head.to_ascii_lowercase();
        let mut reply = Reply { status, head, pieces: Vec::new(), complete: true };
        let length = lower.lines().find_map(|line| line.strip_prefix("content-length: "));
        if let Some(length) = length {
            let length = length.parse().unwrap();
            reply.complete = self.wait_for(length).await;
            let length = length.min(self.buffer.len());
            reply.pieces.push(self.buffer.drain(..length).collect());
            return reply;
        }
        loop {
            match self.chunk().await {
                None => reply.complete = false,
                Some(chunk) if !chunk.is_empty() => {
                    reply.pieces.push(chunk);
                    continue;
                }
                Some(_) => {}
            }
            return reply;
        }
    }

    pub(super) async fn head(&mut self) -> String {
        let end = self.wait_for_mark(b"\r\n\r\n").await.expect("a response head");
        String::from_utf8(self.buffer.drain(..end).collect()).unwrap()
    }

    /// The next HTTP chunk: empty at the end of the body, `None` when the connection closed.
    pub(super) async fn chunk(&mut self) -> Option<Vec<u8>> {
        let end = self.wait_for_mark(b"\r\n").await?;
        let size = std::str::from_utf8(&self.buffer[..end - 2]).unwrap();
        let size = usize::from_str_radix(size, 16).unwrap();
        if !self.wait_for(end + size + 2).await {
            return None;
        }
        let chunk = self.buffer.drain(..end + size + 2).skip(end).take(size).collect();
        Some(chunk)
    }

    /// Reads chunks until the stream contains this text.
    pub(super) async fn read_until(&mut self, text: &str) -> String {
        let mut said = String::new();
        while !said.contains(text) {
            said += &String::from_utf8(self.chunk().await.expect("an open stream")).unwrap();
        }
        said
    }

    /// Reads any bytes; `false` if the connection is closed.
    pub(super) async fn more(&mut self) -> bool {
        let read = self.stream.read_buf(&mut self.buffer);
        let read = tokio::time::timeout(WAIT_TIMEOUT, read).await.expect("bytes, or an end");
        read.is_ok_and(|read| read > 0)
    }

    pub(super) fn buffered(&self) -> &[u8] {
        &self.buffer
    }

    /// Whether no byte arrives for a short time. Silence has no event that a test could wait for.
    pub(super) async fn silent(&mut self) -> bool {
        let read = self.stream.read_buf(&mut self.buffer);
        tokio::time::timeout(Duration::from_millis(30), read).await.is_err()
    }

    async fn wait_for(&mut self, length: usize) -> bool {
        while self.buffer.len() < length {
            if !self.more().await {
                return false;
            }
        }
        true
    }

    async fn wait_for_mark(&mut self, mark: &[u8]) -> Option<usize> {
        loop {
            let at = self.buffer.windows(mark.len()).position(|window| window == mark);
            if let Some(at) = at {
                return Some(at + mark.len());
            }
            if !self.more().await {
                return None;
            }
        }
    }
}

/// A request for a stream with usage.
pub(super) fn ask() -> Value {
    json!({
        "model": "sim-coder", "stream": true, "stream_options": {"include_usage": true},
        "messages": [{"role": "user", "content": "Say hello."}],
    })
}
