//! Request and response types of the OpenAI-compatible API that vLLM, llama.cpp and others share.
//! Requests contain only these fields, so nothing that a client sends reaches an engine unchecked.
//! Responses are parsed leniently, because engines omit unset fields.

use std::borrow::Cow;

use hapa_proto::codegen::v1::Usage;
use serde::{Deserialize, Deserializer, Serialize};

use crate::request::generate_params::MAX_MODEL_NAME_LEN;
use crate::request::unicode::{is_bidi, is_invisible};
use crate::upstream::engine::EngineError;

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

/// One event of a chat stream.
#[derive(Debug, Deserialize)]
pub(crate) struct ChatChunk<'a> {
    #[serde(borrow, default)]
    pub(crate) model: Option<JsonText<'a>>,
    #[serde(borrow, default)]
    pub(crate) choices: Vec<ChatChoice<'a>>,
    #[serde(default)]
    pub(crate) usage: Option<WireUsage>,
    #[serde(default)]
    pub(crate) error: Option<serde_json::Value>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct ChatChoice<'a> {
    #[serde(borrow, default)]
    pub(crate) delta: ChatDelta<'a>,
    #[serde(default)]
    pub(crate) finish_reason: Option<FinishReason>,
}

/// One event of a text completion stream.
#[derive(Debug, Deserialize)]
pub(crate) struct TextChunk<'a> {
    #[serde(borrow, default)]
    pub(crate) model: Option<JsonText<'a>>,
    #[serde(borrow, default)]
    pub(crate) choices: Vec<TextChoice<'a>>,
    #[serde(default)]
    pub(crate) usage: Option<WireUsage>,
    #[serde(default)]
    pub(crate) error: Option<serde_json::Value>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct TextChoice<'a> {
    #[serde(default)]
    pub(crate) index: usize,
    #[serde(borrow, default)]
    pub(crate) text: Option<JsonText<'a>>,
    #[serde(default)]
    pub(crate) logprobs: Option<Logprobs>,
    #[serde(default)]
    pub(crate) finish_reason: Option<FinishReason>,
}

/// Log probabilities, in the form of vLLM or of llama.cpp.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Logprobs {
    token_logprobs: Option<Vec<Option<f64>>>,
    content: Option<Vec<TokenLogprob>>,
}

#[derive(Debug, Deserialize)]
struct TokenLogprob {
    logprob: f64,
}

impl Logprobs {
    /// The log probability of each token that has one.
    pub(crate) fn values(&self) -> impl Iterator<Item = f64> {
        let vllm = self.token_logprobs.iter().flatten().filter_map(|one| *one);
        let llama_cpp = self.content.iter().flatten().map(|token| token.logprob);
        vllm.chain(llama_cpp)
    }
}

#[derive(Debug, Default, Deserialize)]
pub(crate) struct ChatDelta<'a> {
    /// Borrowed if the JSON has no escapes.
    #[serde(borrow, default)]
    pub(crate) content: Option<JsonText<'a>>,
}

/// A string borrowed from the JSON. serde needs the `borrow` attribute on the field itself, which
/// `Option` hides.
#[derive(Debug, Deserialize)]
#[serde(transparent)]
pub(crate) struct JsonText<'a>(#[serde(borrow)] pub(crate) Cow<'a, str>);

#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default)]
#[expect(clippy::struct_field_names, reason = "the names of the protocol")]
pub(crate) struct WireUsage {
    #[serde(deserialize_with = "saturating_u32")]
    prompt_tokens: u32,
    #[serde(deserialize_with = "saturating_u32")]
    completion_tokens: u32,
    #[serde(deserialize_with = "saturating_u32")]
    total_tokens: u32,
}

/// Any number or null, saturated to `u32`: an impossible count must not fail the response.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "such a cast saturates"
)]
fn saturating_u32<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    Ok(Option::<f64>::deserialize(deserializer)?.unwrap_or_default() as u32)
}

impl From<WireUsage> for Usage {
    fn from(usage: WireUsage) -> Usage {
        let WireUsage { prompt_tokens, completion_tokens, total_tokens } = usage;
        // Some engines omit the sum.
        let total_tokens = total_tokens.max(prompt_tokens.saturating_add(completion_tokens));
        Usage { prompt_tokens, completion_tokens, total_tokens }
    }
}

/// GET /models.
#[derive(Debug, Deserialize)]
pub(crate) struct ModelList {
    pub(crate) data: Vec<ListedModel>,
}

#[derive(Clone, Debug, Deserialize)]
pub(crate) struct ListedModel {
    pub(crate) id: String,
    #[serde(default)]
    pub(crate) parent: Option<String>,
    #[serde(default)]
    pub(crate) max_model_len: Option<u32>,
    /// Origin of the weights.
    #[serde(default)]
    pub(crate) root: Option<String>,
}

impl ListedModel {
    /// `None` if no request could name the model. Names appear in lists, logs and traces, so they must
    /// be visible text and no longer than a request allows.
    pub(super) fn validated(self) -> Option<ListedModel> {
        let parent = self.parent.filter(|parent| is_valid_model_name(parent));
        is_valid_model_name(&self.id).then_some(ListedModel { parent, ..self })
    }
}

fn is_valid_model_name(name: &str) -> bool {
    let is_visible = |letter: char| {
        !letter.is_control() && !letter.is_whitespace() && !is_invisible(letter) && !is_bidi(letter)
    };
    (1..=MAX_MODEL_NAME_LEN).contains(&name.chars().count()) && name.chars().all(is_visible)
}

/// Why a response ended: a fixed list. Any other value of an engine becomes `other`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(from = "Cow<'_, str>")]
pub(crate) enum FinishReason {
    Stop,
    Length,
    ContentFilter,
    ToolCalls,
    Repetition,
    Abort,
    Error,
    Other,
}

impl FinishReason {
    /// Value in the API.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::ContentFilter => "content_filter",
            FinishReason::ToolCalls => "tool_calls",
            FinishReason::Repetition => "repetition",
            FinishReason::Abort => "abort",
            FinishReason::Error => "error",
            FinishReason::Other => "other",
        }
    }

    /// Whether the engine aborted the response.
    pub(crate) fn is_failure(self) -> bool {
        matches!(self, FinishReason::Abort | FinishReason::Error)
    }
}

impl From<Cow<'_, str>> for FinishReason {
    fn from(text: Cow<'_, str>) -> FinishReason {
        match text.as_ref() {
            "stop" => FinishReason::Stop,
            "length" => FinishReason::Length,
            "content_filter" => FinishReason::ContentFilter,
            "tool_calls" => FinishReason::ToolCalls,
            "repetition" => FinishReason::Repetition,
            "abort" => FinishReason::Abort,
            "error" => FinishReason::Error,
            _ => FinishReason::Other,
        }
    }
}

/// Converts an error inside a stream. Only its status is kept, if it has one.
pub(crate) fn stream_error(error: &serde_json::Value) -> EngineError {
    let code = error.get("code").or_else(|| error.get("status"));
    let code = code.and_then(serde_json::Value::as_u64).and_then(|code| u16::try_from(code).ok());
    EngineError::StreamError(code.filter(|code| (400..600).contains(code)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_of_vllm_and_llama_cpp_are_parsed_without_copies() {
        let vllm = r#"{"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":{"content":" 함수"},"logprobs":null,"finish_reason":null}]}"#;
        let chunk: ChatChunk<'_> = serde_json::from_str(vllm).unwrap();
        assert!(matches!(&chunk.choices[0].delta.content, Some(JsonText(Cow::Borrowed(" 함수")))));
        let role = r#"{"choices":[{"index":0,"delta":{"role":"assistant","content":null}}]}"#;
        let chunk: ChatChunk<'_> = serde_json::from_str(role).unwrap();
        assert!(chunk.choices[0].delta.content.is_none());
        let usage =
            r#"{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4,"total_tokens":7}}"#;
        let chunk: ChatChunk<'_> = serde_json::from_str(usage).unwrap();
        assert_eq!(Usage::from(chunk.usage.unwrap()).total_tokens, 7);
    }

    #[test]
    fn impossible_token_counts_are_saturated() {
        for (text, count) in [
            ("7", 7),
            ("7.0", 7),
            ("4e9", 4_000_000_000),
            ("8000000000", u32::MAX),
            ("1e300", u32::MAX),
            ("-3", 0),
            ("null", 0),
        ] {
            let usage = format!(r#"{{"choices":[],"usage":{{"prompt_tokens":{text}}}}}"#);
            let chunk: ChatChunk<'_> = serde_json::from_str(&usage).unwrap();
            let usage = Usage::from(chunk.usage.unwrap());
            assert_eq!((usage.prompt_tokens, usage.total_tokens), (count, count), "{text}");
        }
        let parts = r#"{"choices":[],"usage":{"prompt_tokens":70,"completion_tokens":40}}"#;
        let chunk: ChatChunk<'_> = serde_json::from_str(parts).unwrap();
        assert_eq!(Usage::from(chunk.usage.unwrap()).total_tokens, 110);
    }

    #[test]
    fn text_completions_and_both_forms_of_log_probabilities_are_parsed() {
        let vllm = r#"{"id":"cmpl-1","object":"text_completion","created":1,"model":"m","choices":[{"index":2,"text":" a","logprobs":{"text_offset":[0],"token_logprobs":[-0.5,null],"tokens":[" a"],"top_logprobs":[{" a":-0.5}]},"finish_reason":null,"stop_reason":null}],"usage":{"prompt_tokens":3,"total_tokens":4,"completion_tokens":1}}"#;
        let chunk: TextChunk<'_> = serde_json::from_str(vllm).unwrap();
        let choice = &chunk.choices[0];
        assert!(matches!(&choice.text, Some(JsonText(Cow::Borrowed(" a")))));
        assert_eq!(choice.index, 2);
        assert_eq!(choice.logprobs.as_ref().unwrap().values().collect::<Vec<_>>(), [-0.5]);
        assert_eq!(Usage::from(chunk.usage.unwrap()).completion_tokens, 1);
        let llama = r#"{"choices":[{"text":"b","index":0,"logprobs":{"content":[{"id":1,"token":"b","logprob":-0.25,"top_logprobs":[]}]},"finish_reason":null}]}"#;
        let chunk: TextChunk<'_> = serde_json::from_str(llama).unwrap();
        let values: Vec<_> = chunk.choices[0].logprobs.as_ref().unwrap().values().collect();
        assert_eq!(values, [-0.25]);
        let bare = r#"{"choices":[{"text":"c","logprobs":null}]}"#;
        let chunk: TextChunk<'_> = serde_json::from_str(bare).unwrap();
        assert!(chunk.choices[0].logprobs.is_none());
    }

    #[test]
    fn only_the_status_of_an_error_in_a_stream_is_kept() {
        for (error, expected) in [
            (serde_json::json!({"message": "what was asked", "code": 500}), Some(500)),
            (serde_json::json!({"message": "what was asked", "status": 422}), Some(422)),
            (serde_json::json!({"code": "what was asked"}), None),
            (serde_json::json!({"code": 9_999_999}), None),
            ("what was asked".into(), None),
        ] {
            assert_eq!(stream_error(&error), EngineError::StreamError(expected), "{error}");
        }
    }

    #[test]
    fn an_unknown_finish_reason_becomes_other() {
        let read = |text: &str| {
            let json = format!(r#"{{"choices":[{{"delta":{{}},"finish_reason":{text}}}]}}"#);
            let chunk: ChatChunk<'_> = serde_json::from_str(&json).unwrap();
            chunk.choices[0].finish_reason.map(FinishReason::as_str)
        };
        assert_eq!(read("null"), None);
        assert_eq!(read(r#""what was asked""#), Some("other"));
        assert_eq!(read(r#""what\nwas \u0061sked""#), Some("other"));
        let known = ["stop", "length", "content_filter", "tool_calls", "repetition", "abort"];
        for reason in known.into_iter().chain(["error", "other"]) {
            assert_eq!(read(&format!("{reason:?}")), Some(reason));
        }
    }

    #[test]
    fn a_model_that_no_request_could_name_is_not_listed() {
        let listed = |id: &str, parent: Option<&str>| {
            let model = ListedModel {
                id: id.to_owned(),
                parent: parent.map(str::to_owned),
                max_model_len: None,
                root: None,
            };
            model.validated().map(|model| (model.id, model.parent))
        };
        let own = listed("Qwen/Qwen2.5-Coder-7B@main:fp8", Some("기본"));
        assert_eq!(own.unwrap().1.as_deref(), Some("기본"));
        assert_eq!(listed("m", Some("a\nb")).unwrap().1, None);
        let long = "m".repeat(201);
        for odd in ["", "a b", "a\nb", "a\u{1b}[31m", "a\u{200b}", "a\u{202e}b", long.as_str()] {
            assert!(listed(odd, None).is_none(), "{odd:?}");
        }
    }
}
