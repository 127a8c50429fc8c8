//! The engine: a vLLM-compatible server, asked over HTTP. A stream of its answer is pulled, read by
//! read, by whoever serves the caller: so a slow caller slows the engine, and a caller who left drops
//! the connection, which is how the engine learns to stop.
//!
//! What leaves this room of an engine's failure is a word from a published list, numbers and our own
//! sentence: its text may repeat a prompt, a key or a host name. See `error.rs` and `foreign.rs`.

mod error;
mod foreign;
mod retry_after;
pub(crate) mod sse;
mod wire;

use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::FutureExt as _;
use hapa_core::config::Wrong;
use hapa_proto::codegen::v1::Usage;
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue, RETRY_AFTER};
use reqwest::{Body, Client, RequestBuilder, Response, redirect};
use secrecy::ExposeSecret as _;
use tokio::task::yield_now;
use tokio::time::{Instant, timeout};

use crate::engine::foreign::ForeignText;
use crate::engine::sse::Reader;
use crate::engine::wire::{Chunk, ModelList};

pub(crate) use crate::engine::error::{Error, Refusal, Unreadable};
pub(crate) use crate::engine::foreign::EngineAccess;
pub(crate) use crate::engine::wire::{
    ChatRequest, CompletionChunk, CompletionRequest, FinishReason, ListedModel, Logprobs, Message,
    Scheduling, StreamOptions, Text, stream_error,
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

/// A server that speaks the protocol.
#[derive(Clone, Debug)]
pub(crate) struct Engine {
    http: Client,
    endpoint: String,
    foreign: ForeignText,
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
        access: &EngineAccess,
    ) -> anyhow::Result<Engine> {
        // Fails only where another server of this process has done it.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut headers = HeaderMap::new();
        if let Some(key) = &access.key {
            let value = HeaderValue::from_str(&format!("Bearer {}", key.expose_secret()));
            let mut value = value.map_err(|_| {
                Wrong::new(
                    "AI_MODEL_API_KEY",
                    "must have no line end and no control character inside",
                )
            })?;
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
        let endpoint = endpoint.trim_end_matches('/').to_owned();
        Ok(Engine { http, foreign: ForeignText::new(access, &endpoint), endpoint })
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
        let response = self.send(request).await?;
        let foreign = self.foreign.clone();
        Ok(Tokens { response, reader: Reader::default(), last_read: Instant::now(), foreign })
    }

    /// The models and adapters that it serves.
    pub(crate) async fn models(&self) -> Result<Vec<ListedModel>, Error> {
        let list = async {
            let url = format!("{}/models", self.endpoint);
            let response = self.send(self.http.get(url)).await?;
            let body = self.read_whole(response, LARGEST_REPLY).await?;
            let list: ModelList = serde_json::from_slice(&body).map_err(|error| {
                self.foreign.log("an engine's list of models can't be read", &body);
                Error::from(&error)
            })?;
            Ok(list.data.into_iter().filter_map(ListedModel::checked).take(MOST_MODELS).collect())
        };
        timeout(LIST_PATIENCE, list).await.map_err(|_| Error::Silent)?
    }

    /// Its page of metrics; vLLM has it beside `/v1`.
    pub(crate) async fn metrics(&self) -> Result<String, Error> {
        let page = async {
            let base = self.endpoint.strip_suffix("/v1").unwrap_or(&self.endpoint);
            let url = format!("{base}/metrics");
            let response = self.http.get(url).send().await.map_err(|error| Error::from(&error))?;
            // Most engines without this page say so once a second: no word about it.
            if !response.status().is_success() {
                return Err(Error::refused(response.status(), None, &[]));
            }
            let body = self.read_whole(response, LARGEST_PAGE).await?;
            String::from_utf8(body).map_err(|_| Error::Unreadable(Unreadable::NotUtf8))
        };
        timeout(LIST_PATIENCE, page).await.map_err(|_| Error::Silent)?
    }

    /// Sends a request and waits for a status of success. What an engine says in its place ends here.
    async fn send(&self, request: RequestBuilder) -> Result<Response, Error> {
        let response = request.send().await.map_err(|error| self.foreign.broken(&error))?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        let wait = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok());
        let wait = wait.and_then(|text| retry_after::read(text, SystemTime::now()));
        let body = self.read_whole(response, LARGEST_REPLY).await.unwrap_or_default();
        self.foreign.log("an engine refused a request", &body);
        Err(Error::refused(status, wait, &body))
    }

    async fn read_whole(&self, mut response: Response, most: usize) -> Result<Vec<u8>, Error> {
        let mut body = Vec::new();
        while let Some(bytes) = response.chunk().await.map_err(|error| Error::from(&error))? {
            if body.len() + bytes.len() > most {
                return Err(Error::Unreadable(Unreadable::TooLarge(most)));
            }
            body.extend_from_slice(&bytes);
        }
        Ok(body)
    }
}

/// What one or more events of a chat said.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    pub(crate) text: String,
    /// Events that had text, since the begin: about as many tokens.
    pub(crate) pieces: u32,
    pub(crate) finish_reason: Option<FinishReason>,
    pub(crate) usage: Option<Usage>,
    /// The model that answers, as the engine names it: foreign text.
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
        let chunk: Chunk<'_> = serde_json::from_slice(data).map_err(|error| Error::from(&error))?;
        // Comes in a stream that began with 200, and is followed by [DONE].
        if let Some(error) = &chunk.error {
            return Err(stream_error(error));
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
            self.finish_reason = choice.finish_reason.or(self.finish_reason);
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
    foreign: ForeignText,
}

impl Tokens {
    /// Waits for the engine and adds what its events say. Can be dropped at any time and called
    /// again: what was read stays in the batch, also after an error.
    ///
    /// An engine writes each token as an HTTP chunk of its own. In full flow those that have arrived
    /// already are taken together: a frame for each would cost more than the token does.
    pub(crate) async fn read(&mut self, events: &mut impl Events) -> Result<(), Error> {
        let bytes = self.response.chunk().await.map_err(|error| self.foreign.broken(&error))?;
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
            self.take(read.map_err(|error| self.foreign.broken(&error))?, events)?;
        }
        Ok(())
    }

    fn take(&mut self, bytes: Option<Bytes>, events: &mut impl Events) -> Result<(), Error> {
        let bytes = bytes.ok_or(Error::Truncated)?;
        let foreign = &self.foreign;
        self.reader.feed(&bytes, |data| {
            events.take(data).inspect_err(|_| foreign.log("an engine broke off an answer", data))
        })
    }

    /// Reads what follows `[DONE]`: the end of the response, after which the connection is free for
    /// the next call. An engine that does not end is left.
    pub(crate) async fn close(&mut self) {
        let end = async { while let Ok(Some(_)) = self.response.chunk().await {} };
        let _ = timeout(END_PATIENCE, end).await;
    }
}
