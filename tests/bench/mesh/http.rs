//! A minimal and cheap HTTP/1.1 client for a load generator: it counts tokens in an event stream without
//! parsing the events.

use std::net::SocketAddr;

use anyhow::{Context as _, bail, ensure};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::engine::MARK;

const MAX_HEAD_BYTES: usize = 64 * 1024;
const READ_SIZE: usize = 16 * 1024;

/// One request, written out once.
#[derive(Clone, Debug)]
pub(crate) struct Ask(Vec<u8>);

impl Ask {
    pub(crate) fn get(path: &str, key: &str) -> Self {
        let head = format!("GET {path} HTTP/1.1\r\nhost: bench\r\nx-api-key: {key}\r\n\r\n");
        Ask(head.into_bytes())
    }

    pub(crate) fn post(path: &str, key: &str, body: &str) -> Self {
        let length = body.len();
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: bench\r\nx-api-key: {key}\r\n\
             content-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
        );
        Ask(head.into_bytes())
    }
}

/// A connection that is kept for the next request when a stream was read to its end.
#[derive(Debug)]
pub(crate) struct Connection {
    stream: TcpStream,
    unread: Vec<u8>,
    body: Body,
}

impl Connection {
    pub(crate) async fn open(address: SocketAddr) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Connection { stream, unread: Vec::with_capacity(READ_SIZE), body: Body::default() })
    }

    /// Asks, and waits for the headers; returns the status.
    pub(crate) async fn ask(&mut self, ask: &Ask) -> anyhow::Result<u16> {
        self.unread.clear();
        self.body = Body::default();
        self.stream.write_all(&ask.0).await?;
        loop {
            let end = self.unread.windows(4).position(|bytes| bytes == b"\r\n\r\n");
            if let Some(end) = end {
                let status = self.unread.get(9..12).and_then(|text| str::from_utf8(text).ok());
                let status = status.context("a short head")?.parse()?;
                self.unread.drain(..end + 4);
                return Ok(status);
            }
            ensure!(self.unread.len() < MAX_HEAD_BYTES, "an endless head");
            self.fill().await?;
        }
    }

    /// The number of tokens in what comes next; none at the stream's end. Only for chunked bodies.
    pub(crate) async fn tokens(&mut self) -> anyhow::Result<Option<u32>> {
        loop {
            let tokens = self.body.take(&mut self.unread)?;
            if tokens > 0 {
                return Ok(Some(tokens));
            }
            if self.body.ended {
                return Ok(None);
            }
            self.fill().await?;
        }
    }

    async fn fill(&mut self) -> anyhow::Result<()> {
        if self.stream.read_buf(&mut self.unread).await? == 0 {
            bail!("the connection ended in the middle of a response");
        }
        Ok(())
    }
}

/// The position in a chunked body.
#[derive(Debug, Default)]
struct Body {
    /// Bytes of the begun chunk that are still to come, its line end included.
    left: usize,
    /// The begun chunk is the empty one.
    last: bool,
    ended: bool,
    /// Number of bytes of the mark that the last bytes matched.
    matched: usize,
}

impl Body {
    /// Takes what is there, up to a chunk's head that is not complete, and counts its tokens.
    fn take(&mut self, bytes: &mut Vec<u8>) -> anyhow::Result<u32> {
        let (mut at, mut tokens) = (0, 0);
        while at < bytes.len() && !self.ended {
            let rest = &bytes[at..];
            if self.left == 0 {
                let Some(end) = rest.windows(2).position(|pair| pair == b"\r\n") else { break };
                let size = usize::from_str_radix(str::from_utf8(&rest[..end])?.trim(), 16)?;
                self.last = size == 0;
                self.left = size + 2;
                at += end + 2;
            } else {
                let piece = self.left.min(rest.len());
                tokens += self.count(&rest[..piece]);
                self.left -= piece;
                at += piece;
                self.ended = self.last && self.left == 0;
            }
        }
        bytes.drain(..at);
        Ok(tokens)
    }

    /// The mark's first letter occurs in it once, so a mismatch starts anew.
    fn count(&mut self, bytes: &[u8]) -> u32 {
        let mut tokens = 0;
        for byte in bytes {
            self.matched = match self.matched {
                at if *byte == MARK[at] => at + 1,
                _ => usize::from(*byte == MARK[0]),
            };
            if self.matched == MARK.len() {
                tokens += 1;
                self.matched = 0;
            }
        }
        tokens
    }
}
