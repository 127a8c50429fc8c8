//! What is said to the engine and what it says back, in the OpenAI-compatible form that vLLM,
//! llama.cpp and others share. The request holds these fields and no others: nothing of a caller's
//! reaches the engine unseen. Replies are read leniently, since unset fields are left out.

use std::borrow::Cow;

use hapa_proto::codegen::v1::Usage;
use serde::{Deserialize, Deserializer, Serialize};

use crate::engine::Error;
use crate::question::LONGEST_NAME;
use crate::unicode::{is_bidi, is_invisible};

/// POST /chat/completions.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct ChatRequest<'a> {
    pub(crate) model: &'a str,
    pub(crate) messages: [Message<'a>; 2],
    pub(crate) temperature: f64,
    pub(crate) top_p: f64,
    pub(crate) max_tokens: i32,
    pub(crate) stream: bool,
    pub(crate) stream_options: StreamOptions,
    #[serde(flatten)]
    pub(crate) scheduling: Scheduling,
}

/// What vLLM is told of a tenant, by us alone; others ignore it.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Scheduling {
    /// Prompts are remembered apart for each salt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) cache_salt: Option<String>,
    /// Lower goes first; 0 where nothing is said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) priority: Option<i32>,
}

#[derive(Clone, Debug, Serialize)]
pub(crate) struct Message<'a> {
    pub(crate) role: &'static str,
    pub(crate) content: &'a str,
}

#[derive(Clone, Debug, Serialize)]
pub(crate) struct StreamOptions {
    pub(crate) include_usage: bool,
    /// Counts of each answer on each of its chunks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) continuous_usage_stats: Option<bool>,
}

/// POST /completions. Without `max_tokens` vLLM makes 16.
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
    pub(crate) scheduling: Scheduling,
}

/// One event of the stream.
#[derive(Debug, Deserialize)]
pub(crate) struct Chunk<'a> {
    #[serde(borrow, default)]
    pub(crate) model: Option<Text<'a>>,
    #[serde(borrow, default)]
    pub(crate) choices: Vec<Choice<'a>>,
    #[serde(default)]
    pub(crate) usage: Option<WireUsage>,
    #[serde(default)]
    pub(crate) error: Option<serde_json::Value>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Choice<'a> {
    #[serde(borrow, default)]
    pub(crate) delta: Delta<'a>,
    #[serde(default)]
    pub(crate) finish_reason: Option<FinishReason>,
}

/// One event of a completion's stream.
#[derive(Debug, Deserialize)]
pub(crate) struct CompletionChunk<'a> {
    #[serde(borrow, default)]
    pub(crate) model: Option<Text<'a>>,
    #[serde(borrow, default)]
    pub(crate) choices: Vec<CompletionChoice<'a>>,
    #[serde(default)]
    pub(crate) usage: Option<WireUsage>,
    #[serde(default)]
    pub(crate) error: Option<serde_json::Value>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct CompletionChoice<'a> {
    #[serde(default)]
    pub(crate) index: usize,
    #[serde(borrow, default)]
    pub(crate) text: Option<Text<'a>>,
    #[serde(default)]
    pub(crate) logprobs: Option<Logprobs>,
    #[serde(default)]
    pub(crate) finish_reason: Option<FinishReason>,
}

/// As vLLM says them, or as llama.cpp does.
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
    /// Of each token for which it is known.
    pub(crate) fn known(&self) -> impl Iterator<Item = f64> {
        let vllm = self.token_logprobs.iter().flatten().filter_map(|one| *one);
        let llama_cpp = self.content.iter().flatten().map(|token| token.logprob);
        vllm.chain(llama_cpp)
    }
}

#[derive(Debug, Default, Deserialize)]
pub(crate) struct Delta<'a> {
    /// Borrowed where the JSON has no escapes.
    #[serde(borrow, default)]
    pub(crate) content: Option<Text<'a>>,
}

/// serde borrows into a `Cow` only where it is asked to at the field, which `Option` hides.
#[derive(Debug, Deserialize)]
#[serde(transparent)]
pub(crate) struct Text<'a>(#[serde(borrow)] pub(crate) Cow<'a, str>);

#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default)]
#[expect(clippy::struct_field_names, reason = "the names of the protocol")]
pub(crate) struct WireUsage {
    #[serde(deserialize_with = "saturated")]
    prompt_tokens: u32,
    #[serde(deserialize_with = "saturated")]
    completion_tokens: u32,
    #[serde(deserialize_with = "saturated")]
    total_tokens: u32,
}

/// Any number or none, as near as a `u32` comes to it: a count that no answer can have must not end
/// the answer.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "such a cast saturates"
)]
fn saturated<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    Ok(Option::<f64>::deserialize(deserializer)?.unwrap_or_default() as u32)
}

impl From<WireUsage> for Usage {
    fn from(usage: WireUsage) -> Usage {
        let WireUsage { prompt_tokens, completion_tokens, total_tokens } = usage;
        // Some engines leave out the sum.
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
    /// Where its weights come from.
    #[serde(default)]
    pub(crate) root: Option<String>,
}

impl ListedModel {
    /// None where its name could not be asked for. A name is published in lists, logs and traces, so it
    /// is one that can be seen and is no longer than a request may name.
    pub(super) fn checked(self) -> Option<ListedModel> {
        let parent = self.parent.filter(|parent| is_model_name(parent));
        is_model_name(&self.id).then_some(ListedModel { parent, ..self })
    }
}

fn is_model_name(name: &str) -> bool {
    let is_seen = |letter: char| {
        !letter.is_control() && !letter.is_whitespace() && !is_invisible(letter) && !is_bidi(letter)
    };
    (1..=LONGEST_NAME).contains(&name.chars().count()) && name.chars().all(is_seen)
}

/// Why an answer ended: published words. What an engine says beyond them is `other`.
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
    /// As callers read it.
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

    /// Whether the engine gave the answer up.
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

/// An error inside of a stream. Of what it says its status alone is kept, where it has one.
pub(crate) fn stream_error(error: &serde_json::Value) -> Error {
    let code = error.get("code").or_else(|| error.get("status"));
    let code = code.and_then(serde_json::Value::as_u64).and_then(|code| u16::try_from(code).ok());
    Error::BrokeOff(code.filter(|code| (400..600).contains(code)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_of_vllm_and_llama_cpp_are_read_without_copies() {
        let vllm = r#"{"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":{"content":" 함수"},"logprobs":null,"finish_reason":null}]}"#;
        let chunk: Chunk<'_> = serde_json::from_str(vllm).unwrap();
        assert!(matches!(&chunk.choices[0].delta.content, Some(Text(Cow::Borrowed(" 함수")))));
        let role = r#"{"choices":[{"index":0,"delta":{"role":"assistant","content":null}}]}"#;
        let chunk: Chunk<'_> = serde_json::from_str(role).unwrap();
        assert!(chunk.choices[0].delta.content.is_none());
        let usage =
            r#"{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4,"total_tokens":7}}"#;
        let chunk: Chunk<'_> = serde_json::from_str(usage).unwrap();
        assert_eq!(Usage::from(chunk.usage.unwrap()).total_tokens, 7);
    }

    #[test]
    fn counts_that_no_answer_can_have_are_read_as_near_as_they_can_be() {
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
            let chunk: Chunk<'_> = serde_json::from_str(&usage).unwrap();
            let usage = Usage::from(chunk.usage.unwrap());
            assert_eq!((usage.prompt_tokens, usage.total_tokens), (count, count), "{text}");
        }
        let parts = r#"{"choices":[],"usage":{"prompt_tokens":70,"completion_tokens":40}}"#;
        let chunk: Chunk<'_> = serde_json::from_str(parts).unwrap();
        assert_eq!(Usage::from(chunk.usage.unwrap()).total_tokens, 110);
    }

    #[test]
    fn a_completion_has_choices_with_texts_and_logarithms_in_two_forms() {
        let vllm = r#"{"id":"cmpl-1","object":"text_completion","created":1,"model":"m","choices":[{"index":2,"text":" a","logprobs":{"text_offset":[0],"token_logprobs":[-0.5,null],"tokens":[" a"],"top_logprobs":[{" a":-0.5}]},"finish_reason":null,"stop_reason":null}],"usage":{"prompt_tokens":3,"total_tokens":4,"completion_tokens":1}}"#;
        let chunk: CompletionChunk<'_> = serde_json::from_str(vllm).unwrap();
        let choice = &chunk.choices[0];
        assert!(matches!(&choice.text, Some(Text(Cow::Borrowed(" a")))));
        assert_eq!(choice.index, 2);
        assert_eq!(choice.logprobs.as_ref().unwrap().known().collect::<Vec<_>>(), [-0.5]);
        assert_eq!(Usage::from(chunk.usage.unwrap()).completion_tokens, 1);
        let llama = r#"{"choices":[{"text":"b","index":0,"logprobs":{"content":[{"id":1,"token":"b","logprob":-0.25,"top_logprobs":[]}]},"finish_reason":null}]}"#;
        let chunk: CompletionChunk<'_> = serde_json::from_str(llama).unwrap();
        let known: Vec<_> = chunk.choices[0].logprobs.as_ref().unwrap().known().collect();
        assert_eq!(known, [-0.25]);
        let bare = r#"{"choices":[{"text":"c","logprobs":null}]}"#;
        let chunk: CompletionChunk<'_> = serde_json::from_str(bare).unwrap();
        assert!(chunk.choices[0].logprobs.is_none());
    }

    #[test]
    fn of_an_error_in_a_stream_its_status_is_kept_and_no_word() {
        for (error, expected) in [
            (serde_json::json!({"message": "what was asked", "code": 500}), Some(500)),
            (serde_json::json!({"message": "what was asked", "status": 422}), Some(422)),
            (serde_json::json!({"code": "what was asked"}), None),
            (serde_json::json!({"code": 9_999_999}), None),
            ("what was asked".into(), None),
        ] {
            assert_eq!(stream_error(&error), Error::BrokeOff(expected), "{error}");
        }
    }

    #[test]
    fn a_reason_that_is_not_published_is_another() {
        let read = |text: &str| {
            let json = format!(r#"{{"choices":[{{"delta":{{}},"finish_reason":{text}}}]}}"#);
            let chunk: Chunk<'_> = serde_json::from_str(&json).unwrap();
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
    fn a_model_that_nobody_could_ask_for_is_not_listed() {
        let listed = |id: &str, parent: Option<&str>| {
            let model = ListedModel {
                id: id.to_owned(),
                parent: parent.map(str::to_owned),
                max_model_len: None,
                root: None,
            };
            model.checked().map(|model| (model.id, model.parent))
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
