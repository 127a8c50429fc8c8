//! Response types of the OpenAI-compatible API that vLLM, llama.cpp and others share. They are parsed leniently,
//! because engines omit unset fields.

use std::borrow::Cow;

use hapa_proto::codegen::v1::Usage;
use serde::{Deserialize, Deserializer};

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
        Usage { prompt_tokens, completion_tokens, total_tokens, ..Usage::default() }
    }
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
        match text.to_ascii_lowercase().as_str() {
            // TGI, Anthropic and Gemini have names of their own.
            "stop" | "eos" | "eos_token" | "stop_sequence" | "end_turn" => FinishReason::Stop,
            "length" | "max_tokens" | "max_length" | "model_length" => FinishReason::Length,
            "content_filter" | "safety" => FinishReason::ContentFilter,
            "tool_calls" | "tool_call" | "tool_use" | "function_call" => FinishReason::ToolCalls,
            "repetition" => FinishReason::Repetition,
            "abort" | "aborted" | "cancelled" => FinishReason::Abort,
            "error" => FinishReason::Error,
            _ => FinishReason::Other,
        }
    }
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
}
