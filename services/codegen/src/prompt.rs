//! The prompt: what the model is told about the task, the colleague and the form of the answer, and
//! then the question. Its words live in `prompts/words.toml`, which also says which words exist.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use hapa_proto::codegen::v1::UserProfile;
use serde::Deserialize;

use crate::question::Question;

/// Words of one field, and what each does.
pub(crate) type Words = BTreeMap<String, String>;

/// `prompts/words.toml`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Vocabulary {
    role: String,
    format: String,
    answer_in: AnswerIn,
    pub(crate) task: Words,
    pub(crate) python_skill_level: Words,
    pub(crate) code_output_structure: Words,
    pub(crate) explanation_style: Words,
    pub(crate) project_context: Words,
    pub(crate) error_handling_preference: Words,
    pub(crate) preferred_language_features: Words,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct AnswerIn {
    korean: String,
    japanese: String,
    chinese: String,
    other: String,
}

#[expect(clippy::expect_used, reason = "the file is part of the binary and a test reads it")]
pub(crate) static VOCABULARY: LazyLock<Vocabulary> =
    LazyLock::new(|| toml::from_str(include_str!("../prompts/words.toml")).expect("words.toml"));

/// The instructions for one question.
pub(crate) fn system(question: &Question) -> String {
    let words = &*VOCABULARY;
    let UserProfile {
        python_skill_level,
        code_output_structure,
        explanation_style,
        project_context,
        error_handling_preference,
        preferred_language_features,
    } = &question.profile;
    let features: Vec<_> = preferred_language_features
        .iter()
        .filter_map(|word| words.preferred_language_features.get(word))
        .map(String::as_str)
        .collect();
    let features = match features.as_slice() {
        [] => String::new(),
        features => format!("Where they fit, use {}.", features.join(", ")),
    };
    let say = |words: &'static Words, word: &str| words.get(word).map_or("", String::as_str);
    let parts = [
        words.role.as_str(),
        say(&words.task, &question.task),
        say(&words.python_skill_level, python_skill_level),
        say(&words.code_output_structure, code_output_structure),
        say(&words.explanation_style, explanation_style),
        say(&words.project_context, project_context),
        say(&words.error_handling_preference, error_handling_preference),
        &features,
        words.format.trim_start(),
        answer_in(&question.text, &words.answer_in),
    ];
    let parts: Vec<_> = parts.into_iter().filter(|part| !part.is_empty()).collect();
    parts.join("\n").replace("{language}", &question.language)
}

/// The question and the code around it.
pub(crate) fn user(question: &Question) -> String {
    if question.context.is_empty() {
        return question.text.clone();
    }
    let fence = fence_around(&question.context);
    let place = match question.file_path.as_str() {
        "" => String::new(),
        path => format!(" of {path}"),
    };
    let Question { text, context, language, .. } = question;
    format!("{text}\n\nThe code{place}:\n{fence}{language}\n{context}\n{fence}")
}

/// A fence that nothing in the code closes.
fn fence_around(code: &str) -> String {
    let longest = code.split(|letter| letter != '`').map(str::len).max().unwrap_or(0);
    "`".repeat(longest.max(2) + 1)
}

/// By the script that most letters stand in: enough to tell these apart, also in few words.
fn answer_in<'a>(question: &str, sentences: &'a AnswerIn) -> &'a str {
    let count = |is: fn(char) -> bool| question.chars().filter(|letter| is(*letter)).count();
    let hangul = count(
        |c| matches!(c, '\u{1100}'..='\u{11ff}' | '\u{3130}'..='\u{318f}' | '\u{ac00}'..='\u{d7a3}'),
    );
    let kana = count(|c| matches!(c, '\u{3040}'..='\u{30ff}'));
    let han = count(|c| matches!(c, '\u{3400}'..='\u{9fff}'));
    // One such letter stands for two or three Latin ones, and names in code are Latin.
    let latin = count(|c| c.is_ascii_alphabetic()) / 4;
    if hangul > kana + han && hangul > latin {
        &sentences.korean
    } else if kana > 0 && kana + han > latin {
        &sentences.japanese
    } else if han > latin {
        &sentences.chinese
    } else {
        &sentences.other
    }
}

#[cfg(test)]
mod tests {
    use hapa_proto::codegen::v1::GenerateCodeRequest;
    use hapa_proto::user_profile::FEATURES;
    use hapa_proto::user_profile::FIELDS;
    use proptest::prelude::*;

    use super::*;

    fn question(text: &str, change: impl FnOnce(&mut GenerateCodeRequest)) -> Question {
        let mut request = GenerateCodeRequest {
            user_question: text.to_owned(),
            ..GenerateCodeRequest::default()
        };
        change(&mut request);
        Question::check(request, None).unwrap()
    }

    #[test]
    fn a_korean_question_gets_a_korean_explanation() {
        for korean in
            ["리스트에서 중복 제거하는 함수 만들어줘", "pandas DataFrame에서 merge 오류를 고쳐줘"]
        {
            assert!(system(&question(korean, |_| ())).contains("Explain in Korean"), "{korean}");
        }
        assert!(system(&question("リストの重複を削除する関数", |_| ())).contains("Japanese"));
        assert!(system(&question("写一个去重的函数", |_| ())).contains("Chinese"));
        assert!(
            system(&question("Was heißt 함수 in Python?", |_| ()))
                .contains("the language that the question")
        );
    }

    #[test]
    fn every_word_of_the_profile_changes_the_prompt() {
        let plain = system(&question("q", |_| ()));
        let words = &*VOCABULARY;
        let with = |field: fn(&mut UserProfile) -> &mut String, word: &str| {
            system(&question("q", |request| {
                let mut profile = UserProfile::default();
                word.clone_into(field(&mut profile));
                request.user_profile = Some(profile);
            }))
        };
        let prompts: Vec<_> = words
            .python_skill_level
            .keys()
            .map(|word| with(|p| &mut p.python_skill_level, word))
            .chain(
                words
                    .code_output_structure
                    .keys()
                    .map(|word| with(|p| &mut p.code_output_structure, word)),
            )
            .chain(
                words.explanation_style.keys().map(|word| with(|p| &mut p.explanation_style, word)),
            )
            .chain(words.project_context.keys().map(|word| with(|p| &mut p.project_context, word)))
            .chain(
                words
                    .error_handling_preference
                    .keys()
                    .map(|word| with(|p| &mut p.error_handling_preference, word)),
            )
            .filter(|prompt| *prompt != plain)
            .collect();
        let distinct: std::collections::BTreeSet<_> = prompts.iter().collect();
        // Every word but the five defaults says something of its own.
        assert_eq!((prompts.len(), distinct.len()), (4 + 4 + 4 + 6 + 6 - 5, 4 + 4 + 4 + 6 + 6 - 5));
        assert!(plain.contains("```python"));
    }

    #[test]
    fn a_word_that_is_accepted_has_words_here() {
        let ours = &*VOCABULARY;
        let ours = [
            &ours.python_skill_level,
            &ours.code_output_structure,
            &ours.explanation_style,
            &ours.project_context,
            &ours.error_handling_preference,
            &ours.preferred_language_features,
        ];
        for ((field, known), words) in FIELDS.iter().chain([&FEATURES]).zip(ours) {
            assert!(known.iter().eq(words.keys()), "{field}: {known:?}, {words:?}");
        }
    }

    #[test]
    fn code_with_fences_of_its_own_stays_inside() {
        let prompt = user(&question("why?", |request| {
            request.code_context = "a = '''\n```\n'''".to_owned();
            request.file_path = "a.py".to_owned();
        }));
        assert_eq!(prompt, "why?\n\nThe code of a.py:\n````python\na = '''\n```\n'''\n````");
    }

    proptest! {
        #[test]
        fn the_question_and_its_context_always_reach_the_model_whole(text in "\\PC{1,60}", context in "[a-z`\n]{0,60}") {
            let text = crate::unicode::strip(&text);
            prop_assume!(!text.trim().is_empty());
            let prompt = user(&question(&text, |request| request.code_context.clone_from(&context)));
            prop_assert!(prompt.starts_with(&*text) && prompt.contains(&context));
        }
    }
}
