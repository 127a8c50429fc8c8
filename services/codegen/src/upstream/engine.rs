//! The client of one engine: a vLLM-compatible server behind HTTP. Response streams are pulled, so a
//! slow client slows the engine down, and a cancelled call drops the connection, which makes the
//! engine stop.
//!
//! An engine's own error texts never leave this module, because they may repeat a prompt, a key or a
//! host name. Errors carry a kind from a fixed list, numbers and a fixed sentence.

mod decode;
mod delta;
mod error;
mod finish_reason;
mod models;
mod request_body;
mod response;
mod retry_after;
pub(crate) mod sse;
#[cfg_attr(not(test), expect(dead_code, reason = "its consumers are being written"))]
mod tool_calls;
mod untrusted_text;

use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use hapa_core::config::ConfigError;
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue, RETRY_AFTER};
use reqwest::{Body, Client, RequestBuilder, Response, redirect};
use secrecy::ExposeSecret as _;
use tokio::time::timeout;

use crate::upstream::engine::models::ModelList;
use crate::upstream::engine::untrusted_text::UntrustedTextLog;

pub(crate) use crate::upstream::engine::delta::{Content, EngineDelta, Piece, UsageCounter};
pub(crate) use crate::upstream::engine::error::{
    DecodeError, EngineError, RefusalReason, stream_error,
};
pub(crate) use crate::upstream::engine::finish_reason::FinishReason;
pub(crate) use crate::upstream::engine::models::ListedModel;
pub(crate) use crate::upstream::engine::request_body::{
    ChatMessage, ChatRequest, CompletionRequest, EngineScheduling, StreamOptions,
};
pub(crate) use crate::upstream::engine::response::{ReadOutcome, ResponseStream};
pub(crate) use crate::upstream::engine::untrusted_text::EngineOptions;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// For replies that an engine makes from memory: its models and metrics.
const METADATA_TIMEOUT: Duration = Duration::from_secs(2);
/// Below the 5 s after which uvicorn, which vLLM runs on, closes idle connections.
const POOL_IDLE_TIMEOUT: Duration = Duration::from_secs(4);
/// Maximum size of an error body or a list of models.
const MAX_REPLY_BYTES: usize = 1024 * 1024;
/// Maximum size of a page of metrics.
const MAX_METRICS_PAGE_BYTES: usize = 4 * MAX_REPLY_BYTES;
/// Maximum number of models read from one engine.
const MAX_MODELS: usize = 1_000;

/// An HTTP client of one engine.
#[derive(Clone, Debug)]
pub(crate) struct Engine {
    http: Client,
    base_url: String,
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
        // Fails only if another server of this process has installed it before.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut headers = HeaderMap::new();
        if let Some(key) = &options.key {
            let value = HeaderValue::from_str(&format!("Bearer {}", key.expose_secret()));
            let mut value = value.map_err(|_| {
                ConfigError::new(
                    "AI_MODEL_API_KEY",
                    "must not contain line ends or control characters",
                )
            })?;
            value.set_sensitive(true);
            headers.insert(AUTHORIZATION, value);
        }
        let http = match address {
            // The name stays in the Host header and in the certificate check.
            Some((name, address)) => Client::builder().resolve(name, address),
            None => Client::builder(),
        };
        let http = http
            .default_headers(headers)
            .connect_timeout(CONNECT_TIMEOUT)
            .pool_idle_timeout(POOL_IDLE_TIMEOUT)
            .tcp_nodelay(true)
            // Neither a redirect nor a proxy from the environment may send prompts elsewhere.
            .redirect(redirect::Policy::none())
            .no_proxy()
            .referer(false)
            .build()?;
        let base_url = base_url.trim_end_matches('/').to_owned();
        Ok(Engine { http, text_log: UntrustedTextLog::new(options, &base_url), base_url })
    }

    /// Sends a request and returns its response stream. The caller sets the timeout; `headers`
    /// propagate the trace.
    pub(crate) async fn send(
        &self,
        operation: Operation,
        headers: HeaderMap,
        body: impl Into<Body>,
    ) -> Result<ResponseStream, EngineError> {
        let url = format!("{}/{}", self.base_url, operation.path());
        let request = self.http.post(url).headers(headers);
        let request = request.header(CONTENT_TYPE, "application/json").body(body);
        let response = self.send_checked(request).await?;
        Ok(ResponseStream::new(response, self.text_log.clone()))
    }

    /// The models and adapters that it serves.
    pub(crate) async fn models(&self) -> Result<Vec<ListedModel>, EngineError> {
        let list = async {
            let url = format!("{}/models", self.base_url);
            let response = self.send_checked(self.http.get(url)).await?;
            let body = self.read_whole(response, MAX_REPLY_BYTES).await?;
            let list: ModelList = serde_json::from_slice(&body).map_err(|error| {
                self.text_log.log("cannot parse an engine's list of models", &body);
                EngineError::from(&error)
            })?;
            Ok(list.data.into_iter().filter_map(ListedModel::validated).take(MAX_MODELS).collect())
        };
        timeout(METADATA_TIMEOUT, list).await.map_err(|_| EngineError::Timeout)?
    }

    /// The page of metrics, which vLLM serves beside `/v1`.
    pub(crate) async fn metrics(&self) -> Result<String, EngineError> {
        let page = async {
            let base = self.base_url.strip_suffix("/v1").unwrap_or(&self.base_url);
            let url = format!("{base}/metrics");
            let response =
                self.http.get(url).send().await.map_err(|error| EngineError::from(&error))?;
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
        let response =
            request.send().await.map_err(|error| self.text_log.connection_error(&error))?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        let wait = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok());
        let wait = wait.and_then(|text| retry_after::parse(text, SystemTime::now()));
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
