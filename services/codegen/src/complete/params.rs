//! A validated completion request with its defaults.

use hapa_core::violations::Violations;
use hapa_proto::codegen::v1::CompleteCodeRequest;

use crate::complete::TASK;
use crate::complete::fim::FimPrompt;
use crate::complete::trim::CompletionKind;
use crate::request::generate_params::{
    MAX_MODEL_NAME_LEN, MAX_PATH_LEN, MAX_SESSION_ID_LEN, caller_fields, check_lengths,
    check_location, check_request_id, check_sampling, or_default,
};
use crate::request::task::{self, Sampling};
use crate::request::unicode;
use crate::schedule::budget::Estimate;
use crate::upstream::engine::{CompletionRequest, EngineScheduling, StreamOptions};

const MAX_PREFIX_LEN: usize = 8_000;
const MAX_SUFFIX_LEN: usize = 4_000;
const MAX_SUGGESTIONS: i32 = 20;
const DEFAULT_SUGGESTIONS: i32 = 5;

/// The parameters of a completion.
#[derive(Clone, Debug)]
pub(crate) struct CompletionParams {
    pub(crate) prefix: String,
    /// Everything but the prefix that determines the suggestions.
    pub(crate) options: CompletionOptions,
    /// The sampling parameters that the caller has set.
    pub(crate) caller_fields: Vec<&'static str>,
    /// Several suggestions were requested, but only one is generated.
    pub(crate) is_greedy: bool,
    pub(crate) no_cache: bool,
    pub(crate) session_id: String,
    /// The requested model, if any.
    pub(crate) model: Option<String>,
    pub(crate) request_id: Option<String>,
}

/// Everything but the prefix and the model that determines the suggestions. Cached suggestions are
/// reused only for equal options.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct CompletionOptions {
    pub(crate) suffix: String,
    pub(crate) language: String,
    pub(crate) file_path: String,
    pub(crate) kind: CompletionKind,
    pub(crate) max_suggestions: usize,
    temperature: f64,
    top_p: f64,
    max_tokens: i32,
}

impl CompletionParams {
    /// Validates every field and reports all violations.
    pub(crate) fn validate(
        mut request: CompleteCodeRequest,
    ) -> Result<CompletionParams, Violations> {
        let mut violations = Violations::default();
        for text in [&mut request.prefix, &mut request.suffix] {
            unicode::strip_in_place(text);
        }
        check_texts(&request, &mut violations);
        check_location(&request.language, &request.file_path, &mut violations);
        check_request_id(&request.request_id, &mut violations);
        check_sampling(request.temperature, request.top_p, request.max_tokens, &mut violations);
        let max_suggestions = request.max_suggestions.unwrap_or(DEFAULT_SUGGESTIONS);
        if !(1..=MAX_SUGGESTIONS).contains(&max_suggestions) {
            violations
                .add_invalid("max_suggestions", format!("must be from 1 to {MAX_SUGGESTIONS}"));
        }
        let kind = or_default(request.completion_type, CompletionKind::Inline.as_str());
        violations.check_one_of(
            "completion_type",
            &kind,
            &CompletionKind::ALL.map(CompletionKind::as_str),
        );
        violations.check()?;
        let defaults = task::sampling(TASK);
        let temperature = request.temperature.unwrap_or(defaults.temperature);
        let requested = usize::try_from(max_suggestions).unwrap_or(1);
        // Without randomness all choices would be equal, and vLLM rejects more than one.
        let is_greedy = temperature <= 0.0 && requested > 1;
        let options = CompletionOptions {
            suffix: request.suffix,
            language: or_default(request.language, "python"),
            file_path: request.file_path,
            kind: CompletionKind::ALL
                .into_iter()
                .find(|one| one.as_str() == kind)
                .unwrap_or(CompletionKind::Inline),
            max_suggestions: if is_greedy { 1 } else { requested },
            temperature,
            top_p: request.top_p.unwrap_or(defaults.top_p),
            max_tokens: request.max_tokens.unwrap_or(defaults.max_tokens),
        };
        Ok(CompletionParams {
            prefix: request.prefix,
            options,
            is_greedy,
            caller_fields: caller_fields(request.temperature, request.top_p),
            no_cache: request.no_cache,
            session_id: request.session_id,
            model: Some(request.model).filter(|model| !model.is_empty()),
            request_id: Some(request.request_id).filter(|id| !id.is_empty()),
        })
    }

    /// The sampling parameters.
    pub(crate) fn sampling(&self) -> Sampling {
        let CompletionOptions { temperature, top_p, max_tokens, .. } = self.options;
        Sampling { max_tokens, temperature, top_p }
    }

    /// The number of tokens to reserve from the token budget, for the prompt and all choices.
    pub(crate) fn estimate(&self, body: &[u8]) -> Estimate {
        let choices = i64::try_from(self.options.max_suggestions).unwrap_or(i64::MAX);
        Estimate::for_body(body, choices.saturating_mul(self.options.max_tokens.into()))
    }

    /// The body of the request to the engine.
    pub(crate) fn body(
        &self,
        model: &str,
        prompt: &FimPrompt,
        scheduling: EngineScheduling,
    ) -> serde_json::Result<Vec<u8>> {
        let mut stop: Vec<&str> = prompt.end_tokens.iter().map(String::as_str).collect();
        if self.options.kind == CompletionKind::Inline {
            stop.push("\n");
        }
        serde_json::to_vec(&CompletionRequest {
            model,
            prompt: &prompt.prompt,
            n: self.options.max_suggestions,
            temperature: self.options.temperature,
            top_p: self.options.top_p,
            max_tokens: self.options.max_tokens,
            logprobs: 1,
            stop,
            stream: true,
            // Usage on every chunk, because the stream may be stopped before its last chunk.
            stream_options: StreamOptions {
                include_usage: true,
                continuous_usage_stats: Some(true),
            },
            scheduling,
        })
    }
}

fn check_texts(request: &CompleteCodeRequest, violations: &mut Violations) {
    if request.prefix.trim().is_empty() {
        violations.add_missing("prefix");
    }
    let limits = [
        ("prefix", &request.prefix, MAX_PREFIX_LEN),
        ("suffix", &request.suffix, MAX_SUFFIX_LEN),
        ("file_path", &request.file_path, MAX_PATH_LEN),
        ("model", &request.model, MAX_MODEL_NAME_LEN),
        ("session_id", &request.session_id, MAX_SESSION_ID_LEN),
    ];
    check_lengths(&limits, violations);
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use super::*;
    use crate::complete::fim;

    fn fields(change: impl FnOnce(&mut CompleteCodeRequest)) -> Vec<Cow<'static, str>> {
        let mut request = CompleteCodeRequest { prefix: "a".to_owned(), ..Default::default() };
        change(&mut request);
        CompletionParams::validate(request)
            .err()
            .map(|violations| violations.fields())
            .unwrap_or_default()
    }

    #[test]
    fn limits_count_characters_and_both_ends_are_allowed() {
        let none: Vec<Cow<'static, str>> = Vec::new();
        assert_eq!(fields(|request| request.prefix = "한".repeat(8_000)), none);
        assert_eq!(fields(|request| request.prefix = "한".repeat(8_001)), ["prefix"]);
        assert_eq!(fields(|request| request.prefix = " \n\t".to_owned()), ["prefix"]);
        assert_eq!(fields(|request| request.suffix = "한".repeat(4_000)), none);
        assert_eq!(fields(|request| request.suffix = "x".repeat(4_001)), ["suffix"]);
        for (most, wrong) in [(0, true), (1, false), (20, false), (21, true)] {
            let violations = fields(|request| request.max_suggestions = Some(most));
            assert_eq!(!violations.is_empty(), wrong, "{most}");
        }
        for kind in ["inline", "block", "function"] {
            assert_eq!(fields(|request| request.completion_type = kind.to_owned()), none);
        }
        assert_eq!(
            fields(|request| request.completion_type = "Block".to_owned()),
            ["completion_type"]
        );
        assert_eq!(fields(|request| request.session_id = "x".repeat(129)), ["session_id"]);
    }

    #[test]
    fn temperature_0_requests_one_suggestion() {
        for (temperature, most, expected) in [(0.0, 5, 1), (0.0, 1, 1), (0.1, 5, 5)] {
            let request = CompleteCodeRequest {
                prefix: "a".to_owned(),
                temperature: Some(temperature),
                max_suggestions: Some(most),
                ..Default::default()
            };
            let params = CompletionParams::validate(request).unwrap();
            assert_eq!(params.options.max_suggestions, expected);
            assert_eq!(params.is_greedy, most != i32::try_from(expected).unwrap());
        }
    }

    #[test]
    fn the_body_contains_the_listed_fields_and_no_others() {
        let request = CompleteCodeRequest {
            prefix: "def f(".to_owned(),
            suffix: "):\n".to_owned(),
            session_id: "mine".to_owned(),
            max_suggestions: Some(3),
            ..Default::default()
        };
        let question = CompletionParams::validate(request).unwrap();
        let family = fim::family(["Qwen/Qwen2.5-Coder-7B"]);
        let prompt = fim::build_prompt(family, &question.prefix, &question.options);
        let body = question.body("m", &prompt, EngineScheduling::default()).unwrap();
        let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
        let fields: Vec<_> = body.as_object().unwrap().keys().collect();
        let allowed = [
            "logprobs",
            "max_tokens",
            "model",
            "n",
            "prompt",
            "stop",
            "stream",
            "stream_options",
            "temperature",
            "top_p",
        ];
        assert_eq!(fields, allowed);
        assert_eq!(body["n"], 3);
        assert_eq!(body["max_tokens"], 128);
        assert_eq!(body["stop"].as_array().unwrap().len(), 4);
        assert_eq!(body["stream_options"]["continuous_usage_stats"], true);
    }
}
