//! A client that writes HTTP/2 frames by hand, without a credential and against the rules.
//!
//! <https://www.rfc-editor.org/rfc/rfc9113#section-4>

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const END_STREAM: u8 = 0x1;
const END_HEADERS: u8 = 0x4;

/// A kind of frame.
#[derive(Clone, Copy, Debug)]
pub enum FrameKind {
    /// A piece of a body.
    Data = 0,
    /// The start of a request.
    Headers = 1,
    /// The end of a stream.
    Reset = 3,
    /// The connection's settings of the client.
    Settings = 4,
    /// A ping that must be answered.
    Ping = 6,
    /// A larger window.
    WindowUpdate = 8,
    /// More headers.
    Continuation = 9,
}

/// A connection of a hostile client.
#[derive(Debug)]
pub struct HostileClient {
    stream: TcpStream,
    next: u32,
    /// The bytes of the next flush.
    pending: Vec<u8>,
}

impl HostileClient {
    /// A connection that sends nothing.
    pub async fn silent(from: u8, to: SocketAddr) -> std::io::Result<TcpStream> {
        let socket = TcpSocket::new_v4()?;
        socket.bind((IpAddr::V4(Ipv4Addr::new(127, 0, 0, from)), 0).into())?;
        socket.connect(to).await
    }

    /// A connection from 127.0.0.`from` that has sent the HTTP/2 preface.
    pub async fn connect(from: u8, to: SocketAddr) -> std::io::Result<HostileClient> {
        let mut stream = HostileClient::silent(from, to).await?;
        stream.set_nodelay(true)?;
        stream.write_all(PREFACE).await?;
        let mut client = HostileClient { stream, next: 1, pending: Vec::new() };
        client.frame(FrameKind::Settings, 0, 0, &[]).flush().await?;
        Ok(client)
    }

    /// Adds a frame.
    pub fn frame(&mut self, kind: FrameKind, flags: u8, stream: u32, payload: &[u8]) -> &mut Self {
        let len = u32::try_from(payload.len()).expect("a small frame").to_be_bytes();
        self.pending.extend_from_slice(&len[1..]);
        self.pending.extend_from_slice(&[kind as u8, flags]);
        self.pending.extend_from_slice(&stream.to_be_bytes());
        self.pending.extend_from_slice(payload);
        self
    }

    /// The number of a new stream.
    pub fn next_stream(&mut self) -> u32 {
        let stream = self.next;
        self.next += 2;
        stream
    }

    /// Adds the headers of a call, and returns its stream.
    pub fn call(&mut self, path: &str) -> u32 {
        let stream = self.next_stream();
        self.frame(FrameKind::Headers, END_HEADERS, stream, &headers(path, &[]));
        stream
    }

    /// Adds a piece of a request's body.
    pub fn data(&mut self, stream: u32, data: &[u8], is_last: bool) -> &mut Self {
        self.frame(FrameKind::Data, if is_last { END_STREAM } else { 0 }, stream, data)
    }

    /// Cancels a call.
    pub fn reset(&mut self, stream: u32) -> &mut Self {
        self.frame(FrameKind::Reset, 0, stream, &8u32.to_be_bytes())
    }

    /// Sends all added frames; fails if the peer has closed.
    pub async fn flush(&mut self) -> std::io::Result<()> {
        let pending = std::mem::take(&mut self.pending);
        // A peer that stops reading must not block a test.
        let sent = timeout(Duration::from_secs(5), self.stream.write_all(&pending)).await;
        sent.map_err(|_| std::io::ErrorKind::TimedOut)?
    }

    /// Reads until the peer closes, and returns the bytes.
    pub async fn read_to_end(&mut self) -> Vec<u8> {
        let mut said = Vec::new();
        let _ = self.stream.read_to_end(&mut said).await;
        said
    }

    /// Reads some bytes; `false` at the end.
    pub async fn read_some(&mut self) -> bool {
        let mut buffer = vec![0; 16 * 1024];
        matches!(self.stream.read(&mut buffer).await, Ok(1..))
    }
}

/// The header block of a gRPC call, without compression.
pub fn headers(path: &str, more: &[(&str, &str)]) -> Vec<u8> {
    let usual = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", "mesh"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ];
    usual.iter().chain(more).flat_map(|(name, value)| literal(name, value)).collect()
}

/// A literal header without indexing (RFC 7541, 6.2.2).
pub fn literal(name: &str, value: &str) -> Vec<u8> {
    [&[0][..], &string(name), &string(value)].concat()
}

fn string(text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    // RFC 7541, 5.1.
    if let Ok(len @ ..127) = u8::try_from(text.len()) {
        bytes.push(len);
    } else {
        bytes.push(127);
        let mut rest = text.len() - 127;
        while rest >= 128 {
            bytes.push(u8::try_from(rest % 128).expect("below 128") | 128);
            rest /= 128;
        }
        bytes.push(u8::try_from(rest).expect("below 128"));
    }
    bytes.extend_from_slice(text.as_bytes());
    bytes
}

/// The prefix of a gRPC message of this length.
pub fn prefix(len: u32) -> Vec<u8> {
    [&[0][..], &len.to_be_bytes()].concat()
}
