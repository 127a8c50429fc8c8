//! A completion's request that has been checked, with its defaults filled in.

use hapa_core::violations::Violations;
use hapa_proto::codegen::v1::CompleteCodeRequest;

use crate::budget::Estimate;
use crate::completion::TASK;
use crate::completion::fim::Filled;
use crate::completion::trim::Kind;
use crate::engine::{CompletionRequest, Scheduling, StreamOptions};
use crate::question::{
    LONGEST_NAME, LONGEST_PATH, LONGEST_SESSION, check_id, check_lengths, check_place,
    check_sampling, or_default,
};
use crate::task::{self, Sampling};
use crate::unicode;

const LONGEST_PREFIX: usize = 8_000;
const LONGEST_SUFFIX: usize = 4_000;
const MOST_SUGGESTIONS: i32 = 20;
const DEFAULT_SUGGESTIONS: i32 = 5;

/// What is asked.
#[derive(Clone, Debug)]
pub(crate) struct Question {
    pub(crate) prefix: String,
    /// What must be equal for two requests to be answered alike, beside the prefix.
    pub(crate) terms: Terms,
    pub(crate) no_cache: bool,
    pub(crate) session_id: String,
    /// The model that was named, if one was.
    pub(crate) model: Option<String>,
    pub(crate) request_id: Option<String>,
}

/// See [`Question::terms`].
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Terms {
    pub(crate) suffix: String,
    pub(crate) language: String,
    pub(crate) file_path: String,
    pub(crate) kind: Kind,
    pub(crate) most: usize,
    temperature: f64,
    top_p: f64,
    max_tokens: i32,
}

impl Question {
    /// Checks every field, and names all that are wrong.
    pub(crate) fn check(mut request: CompleteCodeRequest) -> Result<Question, Violations> {
        let mut found = Violations::default();
        for text in [&mut request.prefix, &mut request.suffix] {
            unicode::strip_in(text);
        }
        check_texts(&request, &mut found);
        check_place(&request.language, &request.file_path, &mut found);
        check_id(&request.request_id, &mut found);
        check_sampling(request.temperature, request.top_p, request.max_tokens, &mut found);
        let most = request.max_suggestions.unwrap_or(DEFAULT_SUGGESTIONS);
        if !(1..=MOST_SUGGESTIONS).contains(&most) {
            found.wrong("max_suggestions", format!("must be from 1 to {MOST_SUGGESTIONS}"));
        }
        let kind = or_default(request.completion_type, Kind::Inline.word());
        found.check_word("completion_type", &kind, &Kind::ALL.map(Kind::word));
        found.check()?;
        let usual = task::sampling(TASK);
        let terms = Terms {
            suffix: request.suffix,
            language: or_default(request.language, "python"),
            file_path: request.file_path,
            kind: Kind::ALL.into_iter().find(|one| one.word() == kind).unwrap_or(Kind::Inline),
            most: usize::try_from(most).unwrap_or(1),
            temperature: request.temperature.unwrap_or(usual.temperature),
            top_p: request.top_p.unwrap_or(usual.top_p),
            max_tokens: request.max_tokens.unwrap_or(usual.max_tokens),
        };
        Ok(Question {
            prefix: request.prefix,
            terms,
            no_cache: request.no_cache,
            session_id: request.session_id,
            model: Some(request.model).filter(|model| !model.is_empty()),
            request_id: Some(request.request_id).filter(|id| !id.is_empty()),
        })
    }

    /// How the engine is to choose its tokens.
    pub(crate) fn sampling(&self) -> Sampling {
        let Terms { temperature, top_p, max_tokens, .. } = self.terms;
        Sampling { max_tokens, temperature, top_p }
    }

    /// The tokens that the prompt and all answers can be, for a budget.
    pub(crate) fn estimate(&self, body: &[u8]) -> Estimate {
        let answers = i64::try_from(self.terms.most).unwrap_or(i64::MAX);
        Estimate::of(body, answers.saturating_mul(self.terms.max_tokens.into()))
    }

    /// The body of the engine's request.
    pub(crate) fn body(
        &self,
        model: &str,
        filled: &Filled,
        scheduling: Scheduling,
    ) -> serde_json::Result<Vec<u8>> {
        let mut stop: Vec<&str> = filled.ends.iter().map(String::as_str).collect();
        if self.terms.kind == Kind::Inline {
            stop.push("\n");
        }
        serde_json::to_vec(&CompletionRequest {
            model,
            prompt: &filled.prompt,
            n: self.terms.most,
            temperature: self.terms.temperature,
            top_p: self.terms.top_p,
            max_tokens: self.terms.max_tokens,
            logprobs: 1,
            stop,
            stream: true,
            // On every chunk: the stream is left when there is enough, which is before the last one.
            stream_options: StreamOptions {
                include_usage: true,
                continuous_usage_stats: Some(true),
            },
            scheduling,
        })
    }
}

fn check_texts(request: &CompleteCodeRequest, found: &mut Violations) {
    if request.prefix.trim().is_empty() {
        found.missing("prefix");
    }
    let bounded = [
        ("prefix", &request.prefix, LONGEST_PREFIX),
        ("suffix", &request.suffix, LONGEST_SUFFIX),
        ("file_path", &request.file_path, LONGEST_PATH),
        ("model", &request.model, LONGEST_NAME),
        ("session_id", &request.session_id, LONGEST_SESSION),
    ];
    check_lengths(&bounded, found);
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use super::*;
    use crate::completion::fim;

    fn fields(change: impl FnOnce(&mut CompleteCodeRequest)) -> Vec<Cow<'static, str>> {
        let mut request = CompleteCodeRequest { prefix: "a".to_owned(), ..Default::default() };
        change(&mut request);
        Question::check(request).err().map(|found| found.fields()).unwrap_or_default()
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
            let found = fields(|request| request.max_suggestions = Some(most));
            assert_eq!(!found.is_empty(), wrong, "{most}");
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
    fn the_engine_is_told_what_is_on_the_list_and_nothing_else() {
        let request = CompleteCodeRequest {
            prefix: "def f(".to_owned(),
            suffix: "):\n".to_owned(),
            session_id: "mine".to_owned(),
            max_suggestions: Some(3),
            ..Default::default()
        };
        let question = Question::check(request).unwrap();
        let family = fim::family(["Qwen/Qwen2.5-Coder-7B"]);
        let filled = fim::fill(family, &question.prefix, &question.terms);
        let body = question.body("m", &filled, Scheduling::default()).unwrap();
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
