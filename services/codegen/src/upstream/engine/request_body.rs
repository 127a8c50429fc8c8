//! Request bodies of the OpenAI-compatible API. They contain only these fields, so nothing that a client sends reaches an
//! engine unchecked.

use serde::Serialize;

/// POST /chat/completions.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct ChatRequest<'a> {
    pub(crate) model: &'a str,
    pub(crate) messages: [ChatMessage<'a>; 2],
    pub(crate) temperature: f64,
    pub(crate) top_p: f64,
    pub(crate) max_tokens: i32,
    pub(crate) stream: bool,
    pub(crate) stream_options: StreamOptions,
    #[serde(flatten)]
    pub(crate) scheduling: EngineScheduling,
}

/// Tenant-specific fields of vLLM, never set by clients. Other engines ignore them.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct EngineScheduling {
    /// Separates the prefix caches: prompts with different salts share nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) cache_salt: Option<String>,
    /// Lower values are scheduled first; the default is 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) priority: Option<i32>,
}

#[derive(Clone, Debug, Serialize)]
pub(crate) struct ChatMessage<'a> {
    pub(crate) role: &'static str,
    pub(crate) content: &'a str,
}

#[derive(Clone, Debug, Serialize)]
pub(crate) struct StreamOptions {
    pub(crate) include_usage: bool,
    /// Token counts on every chunk of each choice.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) continuous_usage_stats: Option<bool>,
}

/// POST /completions. Without `max_tokens`, vLLM generates 16 tokens.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct CompletionRequest<'a> {
    pub(crate) model: &'a str,
    pub(crate) prompt: &'a str,
    pub(crate) n: usize,
    pub(crate) temperature: f64,
    pub(crate) top_p: f64,
    pub(crate) max_tokens: i32,
    pub(crate) logprobs: u32,
    /// At most 4.
    pub(crate) stop: Vec<&'a str>,
    pub(crate) stream: bool,
    pub(crate) stream_options: StreamOptions,
    #[serde(flatten)]
    pub(crate) scheduling: EngineScheduling,
}
