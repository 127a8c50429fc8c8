//! The client of one engine: a vLLM-compatible server behind HTTP. Response streams are pulled, so a
//! slow client slows the engine down, and a cancelled call drops the connection, which makes the
//! engine stop.
//!
//! An engine's own error texts never leave this module, because they may repeat a prompt, a key or a
//! host name. Errors carry a kind from a fixed list, numbers and a fixed sentence.

mod base_url;
mod client;
mod connection;
mod decode;
mod delta;
mod echo;
mod error;
mod error_body;
mod finish_reason;
mod http1;
mod learned;
mod models;
mod refusal;
mod request_body;
mod request_field;
mod response;
mod retry_after;
pub(crate) mod sse;
#[cfg(test)]
pub(super) mod tests;
#[cfg_attr(not(test), expect(dead_code, reason = "no operation offers tools"))]
mod tool_calls;
mod untrusted_text;
mod wordings;

use std::future::poll_fn;
use std::net::SocketAddr;
use std::sync::Arc;
use std::task::{Poll, ready};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use hapa_core::config::ConfigError;
use reqwest::header::HeaderMap;
use reqwest::{RequestBuilder, Response, Url};
use tokio::time::timeout;

use crate::upstream::engine::client::HttpClients;
use crate::upstream::engine::connection::{ConnectionPool, EngineRequestMessage, PooledResponse};
use crate::upstream::engine::untrusted_text::UntrustedTextLog;

pub(crate) use crate::upstream::engine::base_url::BaseUrl;
#[cfg(test)]
pub(crate) use crate::upstream::engine::delta::ToolCallDelta;
pub(crate) use crate::upstream::engine::delta::{Content, EngineDelta, Piece, UsageCounter};
pub(crate) use crate::upstream::engine::error::{
    DecodeError, EngineError, TransportError, stream_error,
};
pub(crate) use crate::upstream::engine::finish_reason::FinishReason;
pub(crate) use crate::upstream::engine::learned::LearnedLimits;
pub(crate) use crate::upstream::engine::models::ListedModel;
pub(crate) use crate::upstream::engine::refusal::RefusalReason;
pub(crate) use crate::upstream::engine::request_body::{
    ChatMessage, ChatRequest, CompletionRequest, EngineScheduling, StreamOptions,
};
pub(crate) use crate::upstream::engine::response::{ReadOutcome, ResponseStream};
pub(crate) use crate::upstream::engine::untrusted_text::EngineOptions;

/// For replies that an engine makes from memory: its models and metrics.
const METADATA_TIMEOUT: Duration = Duration::from_secs(2);
/// Maximum size of an error body or a list of models.
const MAX_REPLY_BYTES: usize = 1024 * 1024;
/// Maximum size of a page of metrics.
const MAX_METRICS_PAGE_BYTES: usize = 4 * MAX_REPLY_BYTES;

/// An HTTP client of one engine.
#[derive(Clone, Debug)]
pub(crate) struct Engine {
    /// For lists of models and metrics.
    http: HttpClients,
    /// For generations.
    connections: Arc<ConnectionPool>,
    /// The headers of every request on `connections`.
    request_headers: HeaderMap,
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
            request_headers: client::request_headers(base.configured(), options)?,
            connections: Arc::new(ConnectionPool::new(
                base.configured(),
                address.map(|(_, address)| address),
            )),
            text_log: UntrustedTextLog::new(options, base.configured()),
            base: Arc::new(base),
            learned: Arc::default(),
        })
    }

    /// The request fields that the engine does not support.
    pub(crate) fn learned(&self) -> &LearnedLimits {
        &self.learned
    }

    /// The base URL at which the engine was found, without credentials and query, if it differs from the setting.
    pub(crate) fn found_base_url(&self) -> Option<String> {
        self.base.found()
    }

    /// Sends a request and returns its response stream. The caller sets the timeout; `headers`
    /// propagate the trace.
    pub(crate) async fn send(
        &self,
        operation: Operation,
        headers: HeaderMap,
        body: Bytes,
    ) -> Result<ResponseStream, EngineError> {
        let request = self.request(operation, headers, body.clone());
        let response = self.connections.send(request).await;
        let mut response = response.map_err(|error| self.text_log.transport_error(error))?;
        let status = response.head.status;
        if status.is_success() {
            return Ok(ResponseStream::new(response, body, self.text_log.clone()));
        }
        let wait = retry_after::from_headers(&response.head.headers, SystemTime::now());
        let error = read_error_body(&mut response).await;
        response.release();
        self.text_log.log("an engine rejected a request", &error);
        Err(EngineError::refused_request(status, wait, &error, &body))
    }

    fn request(
        &self,
        operation: Operation,
        mut headers: HeaderMap,
        body: Bytes,
    ) -> EngineRequestMessage {
        let url = self.base.join(operation.path());
        headers.extend(self.request_headers.clone());
        let head = http1::request_head((url.path(), url.query()), &headers, body.len());
        EngineRequestMessage { head, body }
    }

    /// The models and adapters that it serves. If there is no list at the base URL, it is requested once with
    /// or without `/v1`, and the base URL with a list is used from then on.
    pub(crate) async fn models(&self) -> Result<Vec<ListedModel>, EngineError> {
        self.connections.evict_idle();
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

/// The body of a rejection. What cannot be read is dropped.
async fn read_error_body(response: &mut PooledResponse) -> Vec<u8> {
    let mut body = Vec::new();
    let read = poll_fn(|cx| {
        while let Some(Ok(bytes)) = ready!(response.poll_data(cx)) {
            if body.len() + bytes.len() > MAX_REPLY_BYTES {
                break;
            }
            body.extend_from_slice(bytes);
        }
        Poll::Ready(())
    });
    let _ = timeout(METADATA_TIMEOUT, read).await;
    body
}
