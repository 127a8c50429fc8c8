//! The client of one engine: a vLLM-compatible server behind HTTP. Response streams are pulled, so a
//! slow client slows the engine down, and a cancelled call drops the connection, which makes the
//! engine stop.
//!
//! An engine's own error texts never leave this module, because they may repeat a prompt, a key or a
//! host name. Errors carry a kind from a fixed list, numbers and a fixed sentence.

mod base_url;
mod client;
mod error;
mod error_body;
mod learned;
mod models;
mod refusal;
mod request_body;
mod request_field;
mod retry_after;
pub(crate) mod sse;
#[cfg(test)]
pub(super) mod tests;
mod untrusted_text;
mod wire;
mod wordings;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::FutureExt as _;
use hapa_core::config::ConfigError;
use hapa_proto::codegen::v1::Usage;
use reqwest::header::{CONTENT_TYPE, HeaderMap};
use reqwest::{RequestBuilder, Response, Url};
use tokio::task::yield_now;
use tokio::time::{Instant, timeout};

use crate::upstream::engine::client::HttpClients;
use crate::upstream::engine::sse::SseParser;
use crate::upstream::engine::untrusted_text::UntrustedTextLog;
use crate::upstream::engine::wire::ChatChunk;

pub(crate) use crate::upstream::engine::base_url::BaseUrl;
pub(crate) use crate::upstream::engine::error::{
    DecodeError, EngineError, TransportError, stream_error,
};
pub(crate) use crate::upstream::engine::learned::LearnedLimits;
pub(crate) use crate::upstream::engine::models::ListedModel;
pub(crate) use crate::upstream::engine::refusal::RefusalReason;
pub(crate) use crate::upstream::engine::request_body::{
    ChatMessage, ChatRequest, CompletionRequest, EngineScheduling, StreamOptions,
};
pub(crate) use crate::upstream::engine::untrusted_text::EngineOptions;
pub(crate) use crate::upstream::engine::wire::{FinishReason, JsonText, Logprobs, TextChunk};

/// For replies that an engine makes from memory: its models and metrics.
const METADATA_TIMEOUT: Duration = Duration::from_secs(2);
/// Chunks closer together than this are a burst and are coalesced.
const COALESCE_INTERVAL: Duration = Duration::from_micros(500);
/// Maximum number of further chunks in one read.
const MAX_COALESCED_CHUNKS: usize = 32;
/// Wait for the end of the response after `[DONE]`.
const DRAIN_TIMEOUT: Duration = Duration::from_millis(50);
/// Maximum size of an error body or a list of models.
const MAX_REPLY_BYTES: usize = 1024 * 1024;
/// Maximum size of a page of metrics.
const MAX_METRICS_PAGE_BYTES: usize = 4 * MAX_REPLY_BYTES;

/// An HTTP client of one engine.
#[derive(Clone, Debug)]
pub(crate) struct Engine {
    http: HttpClients,
    base: Arc<BaseUrl>,
    learned: Arc<LearnedLimits>,
    text_log: UntrustedTextLog,
}

/// An operation of the engine's API.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Operation {
    /// Chat messages, for an instruction-tuned model.
    Chat,
    /// A text to continue.
    Completion,
}

impl Operation {
    /// Path below the base URL.
    pub(crate) fn path(self) -> &'static str {
        match self {
            Operation::Chat => "chat/completions",
            Operation::Completion => "completions",
        }
    }

    /// Value of OpenTelemetry's `gen_ai.operation.name`.
    pub(crate) fn otel_name(self) -> &'static str {
        match self {
            Operation::Chat => "chat",
            Operation::Completion => "text_completion",
        }
    }
}

/// Accumulates the events of a response stream.
pub(crate) trait EventAccumulator: Default + Send {
    /// Adds the data of one event.
    fn push(&mut self, data: &[u8]) -> Result<(), EngineError>;
    /// A token has arrived.
    fn has_begun(&self) -> bool;
    /// No further events will arrive.
    fn is_done(&self) -> bool;
}

impl Engine {
    /// Creates a client for a base URL such as `http://127.0.0.1:8002/v1`. `address` overrides the DNS
    /// lookup of its host name.
    pub(crate) fn new(
        base_url: &str,
        address: Option<(&str, SocketAddr)>,
        options: &EngineOptions,
    ) -> anyhow::Result<Engine> {
        let base = BaseUrl::parse(base_url)
            .map_err(|error| ConfigError::new("AI_MODEL_ENDPOINT", error))?;
        Ok(Engine {
            http: HttpClients::new(base.configured(), address, options)?,
            text_log: UntrustedTextLog::new(options, base.configured()),
            base: Arc::new(base),
            learned: Arc::default(),
        })
    }

    /// The request fields that the engine does not support.
    pub(crate) fn learned(&self) -> &LearnedLimits {
        &self.learned
    }

    /// Sends a request and returns its response stream. The caller sets the timeout; `headers`
    /// propagate the trace.
    pub(crate) async fn send(
        &self,
        operation: Operation,
        headers: HeaderMap,
        body: Bytes,
    ) -> Result<ResponseStream, EngineError> {
        let request = self.http.post(self.base.join(operation.path())).headers(headers);
        let request = request.header(CONTENT_TYPE, "application/json").body(body);
        let response = self.send_checked(request).await?;
        let text_log = self.text_log.clone();
        Ok(ResponseStream {
            response,
            parser: SseParser::default(),
            last_read: Instant::now(),
            text_log,
        })
    }

    /// The models and adapters that it serves. If there is no list at the base URL, it is requested once with
    /// or without `/v1`, and the base URL with a list is used from then on.
    pub(crate) async fn models(&self) -> Result<Vec<ListedModel>, EngineError> {
        let list = async {
            let chosen = self.base.chosen();
            let (found, models) = match self.models_at(self.base.join("models")).await {
                Err(error) if error.is_path_missing() => {
                    let (other, url) = self.base.join_other("models");
                    (other, self.models_at(url).await.map_err(|_| error)?)
                }
                result => (chosen, result?),
            };
            if let Some(base) = self.base.confirm(found) {
                tracing::info!("the base URL of the engine is {base}");
            }
            Ok(models)
        };
        timeout(METADATA_TIMEOUT, list).await.map_err(|_| EngineError::Timeout)?
    }

    async fn models_at(&self, url: Url) -> Result<Vec<ListedModel>, EngineError> {
        let response = self.send_checked(self.http.get(url)).await?;
        let body = self.read_whole(response, MAX_REPLY_BYTES).await?;
        models::parse_list(&body)
            .inspect_err(|_| self.text_log.log("cannot parse an engine's list of models", &body))
    }

    /// The page of metrics, which vLLM serves beside `/v1`.
    pub(crate) async fn metrics(&self) -> Result<String, EngineError> {
        let page = async {
            let request = self.http.get(self.base.join_beside("metrics"));
            let response =
                self.http.send(request).await.map_err(|error| EngineError::from(&error))?;
            // Not logged: engines without this page would fill the log once a second.
            if !response.status().is_success() {
                return Err(EngineError::refused(response.status(), None, &[]));
            }
            let body = self.read_whole(response, MAX_METRICS_PAGE_BYTES).await?;
            String::from_utf8(body).map_err(|_| EngineError::InvalidReply(DecodeError::NotUtf8))
        };
        timeout(METADATA_TIMEOUT, page).await.map_err(|_| EngineError::Timeout)?
    }

    /// Sends a request and requires a success status. An error body is logged and dropped.
    async fn send_checked(&self, request: RequestBuilder) -> Result<Response, EngineError> {
        let response = self
            .http
            .send(request)
            .await
            .map_err(|error| self.text_log.connection_error(&error))?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        let wait = retry_after::from_headers(response.headers(), SystemTime::now());
        let body = self.read_whole(response, MAX_REPLY_BYTES).await.unwrap_or_default();
        self.text_log.log("an engine rejected a request", &body);
        Err(EngineError::refused(status, wait, &body))
    }

    async fn read_whole(
        &self,
        mut response: Response,
        limit: usize,
    ) -> Result<Vec<u8>, EngineError> {
        let mut body = Vec::new();
        while let Some(bytes) = response.chunk().await.map_err(|error| EngineError::from(&error))? {
            if body.len() + bytes.len() > limit {
                return Err(EngineError::InvalidReply(DecodeError::TooLarge(limit)));
            }
            body.extend_from_slice(&bytes);
        }
        Ok(body)
    }
}

/// The content of one or more events of a chat stream.
#[derive(Debug, Default)]
pub(crate) struct StreamDelta {
    pub(crate) text: String,
    /// Events with text since the start of the stream: about the number of tokens.
    pub(crate) text_events: u32,
    pub(crate) finish_reason: Option<FinishReason>,
    pub(crate) usage: Option<Usage>,
    /// The model, as the engine names it: untrusted text.
    pub(crate) model: Option<String>,
    /// `[DONE]` has arrived.
    pub(crate) done: bool,
}

impl EventAccumulator for StreamDelta {
    fn push(&mut self, data: &[u8]) -> Result<(), EngineError> {
        if self.done || data == b"[DONE]" {
            self.done = true;
            return Ok(());
        }
        let chunk: ChatChunk<'_> =
            serde_json::from_slice(data).map_err(|error| EngineError::from(&error))?;
        // Engines send errors inside a stream with status 200, followed by [DONE].
        if let Some(error) = &chunk.error {
            return Err(stream_error(error));
        }
        if let (None, Some(JsonText(model))) = (&self.model, chunk.model) {
            self.model = Some(model.into_owned());
        }
        if let Some(choice) = chunk.choices.into_iter().next() {
            if let Some(JsonText(text)) = choice.delta.content {
                self.text.push_str(&text);
                // The first event contains the role and no text.
                self.text_events = self.text_events.saturating_add(u32::from(!text.is_empty()));
            }
            self.finish_reason = choice.finish_reason.or(self.finish_reason);
        }
        if let Some(usage) = chunk.usage {
            self.usage = Some(usage.into());
        }
        Ok(())
    }

    fn has_begun(&self) -> bool {
        self.text_events > 0
    }

    fn is_done(&self) -> bool {
        self.done
    }
}

/// A response stream. Dropping it closes the connection, which aborts the engine's work.
#[derive(Debug)]
pub(crate) struct ResponseStream {
    response: Response,
    parser: SseParser,
    last_read: Instant,
    text_log: UntrustedTextLog,
}

impl ResponseStream {
    /// Waits for the engine and accumulates its events. Cancel-safe: what was read stays in `events`,
    /// also after an error.
    ///
    /// An engine writes each token as a separate HTTP chunk. In a burst, chunks that have already
    /// arrived are coalesced, because a frame for each would cost more than the token.
    pub(crate) async fn read(
        &mut self,
        events: &mut impl EventAccumulator,
    ) -> Result<(), EngineError> {
        let bytes =
            self.response.chunk().await.map_err(|error| self.text_log.connection_error(&error))?;
        self.push(bytes, events)?;
        let now = Instant::now();
        let is_burst = now - std::mem::replace(&mut self.last_read, now) < COALESCE_INTERVAL;
        let more = if is_burst { MAX_COALESCED_CHUNKS } else { 0 };
        for _ in 0..more {
            if events.is_done() {
                break;
            }
            // The connection's task delivers one chunk each time it runs.
            yield_now().await;
            let Some(read) = self.response.chunk().now_or_never() else { break };
            self.push(read.map_err(|error| self.text_log.connection_error(&error))?, events)?;
        }
        Ok(())
    }

    fn push(
        &mut self,
        bytes: Option<Bytes>,
        events: &mut impl EventAccumulator,
    ) -> Result<(), EngineError> {
        let bytes = bytes.ok_or(EngineError::Truncated)?;
        let text_log = &self.text_log;
        self.parser.feed(&bytes, |data| {
            events
                .push(data)
                .inspect_err(|_| text_log.log("an engine sent an error or an invalid event", data))
        })
    }

    /// Reads the end of the response after `[DONE]`, so that the connection can be reused. Gives up
    /// after a short timeout.
    pub(crate) async fn close(&mut self) {
        let end = async { while let Ok(Some(_)) = self.response.chunk().await {} };
        let _ = timeout(DRAIN_TIMEOUT, end).await;
    }
}
