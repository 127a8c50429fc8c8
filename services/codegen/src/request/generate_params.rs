//! A validated generation request with its defaults, and the checks that completions share.

use hapa_core::call::is_request_id;
use hapa_core::violations::Violations;
use hapa_proto::codegen::v1::{GenerateCodeRequest, UserProfile};
use hapa_proto::user_profile;

use crate::request::prompt::{self, VOCABULARY};
use crate::request::task::{self, Sampling};
use crate::request::unicode;
use crate::schedule::budget::Estimate;
use crate::upstream::engine::{ChatMessage, ChatRequest, EngineScheduling, StreamOptions};

const MAX_QUESTION_LEN: usize = 10_000;
const MAX_CONTEXT_LEN: usize = 50_000;
pub(crate) const MAX_PATH_LEN: usize = 1_024;
pub(crate) const MAX_MODEL_NAME_LEN: usize = 200;
const MAX_LANGUAGE_LEN: usize = 40;
pub(crate) const MAX_SESSION_ID_LEN: usize = 128;
const MAX_TOKENS_LIMIT: i32 = 4_096;
const MAX_REASONING_TOKENS: i32 = 32_768;

/// The parameters of a generation.
#[derive(Clone, Debug)]
pub(crate) struct GenerateParams {
    pub(crate) text: String,
    pub(crate) context: String,
    pub(crate) language: String,
    pub(crate) file_path: String,
    pub(crate) profile: UserProfile,
    pub(crate) task: String,
    /// The requested model, if any.
    pub(crate) model: Option<String>,
    pub(crate) request_id: Option<String>,
    /// Groups related requests of the caller; may be empty.
    pub(crate) session_id: String,
    pub(crate) max_reasoning_tokens: Option<u32>,
    /// The sampling parameters that the caller has set.
    pub(crate) caller_fields: Vec<&'static str>,
    temperature: f64,
    top_p: f64,
    max_tokens: i32,
}

impl GenerateParams {
    /// Validates every field and reports all violations. Without a profile in the request, the user's
    /// stored profile applies.
    pub(crate) fn validate(
        mut request: GenerateCodeRequest,
        stored: Option<&UserProfile>,
    ) -> Result<GenerateParams, Violations> {
        let mut violations = Violations::default();
        for text in [&mut request.user_question, &mut request.code_context] {
            unicode::strip_in_place(text);
        }
        check_texts(&request, &mut violations);
        check_location(&request.language, &request.file_path, &mut violations);
        check_request_id(&request.request_id, &mut violations);
        check_sampling(request.temperature, request.top_p, request.max_tokens, &mut violations);
        if let Some(max) = request.max_reasoning_tokens
            && !(1..=MAX_REASONING_TOKENS).contains(&max)
        {
            let problem = format!("must be from 1 to {MAX_REASONING_TOKENS}");
            violations.add_invalid("max_reasoning_tokens", problem);
        }
        let profile =
            with_defaults(request.user_profile.or_else(|| stored.cloned()).unwrap_or_default());
        violations.extend(user_profile::violations(&profile));
        let tasks: Vec<_> = VOCABULARY.task.keys().map(String::as_str).collect();
        if !request.task.is_empty() {
            violations.check_one_of("task", &request.task, &tasks);
        }
        violations.check()?;
        let inferred = || task::infer(&request.user_question, &request.code_context).to_owned();
        let task = if request.task.is_empty() { inferred() } else { request.task };
        let defaults = task::sampling(&task);
        // After the check, which rejects control characters in a path.
        unicode::strip_in_place(&mut request.file_path);
        Ok(GenerateParams {
            text: request.user_question,
            context: request.code_context,
            language: or_default(request.language, "python"),
            file_path: request.file_path,
            profile,
            task,
            model: Some(request.model).filter(|model| !model.is_empty()),
            request_id: Some(request.request_id).filter(|id| !id.is_empty()),
            session_id: request.session_id,
            caller_fields: caller_fields(request.temperature, request.top_p),
            max_reasoning_tokens: request
                .max_reasoning_tokens
                .and_then(|max| u32::try_from(max).ok()),
            temperature: request.temperature.unwrap_or(defaults.temperature),
            top_p: request.top_p.unwrap_or(defaults.top_p),
            max_tokens: request.max_tokens.unwrap_or(defaults.max_tokens),
        })
    }

    /// The sampling parameters.
    pub(crate) fn sampling(&self) -> Sampling {
        let GenerateParams { temperature, top_p, max_tokens, .. } = *self;
        Sampling { max_tokens, temperature, top_p }
    }

    /// The number of tokens to reserve from the token budget.
    pub(crate) fn estimate(&self, body: &[u8]) -> Estimate {
        Estimate::for_body(body, self.max_tokens.into())
    }

    /// The body of the request to the engine.
    pub(crate) fn body(
        &self,
        model: &str,
        scheduling: EngineScheduling,
    ) -> serde_json::Result<Vec<u8>> {
        serde_json::to_vec(&ChatRequest {
            model,
            messages: [
                ChatMessage { role: "system", content: &prompt::system(self) },
                ChatMessage { role: "user", content: &prompt::user(self) },
            ],
            temperature: self.temperature,
            top_p: self.top_p,
            max_tokens: self.max_tokens,
            stream: true,
            stream_options: StreamOptions { include_usage: true, continuous_usage_stats: None },
            scheduling,
        })
    }
}

/// The names of the sampling parameters that are set.
pub(crate) fn caller_fields(temperature: Option<f64>, top_p: Option<f64>) -> Vec<&'static str> {
    let fields = [("temperature", temperature.is_some()), ("top_p", top_p.is_some())];
    fields.into_iter().filter_map(|(name, is_set)| is_set.then_some(name)).collect()
}

pub(crate) fn or_default(text: String, default: &str) -> String {
    if text.is_empty() { default.to_owned() } else { text }
}

fn with_defaults(profile: UserProfile) -> UserProfile {
    UserProfile {
        python_skill_level: or_default(profile.python_skill_level, "intermediate"),
        code_output_structure: or_default(profile.code_output_structure, "standard"),
        explanation_style: or_default(profile.explanation_style, "standard"),
        project_context: or_default(profile.project_context, "general_purpose"),
        error_handling_preference: or_default(profile.error_handling_preference, "basic"),
        preferred_language_features: profile.preferred_language_features,
    }
}

fn check_texts(request: &GenerateCodeRequest, violations: &mut Violations) {
    if request.user_question.trim().is_empty() {
        violations.add_missing("user_question");
    }
    let limits = [
        ("user_question", &request.user_question, MAX_QUESTION_LEN),
        ("code_context", &request.code_context, MAX_CONTEXT_LEN),
        ("file_path", &request.file_path, MAX_PATH_LEN),
        ("model", &request.model, MAX_MODEL_NAME_LEN),
        ("session_id", &request.session_id, MAX_SESSION_ID_LEN),
    ];
    check_lengths(&limits, violations);
}

/// Checks the maximum length of each field, in characters.
pub(crate) fn check_lengths(
    limits: &[(&'static str, &String, usize)],
    violations: &mut Violations,
) {
    for (field, text, limit) in limits {
        let length = text.chars().count();
        if length > *limit {
            violations.add_invalid(
                *field,
                format!("must have at most {limit} characters; it has {length}"),
            );
        }
    }
}

/// Checks the language and the file path.
pub(crate) fn check_location(language: &str, file_path: &str, violations: &mut Violations) {
    if file_path.contains(char::is_control) {
        violations.add_invalid("file_path", "must not contain control characters");
    }
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"+#.-_".contains(&byte);
    if language.len() > MAX_LANGUAGE_LEN || !language.bytes().all(is_allowed) {
        violations.add_invalid("language", "must be 1 to 40 letters, digits and + # . - _");
    }
}

pub(crate) fn check_request_id(request_id: &str, violations: &mut Violations) {
    if !request_id.is_empty() && !is_request_id(request_id) {
        violations.add_invalid("request_id", "must be 1 to 128 letters, digits and - _ .");
    }
}

pub(crate) fn check_sampling(
    temperature: Option<f64>,
    top_p: Option<f64>,
    max_tokens: Option<i32>,
    violations: &mut Violations,
) {
    if temperature.is_some_and(|number| !(0.0..=2.0).contains(&number)) {
        violations.add_invalid("temperature", "must be from 0 to 2");
    }
    if top_p.is_some_and(|number| !(number > 0.0 && number <= 1.0)) {
        violations.add_invalid("top_p", "must be above 0 and at most 1");
    }
    if max_tokens.is_some_and(|number| !(1..=MAX_TOKENS_LIMIT).contains(&number)) {
        violations.add_invalid("max_tokens", format!("must be from 1 to {MAX_TOKENS_LIMIT}"));
    }
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use super::*;

    fn fields(change: impl FnOnce(&mut GenerateCodeRequest)) -> Vec<Cow<'static, str>> {
        let mut request =
            GenerateCodeRequest { user_question: "q".to_owned(), ..Default::default() };
        change(&mut request);
        GenerateParams::validate(request, None)
            .err()
            .map(|violations| violations.fields())
            .unwrap_or_default()
    }

    #[test]
    fn limits_count_characters_and_both_ends_are_allowed() {
        assert_eq!(
            fields(|request| request.user_question = "한".repeat(10_000)),
            Vec::<&str>::new()
        );
        assert_eq!(
            fields(|request| request.user_question = "한".repeat(10_001)),
            ["user_question"]
        );
        assert_eq!(fields(|request| request.user_question = " \n".to_owned()), ["user_question"]);
        assert_eq!(fields(|request| request.code_context = "x".repeat(50_001)), ["code_context"]);
        assert_eq!(fields(|request| request.temperature = Some(2.0)), Vec::<&str>::new());
        assert_eq!(fields(|request| request.temperature = Some(f64::NAN)), ["temperature"]);
        assert_eq!(fields(|request| request.top_p = Some(0.0)), ["top_p"]);
        assert_eq!(fields(|request| request.max_tokens = Some(4_097)), ["max_tokens"]);
        assert_eq!(fields(|request| request.max_tokens = Some(0)), ["max_tokens"]);
        assert_eq!(fields(|request| request.language = "c++".to_owned()), Vec::<&str>::new());
        assert_eq!(fields(|request| request.language = "py\nthon".to_owned()), ["language"]);
    }

    #[test]
    fn invisible_characters_never_reach_the_model() {
        let request = GenerateCodeRequest {
            user_question: "q\u{e0041}\u{202e} 👩\u{200d}💻".to_owned(),
            code_context: "\u{feff}a\u{200b}".to_owned(),
            file_path: "a\u{2066}.py".to_owned(),
            ..Default::default()
        };
        let params = GenerateParams::validate(request, None).unwrap();
        let texts = [&params.text, &params.context, &params.file_path].map(String::as_str);
        assert_eq!(texts, ["q 👩\u{200d}💻", "a", "a.py"]);
        let invisible = "\u{200b}\u{202e}";
        assert_eq!(
            fields(|request| request.user_question = invisible.to_owned()),
            ["user_question"]
        );
    }

    #[test]
    fn unknown_words_are_rejected_with_a_list_of_the_known_ones() {
        let profile = UserProfile {
            python_skill_level: "guru".to_owned(),
            preferred_language_features: vec!["goto".to_owned()],
            ..UserProfile::default()
        };
        let request = GenerateCodeRequest {
            user_question: "q".to_owned(),
            user_profile: Some(profile),
            task: "dance".to_owned(),
            ..Default::default()
        };
        let violations = GenerateParams::validate(request, None).unwrap_err();
        let message = violations.to_string();
        assert_eq!(violations.fields().len(), 3, "{message}");
        assert!(
            message.contains("is unknown; known are advanced, beginner, expert, intermediate"),
            "{message}"
        );
    }

    #[test]
    fn the_stored_profile_applies_to_a_request_without_one() {
        let level = |level: &str| UserProfile {
            python_skill_level: level.to_owned(),
            ..UserProfile::default()
        };
        let profile_for = |own: Option<UserProfile>| {
            let user_question = "q".to_owned();
            let request =
                GenerateCodeRequest { user_question, user_profile: own, ..Default::default() };
            GenerateParams::validate(request, Some(&level("expert"))).unwrap().profile
        };
        assert_eq!(profile_for(None).python_skill_level, "expert");
        assert_eq!(profile_for(Some(level("beginner"))).python_skill_level, "beginner");
        assert_eq!(profile_for(Some(UserProfile::default())).python_skill_level, "intermediate");
    }

    #[test]
    fn the_body_contains_the_listed_fields_and_no_others() {
        let request = GenerateCodeRequest {
            user_question: "q".to_owned(),
            session_id: "mine".to_owned(),
            max_tokens: Some(7),
            ..Default::default()
        };
        let params = GenerateParams::validate(request, None);
        let scheduling = EngineScheduling { cache_salt: Some("s".to_owned()), priority: None };
        let body = params.unwrap().body("m", scheduling).unwrap();
        let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
        let fields: Vec<_> = body.as_object().unwrap().keys().collect();
        let allowed = [
            "cache_salt",
            "max_tokens",
            "messages",
            "model",
            "stream",
            "stream_options",
            "temperature",
            "top_p",
        ];
        assert_eq!(fields, allowed);
        assert_eq!(body["stream_options"]["include_usage"], true);
        assert_eq!(body["max_tokens"], 7);
    }
}
