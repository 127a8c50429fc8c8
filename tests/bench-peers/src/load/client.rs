//! Clients of a load, and the streams that they run.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use anyhow::{bail, ensure};
use bytes::{BufMut as _, Bytes, BytesMut};
use hapa_proto::codegen::v1::GenerateCodeRequest;
use http::Request;
use http_body_util::{BodyExt as _, Full};
use prost::Message as _;
use tokio::time::{sleep, timeout};

use crate::load::connection::Connection;
use crate::load::decode::{Decoder, Format};
use crate::load::record::Record;
use crate::process::now;
use crate::sim_text::{ID_MARK, QUESTION, TOKEN_BYTES, answer};
use crate::spec::{Leave, LoadSpec, Protocol};

const TOKEN_LEN: u64 = TOKEN_BYTES as u64;
/// Streams that share a connection: below what HAPA and its gateway allow on one.
const MAX_STREAMS_PER_CONNECTION: usize = 100;
/// Fewer connections than these would be one bottleneck.
const MIN_CONNECTIONS: usize = 2;
const STREAM_TIMEOUT: Duration = Duration::from_mins(1);
/// Pause after a failure, so that a system that fails at once causes no busy loop.
const FAILURE_DELAY: Duration = Duration::from_millis(5);

/// What the clients of a load share.
pub(crate) struct Clients {
    pub(crate) spec: LoadSpec,
    /// Streams with a text.
    pub(crate) begun: AtomicU64,
    bytes: AtomicU64,
    path: &'static str,
    format: Format,
    expected: Vec<u8>,
    next_id: AtomicU64,
    warm_ups: AtomicU64,
    measured: AtomicU64,
    end: AtomicU64,
}

/// One client.
pub(crate) struct Client {
    pub(crate) clients: Arc<Clients>,
    pub(crate) start_delay: Duration,
    connection: Option<Connection>,
}

/// The state of one stream.
#[derive(Debug, Default)]
struct StreamState {
    first_text: Option<u64>,
    length: usize,
}

/// How a stream ended, if it did not fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum StreamEnd {
    Complete,
    Left,
}

impl Clients {
    pub(crate) fn new(spec: LoadSpec) -> anyhow::Result<Self> {
        let (path, format) = match (spec.protocol, spec.shape.is_unary) {
            (Protocol::OpenAi, false) => ("/v1/chat/completions", Format::Events),
            (Protocol::OpenAi, true) => ("/v1/chat/completions", Format::Json),
            (_, false) => {
                ("/hapa.codegen.v1.CodegenService/StreamGenerateCode", Format::GrpcStream)
            }
            (_, true) => ("/hapa.codegen.v1.CodegenService/GenerateCode", Format::GrpcCall),
        };
        ensure!(spec.shape.concurrency > 0, "a load without clients");
        Ok(Clients {
            begun: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            path,
            format,
            expected: answer(spec.shape.tokens),
            // Unique among loads, because an answer to a known question may be cached.
            next_id: AtomicU64::new(now() / 1_000),
            warm_ups: AtomicU64::new(0),
            measured: AtomicU64::new(0),
            end: AtomicU64::new(u64::MAX),
            spec,
        })
    }

    /// Clients with open connections.
    pub(crate) async fn connect(self: &Arc<Self>) -> anyhow::Result<Vec<Client>> {
        let count = self.spec.shape.concurrency;
        let mut shared = Vec::new();
        if self.is_http2() {
            let wanted = count.div_ceil(MAX_STREAMS_PER_CONNECTION).max(MIN_CONNECTIONS).min(count);
            for _ in 0..wanted {
                shared.push(Connection::open(self.spec.port, true).await?);
            }
        }
        let mut clients = Vec::with_capacity(count);
        for index in 0..count {
            let connection = match shared.len() {
                0 => Some(Connection::open(self.spec.port, false).await?),
                connections => shared[index % connections].share(),
            };
            let parts = u32::try_from(count)?;
            let start_delay = self.spec.shape.spread * u32::try_from(index)? / parts;
            clients.push(Client { clients: Arc::clone(self), start_delay, connection });
        }
        Ok(clients)
    }

    fn is_http2(&self) -> bool {
        self.spec.protocol != Protocol::OpenAi
    }

    /// Begins the measurement.
    pub(crate) fn begin(&self) {
        let time = u64::try_from(self.spec.shape.max_time.as_nanos()).unwrap_or(u64::MAX);
        self.end.store(now().saturating_add(time), Relaxed);
    }

    pub(crate) fn begin_warm_up(&self) -> bool {
        self.warm_ups.fetch_add(1, Relaxed) < self.spec.shape.warm_up
    }

    pub(crate) fn begin_measured(&self) -> bool {
        self.measured.fetch_add(1, Relaxed) < self.spec.shape.count
            && now() < self.end.load(Relaxed)
    }

    /// Tokens that all clients have received.
    pub(crate) fn tokens(&self) -> u64 {
        self.bytes.load(Relaxed) / TOKEN_LEN
    }

    fn request(&self, id: u64) -> anyhow::Result<Request<Full<Bytes>>> {
        let shape = &self.spec.shape;
        let question = format!("{ID_MARK}{id} {QUESTION}");
        let host = format!("127.0.0.1:{}", self.spec.port);
        let mut request = Request::post(self.path);
        if self.is_http2() {
            request = Request::post(format!("http://{host}{}", self.path));
        } else {
            request = request.header("host", host);
        }
        if let Some(key) = &self.spec.key {
            request = request.header("x-api-key", key);
        }
        let (kind, body) = match self.spec.protocol {
            Protocol::Grpc => ("application/grpc", grpc_body(question, shape.tokens)?),
            Protocol::GrpcWeb => ("application/grpc-web+proto", grpc_body(question, shape.tokens)?),
            Protocol::OpenAi => {
                let mut body = serde_json::json!({
                    "model": "base", "max_tokens": shape.tokens, "stream": !shape.is_unary,
                    "messages": [{"role": "user", "content": question}],
                });
                if !shape.is_unary {
                    body["stream_options"] = serde_json::json!({"include_usage": true});
                }
                ("application/json", body.to_string().into())
            }
        };
        if self.spec.protocol == Protocol::Grpc {
            request = request.header("te", "trailers");
        }
        Ok(request.header("content-type", kind).body(Full::from(body))?)
    }
}

fn grpc_body(user_question: String, tokens: u64) -> anyhow::Result<Bytes> {
    let max_tokens = Some(i32::try_from(tokens)?);
    let message =
        GenerateCodeRequest { user_question, max_tokens, ..GenerateCodeRequest::default() };
    let length = message.encoded_len();
    let mut body = BytesMut::with_capacity(5 + length);
    body.put_u8(0);
    body.put_u32(u32::try_from(length)?);
    message.encode(&mut body)?;
    Ok(body.freeze())
}

impl Client {
    /// Runs one stream or call, and leaves the client ready for the next.
    pub(crate) async fn stream(&mut self, record: &mut Record) {
        if let Err(error) = self.try_stream(record).await {
            record.error(&format!("{error:#}"));
            self.connection = self.connection.take().filter(|connection| !connection.is_http1());
            sleep(FAILURE_DELAY).await;
        }
    }

    async fn try_stream(&mut self, record: &mut Record) -> anyhow::Result<()> {
        let (clients, is_http2) = (Arc::clone(&self.clients), self.clients.is_http2());
        let is_ready = match &mut self.connection {
            Some(connection) => connection.is_ready().await,
            None => false,
        };
        if !is_ready {
            self.connection = None;
        }
        let connection = match &mut self.connection {
            Some(connection) => connection,
            none => none.insert(Connection::open(clients.spec.port, is_http2).await?),
        };
        let shape = &clients.spec.shape;
        let id = if shape.is_repeated { 1 } else { clients.next_id.fetch_add(1, Relaxed) };
        let (request, mut state, begin) = (clients.request(id)?, StreamState::default(), now());
        let received = clients.receive(connection, request, &mut state);
        let end = match shape.leave {
            Some(Leave::Time(time)) => timeout(time, received).await.unwrap_or(Ok(StreamEnd::Left)),
            _ => {
                timeout(STREAM_TIMEOUT, received).await.unwrap_or_else(|_| bail!("no end in time"))
            }
        };
        let ended = now();
        record.tokens += u64::try_from(state.length / TOKEN_BYTES)?;
        if let Some(first) = state.first_text {
            record.first_texts.push(first - begin);
        }
        if end? == StreamEnd::Left {
            record.drops.push((id, ended));
            connection.close_http1();
        } else {
            record.complete += 1;
            record.totals.push(ended - begin);
        }
        Ok(())
    }
}

impl Clients {
    async fn receive(
        &self,
        connection: &mut Connection,
        request: Request<Full<Bytes>>,
        state: &mut StreamState,
    ) -> anyhow::Result<StreamEnd> {
        let response = connection.send(request).await?;
        ensure!(response.status() == 200, "HTTP status {}", response.status());
        let mut decoder = Decoder::new(self.format);
        decoder.status(response.headers())?;
        let mut body = response.into_body();
        while let Some(frame) = body.frame().await {
            let frame = frame?;
            let mut on_text = |text: &str| self.on_text(text, state);
            if let Some(data) = frame.data_ref() {
                decoder.feed(data, &mut on_text)?;
            } else if let Some(trailers) = frame.trailers_ref() {
                decoder.status(trailers)?;
            }
            let tokens = u64::try_from(state.length / TOKEN_BYTES)?;
            if matches!(self.spec.shape.leave, Some(Leave::Tokens(after)) if tokens >= after) {
                return Ok(StreamEnd::Left);
            }
        }
        decoder.end(&mut |text: &str| self.on_text(text, state))?;
        ensure!(decoder.is_done, "an answer without its end marker");
        ensure!(state.length == self.expected.len(), "an answer of {} bytes", state.length);
        Ok(StreamEnd::Complete)
    }

    fn on_text(&self, text: &str, state: &mut StreamState) -> anyhow::Result<()> {
        if text.is_empty() {
            return Ok(());
        }
        if state.first_text.is_none() {
            state.first_text = Some(now());
            self.begun.fetch_add(1, Relaxed);
        }
        let end = state.length + text.len();
        ensure!(self.expected.get(state.length..end) == Some(text.as_bytes()), "a wrong text");
        state.length = end;
        self.bytes.fetch_add(u64::try_from(text.len())?, Relaxed);
        Ok(())
    }
}
