//! Tests the inference of tasks and the choice of models.

use proptest::prelude::*;

use super::*;
use crate::request::prompt::VOCABULARY;

const ALL_MODELS: &[&str] = &["base", "autocomplete", "prompt", "comment", "error-fix"];

fn owned(names: &[&str]) -> Vec<String> {
    names.iter().map(|&name| name.to_owned()).collect()
}

fn choose(
    setting: &str,
    task: &str,
    served: &[&str],
    allowed: &[&str],
) -> Result<ModelChoice, Error> {
    let specialists = Specialists::new(setting, None).unwrap();
    specialists.choose(task, served, "base", &owned(allowed))
}

fn model_and_warning(chosen: Result<ModelChoice, Error>) -> (String, Option<String>) {
    let ModelChoice { model, warning } = chosen.unwrap();
    (model, warning)
}

#[test]
fn every_task_has_one_specialist_and_a_prompt_and_every_rule_names_a_task() {
    let mut tasks: Vec<_> =
        TASKS.specialist.values().flat_map(|specialist| &specialist.tasks).collect();
    tasks.sort();
    assert!(tasks.iter().copied().eq(VOCABULARY.task.keys()), "{tasks:?}");
    assert!(TASKS.rule.iter().all(|rule| VOCABULARY.task.contains_key(&rule.task)));
}

#[test]
fn the_task_is_inferred_from_the_question() {
    let cases = [
        ("generate", "make a web server that answers hello"),
        ("generate", "리스트에서 중복 제거하는 함수 만들어줘"),
        ("generate", "Write a function that raises ValueError for negative numbers"),
        ("generate", "오류 처리를 추가한 파일 다운로드 함수를 작성해줘"),
        ("generate", "테스트용 더미 데이터를 만드는 함수를 구현해줘"),
        ("generate", "a class for reviews of a shop, with comments and ratings"),
        ("generate", "how do I read a file line by line?"),
        ("fix", "TypeError: unsupported operand type(s) for +: 'int' and 'str'"),
        ("fix", "I get this:\nTraceback (most recent call last):\n  File \"a.py\", line 1"),
        ("fix", "error[E0382]: borrow of moved value: `x`"),
        ("fix", "java.lang.NullPointerException: x is null\n\tat com.Foo.bar(Foo.java:3)"),
        ("fix", "thread 'main' panicked at src/main.rs:2:5"),
        ("fix", "fix this code"),
        ("fix", "Why does this function crash for empty lists?"),
        ("fix", "이 코드의 문제를 찾아서 수정해주세요"),
        ("fix", "에러가 나는데 고쳐줘"),
        ("fix", "왜 이 반복문이 안 돼?"),
        ("explain", "Explain this function"),
        ("explain", "what does this code do?"),
        ("explain", "이 코드를 설명해주세요"),
        ("explain", "다음 함수가 무엇을 하는지 알려줘"),
        ("comment", "add docstrings to this class"),
        ("comment", "함수마다 주석을 달아줘"),
        ("test", "Write unit tests for this parser"),
        ("test", "이 함수의 테스트 코드를 작성해줘"),
        ("optimize", "Optimise this query"),
        ("optimize", "이 반복문을 더 빠르게 만들어줘"),
        ("review", "Please review my pull request; it has a bug somewhere"),
        ("review", "코드 리뷰 부탁해"),
        ("complete", "def fibonacci(n):"),
        ("complete", "for item in items:"),
        ("complete", "result = sorted("),
        ("complete", "    print(\"hello"),
        ("complete", "이어서 코드를 작성해줘"),
    ];
    for (task, question) in cases {
        assert_eq!(infer(question, ""), task, "{question}");
    }
}

#[test]
fn a_traceback_in_the_context_infers_the_task_fix() {
    let context = "$ python a.py\nTraceback (most recent call last):\n  File \"a.py\"";
    assert_eq!(infer("what now?", context), "fix");
    assert_eq!(infer("what now?", "print(1)"), "generate");
    assert_eq!(infer("Add docstrings", "try:\n    f()\nexcept ValueError:\n    pass"), "comment");
}

#[test]
fn the_chosen_model_has_the_name_that_the_engine_serves() {
    assert_eq!(
        model_and_warning(choose("", "fix", ALL_MODELS, &[])),
        ("error-fix".to_owned(), None)
    );
    assert_eq!(model_and_warning(choose("", "test", ALL_MODELS, &[])), ("prompt".to_owned(), None));
    assert_eq!(
        model_and_warning(choose("test=base", "test", ALL_MODELS, &[])),
        ("base".to_owned(), None)
    );
}

#[test]
fn a_specialist_that_no_engine_serves_is_replaced_with_a_warning() {
    let two = &["base", "prompt"];
    let (model, warning) = model_and_warning(choose("", "fix", two, &[]));
    assert_eq!(model, "base");
    let expected = "no engine serves error_fix, the model for the task fix: base answered";
    assert_eq!(warning.as_deref(), Some(expected));
    let (_, warning) = model_and_warning(choose("fix=mine", "fix", &["base"], &[]));
    assert!(warning.is_some_and(|warning| warning.contains("no engine serves mine")));
    let specialists = Specialists::new("", Some("prompt")).unwrap();
    let chosen = specialists.choose("fix", two, "base", &[]).unwrap();
    assert_eq!(chosen.model, "prompt");
}

#[test]
fn engines_without_specialists_answer_without_a_warning() {
    assert_eq!(model_and_warning(choose("", "fix", &["base"], &[])), ("base".to_owned(), None));
}

#[test]
fn a_key_without_access_to_the_specialist_gets_the_fallback_or_an_error() {
    let (model, warning) = model_and_warning(choose("", "fix", ALL_MODELS, &["base"]));
    assert_eq!(model, "base");
    assert!(warning.is_some_and(|warning| warning.starts_with("this key may not use error_fix")));
    let refused = choose("", "fix", ALL_MODELS, &["prompt"]).unwrap_err();
    assert!(matches!(refused, Error::ModelNotAllowed));
    assert_eq!(model_and_warning(choose("", "fix", ALL_MODELS, &["error-fix"])).0, "error-fix");
}

#[test]
fn an_invalid_setting_gives_an_error_that_names_the_part() {
    assert!(Specialists::new("fix", None).unwrap_err().contains("not TASK=MODEL"));
    assert!(Specialists::new("dance=a", None).unwrap_err().contains("known are comment, complete"));
    assert!(Specialists::new(" fix = a , test=b,", None).is_ok());
}

#[test]
fn default_sampling_is_that_of_the_specialist() {
    let fix = Sampling { max_tokens: 1_024, temperature: 0.5, top_p: 0.9 };
    assert_eq!(sampling("fix"), fix);
    assert_eq!(sampling("no such task"), sampling("generate"));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn any_text_infers_a_known_task(question in "\\PC{0,200}", context in "\\PC{0,200}") {
        prop_assert!(VOCABULARY.task.contains_key(infer(&question, &context)));
    }
}
