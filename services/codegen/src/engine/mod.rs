//! The engine: a vLLM-compatible server, asked over HTTP. A stream of its answer is pulled, read by
//! read, by whoever serves the caller: so a slow caller slows the engine, and a caller who left drops
//! the connection, which is how the engine learns to stop.

pub(crate) mod sse;
mod wire;

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use futures_util::FutureExt as _;
use hapa_proto::codegen::v1::Usage;
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue};
use reqwest::{Body, Client, Response, StatusCode, redirect};
use secrecy::{ExposeSecret as _, SecretString};
use tokio::task::yield_now;
use tokio::time::{Instant, timeout};

use crate::engine::sse::{Reader, TooLong};
use crate::engine::wire::{Chunk, ModelList};

pub(crate) use crate::engine::wire::{
    ChatRequest, CompletionChunk, CompletionRequest, ListedModel, Logprobs, Message, Scheduling,
    StreamOptions, Text, read_error,
};

const CONNECT_PATIENCE: Duration = Duration::from_secs(2);
/// For what an engine answers from memory: its models.
const LIST_PATIENCE: Duration = Duration::from_secs(2);
/// Chunks that come closer together than this are a flow, not single tokens.
const FULL_FLOW: Duration = Duration::from_micros(500);
/// Most chunks that are taken together.
const MOST_TOGETHER: usize = 32;
/// From `[DONE]` to the end of the response.
const END_PATIENCE: Duration = Duration::from_millis(50);
/// Below the 5 s after which uvicorn, which vLLM runs on, closes idle connections.
const IDLE: Duration = Duration::from_secs(4);
/// Most of an error body or a list that is read.
const LARGEST_REPLY: usize = 1024 * 1024;
/// Most of a page of metrics.
const LARGEST_PAGE: usize = 4 * LARGEST_REPLY;
/// Most models that are read of one engine.
const MOST_MODELS: usize = 1_000;

/// What an engine does wrong.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// It can't be reached, or the connection broke.
    #[error("the engine can't be reached")]
    Unreachable(#[source] reqwest::Error),
    /// It did not answer in time.
    #[error("the engine did not answer in time")]
    Silent,
    /// It answered with an error.
    #[error("the engine answered {status}: {words}")]
    Refused { status: StatusCode, words: String, param: String, retry_after: Option<Duration> },
    /// It sent an error inside of a stream.
    #[error("the engine broke off: {0}")]
    BrokeOff(String),
    /// Its stream ended without saying that it was whole.
    #[error("the engine's stream ended early")]
    Truncated,
    /// It said what this protocol has not.
    #[error("the engine's reply can't be read: {0}")]
    Unreadable(String),
}

impl Error {
    /// A word for its kind, from a short list: an engine's own words may hold what it was asked.
    pub(crate) fn kind(&self) -> String {
        let word = match self {
            Error::Unreachable(cause) if cause.is_connect() => "connect",
            Error::Unreachable(_) => "broken",
            Error::Silent => "silent",
            Error::Refused { status, .. } => status.as_str(),
            Error::BrokeOff(_) => "broke_off",
            Error::Truncated => "truncated",
            Error::Unreadable(_) => "unreadable",
        };
        word.to_owned()
    }
}

impl From<TooLong> for Error {
    fn from(error: TooLong) -> Error {
        Error::Unreadable(error.to_string())
    }
}

/// A server that speaks the protocol.
#[derive(Clone, Debug)]
pub(crate) struct Engine {
    http: Client,
    endpoint: String,
}

/// What an engine is asked with.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Ask {
    /// Messages, for an instructed model.
    Chat,
    /// A text to go on with.
    Completion,
}

impl Ask {
    /// Below the endpoint.
    pub(crate) fn path(self) -> &'static str {
        match self {
            Ask::Chat => "chat/completions",
            Ask::Completion => "completions",
        }
    }

    /// What OpenTelemetry calls it.
    pub(crate) fn operation(self) -> &'static str {
        match self {
            Ask::Chat => "chat",
            Ask::Completion => "text_completion",
        }
    }
}

/// What the events of an answer say, gathered.
pub(crate) trait Events: Default + Send {
    /// Takes the data of one event.
    fn take(&mut self, data: &[u8]) -> Result<(), Error>;
    /// Something of the answer came.
    fn has_begun(&self) -> bool;
    /// No more will come.
    fn is_done(&self) -> bool;
}

impl Engine {
    /// For an endpoint such as `http://127.0.0.1:8002/v1`, at the address that is given for its
    /// name, if one is.
    pub(crate) fn new(
        endpoint: &str,
        address: Option<(&str, SocketAddr)>,
        key: Option<&SecretString>,
    ) -> anyhow::Result<Engine> {
        // Fails only where another server of this process has done it.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut headers = HeaderMap::new();
        if let Some(key) = key.filter(|key| !key.expose_secret().is_empty()) {
            let mut value = HeaderValue::from_str(&format!("Bearer {}", key.expose_secret()))
                .context("AI_MODEL_API_KEY can't stand in a header")?;
            value.set_sensitive(true);
            headers.insert(AUTHORIZATION, value);
        }
        let http = match address {
            // The name stays in the Host header and in the certificate.
            Some((name, address)) => Client::builder().resolve(name, address),
            None => Client::builder(),
        };
        let http = http
            .default_headers(headers)
            .connect_timeout(CONNECT_PATIENCE)
            .pool_idle_timeout(IDLE)
            .tcp_nodelay(true)
            // An engine that answers with a redirect, or a proxy in the environment, must not send
            // prompts elsewhere.
            .redirect(redirect::Policy::none())
            .no_proxy()
            .referer(false)
            .build()?;
        Ok(Engine { http, endpoint: endpoint.trim_end_matches('/').to_owned() })
    }

    /// Asks for an answer. The caller bounds the wait.
    /// `headers` are those of the trace that it belongs to.
    pub(crate) async fn ask(
        &self,
        ask: Ask,
        headers: HeaderMap,
        body: impl Into<Body>,
    ) -> Result<Tokens, Error> {
        let url = format!("{}/{}", self.endpoint, ask.path());
        let request = self.http.post(url).headers(headers);
        let request = request.header(CONTENT_TYPE, "application/json").body(body);
        let response = request.send().await.map_err(Error::Unreachable)?;
        if !response.status().is_success() {
            return Err(refusal(response).await);
        }
        Ok(Tokens { response, reader: Reader::default(), last_read: Instant::now() })
    }

    /// The models and adapters that it serves.
    pub(crate) async fn models(&self) -> Result<Vec<ListedModel>, Error> {
        let list = async {
            let url = format!("{}/models", self.endpoint);
            let response = self.http.get(url).send().await.map_err(Error::Unreachable)?;
            if !response.status().is_success() {
                return Err(refusal(response).await);
            }
            let body = read_whole(response, LARGEST_REPLY).await?;
            let mut list: ModelList = serde_json::from_slice(&body)
                .map_err(|error| Error::Unreadable(error.to_string()))?;
            list.data.truncate(MOST_MODELS);
            Ok(list.data)
        };
        timeout(LIST_PATIENCE, list).await.map_err(|_| Error::Silent)?
    }

    /// Its page of metrics; vLLM has it beside `/v1`.
    pub(crate) async fn metrics(&self) -> Result<String, Error> {
        let page = async {
            let base = self.endpoint.strip_suffix("/v1").unwrap_or(&self.endpoint);
            let url = format!("{base}/metrics");
            let response = self.http.get(url).send().await.map_err(Error::Unreachable)?;
            if !response.status().is_success() {
                return Err(refusal(response).await);
            }
            let body = read_whole(response, LARGEST_PAGE).await?;
            String::from_utf8(body).map_err(|error| Error::Unreadable(error.to_string()))
        };
        timeout(LIST_PATIENCE, page).await.map_err(|_| Error::Silent)?
    }
}

/// What one or more events of a chat said.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    pub(crate) text: String,
    /// Events that had text, since the begin: about as many tokens.
    pub(crate) pieces: u32,
    pub(crate) finish_reason: Option<String>,
    pub(crate) usage: Option<Usage>,
    /// The model that answers, as the engine names it.
    pub(crate) model: Option<String>,
    /// `[DONE]` came: no more will.
    pub(crate) done: bool,
}

impl Events for Batch {
    fn take(&mut self, data: &[u8]) -> Result<(), Error> {
        if self.done || data == b"[DONE]" {
            self.done = true;
            return Ok(());
        }
        let chunk: Chunk<'_> =
            serde_json::from_slice(data).map_err(|error| Error::Unreadable(error.to_string()))?;
        // Comes in a stream that began with 200, and is followed by [DONE].
        if let Some(error) = &chunk.error {
            return Err(Error::BrokeOff(read_error(error).0));
        }
        if let (None, Some(Text(model))) = (&self.model, chunk.model) {
            self.model = Some(model.into_owned());
        }
        if let Some(choice) = chunk.choices.into_iter().next() {
            if let Some(Text(text)) = choice.delta.content {
                self.text.push_str(&text);
                // The first event tells the role and has no text yet.
                self.pieces = self.pieces.saturating_add(u32::from(!text.is_empty()));
            }
            if let Some(reason) = choice.finish_reason {
                self.finish_reason = Some(reason.into_owned());
            }
        }
        if let Some(usage) = chunk.usage {
            self.usage = Some(usage.into());
        }
        Ok(())
    }

    fn has_begun(&self) -> bool {
        self.pieces > 0
    }

    fn is_done(&self) -> bool {
        self.done
    }
}

/// An answer on its way. Dropping it closes the connection, which aborts the engine's work.
#[derive(Debug)]
pub(crate) struct Tokens {
    response: Response,
    reader: Reader,
    last_read: Instant,
}

impl Tokens {
    /// Waits for the engine and adds what its events say. Can be dropped at any time and called
    /// again: what was read stays in the batch, also after an error.
    ///
    /// An engine writes each token as an HTTP chunk of its own. In full flow those that have arrived
    /// already are taken together: a frame for each would cost more than the token does.
    pub(crate) async fn read(&mut self, events: &mut impl Events) -> Result<(), Error> {
        let bytes = self.response.chunk().await.map_err(Error::Unreachable)?;
        self.take(bytes, events)?;
        let now = Instant::now();
        let in_full_flow = now - std::mem::replace(&mut self.last_read, now) < FULL_FLOW;
        let more = if in_full_flow { MOST_TOGETHER } else { 0 };
        for _ in 0..more {
            if events.is_done() {
                break;
            }
            // The connection has a task of its own, which hands over one chunk at a turn.
            yield_now().await;
            let Some(read) = self.response.chunk().now_or_never() else { break };
            self.take(read.map_err(Error::Unreachable)?, events)?;
        }
        Ok(())
    }

    fn take(&mut self, bytes: Option<Bytes>, events: &mut impl Events) -> Result<(), Error> {
        let bytes = bytes.ok_or(Error::Truncated)?;
        self.reader.feed(&bytes, |data| events.take(data))
    }

    /// Reads what follows `[DONE]`: the end of the response, after which the connection is free for
    /// the next call. An engine that does not end is left.
    pub(crate) async fn close(&mut self) {
        let end = async { while let Ok(Some(_)) = self.response.chunk().await {} };
        let _ = timeout(END_PATIENCE, end).await;
    }
}

async fn refusal(response: Response) -> Error {
    let status = response.status();
    let retry_after = response.headers().get("retry-after").and_then(|value| value.to_str().ok());
    let retry_after = retry_after.and_then(|text| text.parse().ok()).map(Duration::from_secs);
    let body = read_whole(response, LARGEST_REPLY).await.unwrap_or_default();
    let error = serde_json::from_slice::<serde_json::Value>(&body).ok();
    let (words, param) =
        error.as_ref().and_then(|body| body.get("error")).map(read_error).unwrap_or_default();
    Error::Refused { status, words, param, retry_after }
}

async fn read_whole(mut response: Response, most: usize) -> Result<Vec<u8>, Error> {
    let mut body = Vec::new();
    while let Some(bytes) = response.chunk().await.map_err(Error::Unreachable)? {
        if body.len() + bytes.len() > most {
            return Err(Error::Unreadable(format!("it is over {most} bytes")));
        }
        body.extend_from_slice(&bytes);
    }
    Ok(body)
}
