//! A request that has been checked, with its defaults filled in.

use hapa_core::call::is_request_id;
use hapa_core::violations::Violations;
use hapa_proto::codegen::v1::{GenerateCodeRequest, UserProfile};
use hapa_proto::user_profile;

use crate::budget::Estimate;
use crate::engine::{ChatRequest, Message, Scheduling, StreamOptions};
use crate::prompt::{self, VOCABULARY};
use crate::task::{self, Sampling};
use crate::unicode;

const LONGEST_QUESTION: usize = 10_000;
const LONGEST_CONTEXT: usize = 50_000;
pub(crate) const LONGEST_PATH: usize = 1_024;
pub(crate) const LONGEST_NAME: usize = 200;
const LONGEST_LANGUAGE: usize = 40;
pub(crate) const LONGEST_SESSION: usize = 128;
const MOST_TOKENS: i32 = 4_096;

/// What is asked.
#[derive(Clone, Debug)]
pub(crate) struct Question {
    pub(crate) text: String,
    pub(crate) context: String,
    pub(crate) language: String,
    pub(crate) file_path: String,
    pub(crate) profile: UserProfile,
    pub(crate) task: String,
    /// The model that was named, if one was.
    pub(crate) model: Option<String>,
    pub(crate) request_id: Option<String>,
    /// What the caller groups requests by, "" where it does not.
    pub(crate) session_id: String,
    temperature: f64,
    top_p: f64,
    max_tokens: i32,
}

impl Question {
    /// Checks every field, and names all that are wrong. A request without a profile is answered as
    /// the user's stored one says.
    pub(crate) fn check(
        mut request: GenerateCodeRequest,
        stored: Option<&UserProfile>,
    ) -> Result<Question, Violations> {
        let mut found = Violations::default();
        for text in [&mut request.user_question, &mut request.code_context] {
            unicode::strip_in(text);
        }
        check_texts(&request, &mut found);
        check_place(&request.language, &request.file_path, &mut found);
        check_id(&request.request_id, &mut found);
        check_sampling(request.temperature, request.top_p, request.max_tokens, &mut found);
        let profile =
            with_defaults(request.user_profile.or_else(|| stored.cloned()).unwrap_or_default());
        found.extend(user_profile::violations(&profile));
        let tasks: Vec<_> = VOCABULARY.task.keys().map(String::as_str).collect();
        if !request.task.is_empty() {
            found.check_word("task", &request.task, &tasks);
        }
        found.check()?;
        let inferred = || task::infer(&request.user_question, &request.code_context).to_owned();
        let task = if request.task.is_empty() { inferred() } else { request.task };
        let usual = task::sampling(&task);
        // After the check: a control character in a path is refused.
        unicode::strip_in(&mut request.file_path);
        Ok(Question {
            text: request.user_question,
            context: request.code_context,
            language: or_default(request.language, "python"),
            file_path: request.file_path,
            profile,
            task,
            model: Some(request.model).filter(|model| !model.is_empty()),
            request_id: Some(request.request_id).filter(|id| !id.is_empty()),
            session_id: request.session_id,
            temperature: request.temperature.unwrap_or(usual.temperature),
            top_p: request.top_p.unwrap_or(usual.top_p),
            max_tokens: request.max_tokens.unwrap_or(usual.max_tokens),
        })
    }

    /// How the engine is to choose its tokens.
    pub(crate) fn sampling(&self) -> Sampling {
        let Question { temperature, top_p, max_tokens, .. } = *self;
        Sampling { max_tokens, temperature, top_p }
    }

    /// The tokens that prompt and answer can be, for a budget.
    pub(crate) fn estimate(&self, body: &[u8]) -> Estimate {
        Estimate::of(body, self.max_tokens.into())
    }

    /// The body of the engine's request.
    pub(crate) fn body(&self, model: &str, scheduling: Scheduling) -> serde_json::Result<Vec<u8>> {
        serde_json::to_vec(&ChatRequest {
            model,
            messages: [
                Message { role: "system", content: &prompt::system(self) },
                Message { role: "user", content: &prompt::user(self) },
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

fn check_texts(request: &GenerateCodeRequest, found: &mut Violations) {
    if request.user_question.trim().is_empty() {
        found.missing("user_question");
    }
    let bounded = [
        ("user_question", &request.user_question, LONGEST_QUESTION),
        ("code_context", &request.code_context, LONGEST_CONTEXT),
        ("file_path", &request.file_path, LONGEST_PATH),
        ("model", &request.model, LONGEST_NAME),
        ("session_id", &request.session_id, LONGEST_SESSION),
    ];
    check_lengths(&bounded, found);
}

/// Fields with texts, and the most characters of each.
pub(crate) fn check_lengths(bounded: &[(&'static str, &String, usize)], found: &mut Violations) {
    for (field, text, most) in bounded {
        let length = text.chars().count();
        if length > *most {
            found.wrong(*field, format!("may have {most} characters and has {length}"));
        }
    }
}

/// Where the code stands.
pub(crate) fn check_place(language: &str, file_path: &str, found: &mut Violations) {
    if file_path.contains(char::is_control) {
        found.wrong("file_path", "must not hold control characters");
    }
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"+#.-_".contains(&byte);
    if language.len() > LONGEST_LANGUAGE || !language.bytes().all(fits) {
        found.wrong("language", "must be 1 to 40 letters, digits and + # . - _");
    }
}

pub(crate) fn check_id(request_id: &str, found: &mut Violations) {
    if !request_id.is_empty() && !is_request_id(request_id) {
        found.wrong("request_id", "must be 1 to 128 letters, digits and - _ .");
    }
}

pub(crate) fn check_sampling(
    temperature: Option<f64>,
    top_p: Option<f64>,
    max_tokens: Option<i32>,
    found: &mut Violations,
) {
    if temperature.is_some_and(|number| !(0.0..=2.0).contains(&number)) {
        found.wrong("temperature", "must be from 0 to 2");
    }
    if top_p.is_some_and(|number| !(number > 0.0 && number <= 1.0)) {
        found.wrong("top_p", "must be above 0 and at most 1");
    }
    if max_tokens.is_some_and(|number| !(1..=MOST_TOKENS).contains(&number)) {
        found.wrong("max_tokens", format!("must be from 1 to {MOST_TOKENS}"));
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
        Question::check(request, None).err().map(|found| found.fields()).unwrap_or_default()
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
    fn what_can_not_be_seen_never_reaches_the_model() {
        let request = GenerateCodeRequest {
            user_question: "q\u{e0041}\u{202e} 👩\u{200d}💻".to_owned(),
            code_context: "\u{feff}a\u{200b}".to_owned(),
            file_path: "a\u{2066}.py".to_owned(),
            ..Default::default()
        };
        let question = Question::check(request, None).unwrap();
        let texts = [&question.text, &question.context, &question.file_path].map(String::as_str);
        assert_eq!(texts, ["q 👩\u{200d}💻", "a", "a.py"]);
        let unseen = "\u{200b}\u{202e}";
        assert_eq!(fields(|request| request.user_question = unseen.to_owned()), ["user_question"]);
    }

    #[test]
    fn unknown_words_are_refused_with_the_known_ones() {
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
        let found = Question::check(request, None).unwrap_err();
        let words = found.to_string();
        assert_eq!(found.fields().len(), 3, "{words}");
        assert!(
            words.contains("is unknown; known are advanced, beginner, expert, intermediate"),
            "{words}"
        );
    }

    #[test]
    fn the_stored_profile_answers_where_a_request_carries_none() {
        let level = |level: &str| UserProfile {
            python_skill_level: level.to_owned(),
            ..UserProfile::default()
        };
        let ask = |own: Option<UserProfile>| {
            let user_question = "q".to_owned();
            let request =
                GenerateCodeRequest { user_question, user_profile: own, ..Default::default() };
            Question::check(request, Some(&level("expert"))).unwrap().profile
        };
        assert_eq!(ask(None).python_skill_level, "expert");
        assert_eq!(ask(Some(level("beginner"))).python_skill_level, "beginner");
        assert_eq!(ask(Some(UserProfile::default())).python_skill_level, "intermediate");
    }

    #[test]
    fn the_engine_is_told_what_is_on_the_list_and_nothing_else() {
        let request = GenerateCodeRequest {
            user_question: "q".to_owned(),
            session_id: "mine".to_owned(),
            max_tokens: Some(7),
            ..Default::default()
        };
        let question = Question::check(request, None);
        let scheduling = Scheduling { cache_salt: Some("s".to_owned()), priority: None };
        let body = question.unwrap().body("m", scheduling).unwrap();
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
