//! Tests of what is learned from refusals.

use reqwest::StatusCode;
use serde_json::json;

use super::*;

fn body() -> Bytes {
    let body = json!({
        "model": "m", "messages": [], "temperature": 0.3, "top_p": 0.9, "max_tokens": 7, "n": 2,
        "stop": ["x"], "logprobs": 1, "stream": true, "cache_salt": "s", "priority": 1,
        "stream_options": {"include_usage": true, "continuous_usage_stats": true},
    });
    body.to_string().into()
}

fn refused(status: u16, error: &Value) -> EngineError {
    let body = json!({ "error": error }).to_string();
    EngineError::refused(StatusCode::from_u16(status).unwrap(), None, body.as_bytes())
}

fn applied(adaptation: &Adaptation<'_>) -> Value {
    serde_json::from_slice(&adaptation.apply(&body())).unwrap()
}

#[test]
fn a_refused_extra_is_left_out_once_the_engine_accepts_the_rest() {
    let limits = LearnedLimits::default();
    let mut adaptation = limits.adaptation(Operation::Chat, "m");
    assert_eq!(adaptation.apply(&body()), body());
    let error = refused(400, &json!("Unrecognized request argument supplied: cache_salt"));
    assert!(adaptation.learn_from(&error, &body()));
    assert!(applied(&adaptation).get("cache_salt").is_none());
    assert!(!adaptation.learn_from(&error, &body()), "the same refusal again");
    assert!(limits.names().is_empty(), "the engine has not accepted it yet");
    assert_eq!(adaptation.keep(), ["cache_salt"]);
    assert_eq!(limits.names(), ["cache_salt"]);
    let later = limits.adaptation(Operation::Chat, "m");
    assert!(applied(&later).get("cache_salt").is_none());
    assert!(later.keep().is_empty());
    assert_eq!(limits.adaptation(Operation::Completion, "m").apply(&body()), body());
}

#[test]
fn each_field_is_left_out_or_renamed() {
    let without = |name: &str| {
        let mut expected: Value = serde_json::from_slice(&body()).unwrap();
        expected.as_object_mut().unwrap().remove(name);
        expected
    };
    for name in [
        "cache_salt",
        "priority",
        "stream_options",
        "logprobs",
        "n",
        "stop",
        "temperature",
        "top_p",
    ] {
        let limits = LearnedLimits::default();
        let mut adaptation = limits.adaptation(Operation::Completion, "m");
        let error = refused(400, &json!({"param": name, "code": "unsupported_parameter"}));
        assert!(adaptation.learn_from(&error, &body()), "{name}");
        assert_eq!(applied(&adaptation), without(name));
    }
    let limits = LearnedLimits::default();
    let mut adaptation = limits.adaptation(Operation::Chat, "m");
    let words = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.";
    assert!(adaptation.learn_from(&refused(400, &json!(words)), &body()));
    let mut expected = without("max_tokens");
    expected["max_completion_tokens"] = json!(7);
    assert_eq!(applied(&adaptation), expected);
    let nested = json!({"param": "stream_options.continuous_usage_stats"});
    assert!(adaptation.learn_from(&refused(400, &nested), &body()));
    assert_eq!(applied(&adaptation)["stream_options"], json!({"include_usage": true}));
}

#[test]
fn what_the_caller_must_correct_is_not_learned() {
    for (status, operation, error) in [
        (400, Operation::Chat, json!({"message": "must be at most 2", "param": "temperature"})),
        (
            400,
            Operation::Chat,
            json!({"message": "max_tokens is too large", "param": "max_tokens"}),
        ),
        (400, Operation::Completion, json!("Unsupported parameter: 'max_tokens'")),
        (400, Operation::Chat, json!({"message": "is not supported", "param": "messages"})),
        (400, Operation::Chat, json!("unknown field context")),
        (500, Operation::Chat, json!("Unrecognized request argument supplied: cache_salt")),
    ] {
        let limits = LearnedLimits::default();
        let mut adaptation = limits.adaptation(operation, "m");
        assert!(!adaptation.learn_from(&refused(status, &error), &body()), "{error}");
    }
}

#[test]
fn an_attempt_leaves_out_four_new_fields_at_most_and_none_that_it_did_not_send() {
    let limits = LearnedLimits::default();
    let mut adaptation = limits.adaptation(Operation::Chat, "m");
    let mut learn = |name: &str, body: &Bytes| {
        adaptation.learn_from(&refused(422, &json!({ "param": name })), body)
    };
    assert!(!learn("cache_salt", &Bytes::from_static(b"{\"model\":\"m\"}")));
    assert!(!learn("cache_salt", &Bytes::from_static(b"no JSON")));
    for name in ["cache_salt", "priority", "logprobs", "stream_options.continuous_usage_stats"] {
        assert!(learn(name, &body()), "{name}");
    }
    assert!(!learn("stream_options", &body()));
}

#[test]
fn limits_are_learned_for_one_model_and_for_a_bounded_number_of_them() {
    let limits = LearnedLimits::default();
    let learn = |model: &str| {
        let mut adaptation = limits.adaptation(Operation::Chat, model);
        let error = json!({"param": "temperature", "code": "unsupported_value"});
        assert!(adaptation.learn_from(&refused(400, &error), &body()));
        assert_eq!(adaptation.left_out_of_caller(&body()), ["temperature"]);
        assert_eq!(adaptation.keep(), ["temperature"]);
    };
    learn("a");
    assert!(applied(&limits.adaptation(Operation::Chat, "a")).get("temperature").is_none());
    let other = limits.adaptation(Operation::Chat, "b");
    assert_eq!(other.apply(&body()), body());
    assert!(other.left_out_of_caller(&body()).is_empty());
    (0..MAX_MODELS).for_each(|number| learn(&number.to_string()));
    assert_eq!(limits.0.read().unwrap().len(), MAX_MODELS);
}

#[test]
fn only_fields_that_callers_set_and_that_are_not_renamed_are_reported_to_them() {
    let limits = LearnedLimits::default();
    let mut adaptation = limits.adaptation(Operation::Chat, "m");
    for name in ["max_tokens", "cache_salt", "top_p"] {
        let error = json!({"param": name, "code": "unsupported_parameter"});
        assert!(adaptation.learn_from(&refused(400, &error), &body()), "{name}");
    }
    assert_eq!(adaptation.left_out_of_caller(&body()), ["top_p"]);
    assert!(adaptation.left_out_of_caller(&Bytes::from_static(b"{}")).is_empty());
}

#[test]
fn a_refused_system_message_is_merged_into_the_message_of_the_user() {
    let limits = LearnedLimits::default();
    let mut adaptation = limits.adaptation(Operation::Chat, "m");
    let error = json!({"message": "System role not supported None", "code": 400});
    assert!(!adaptation.learn_from(&refused(400, &error), &body()), "there is no such message");
    let mut adaptation = limits.adaptation(Operation::Chat, "m");
    let messages = json!([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]);
    let body = Bytes::from(json!({ "model": "m", "messages": messages }).to_string());
    assert!(adaptation.learn_from(&refused(400, &error), &body));
    let sent: Value = serde_json::from_slice(&adaptation.apply(&body)).unwrap();
    let merged = json!([{"role": "user", "content": "s\n\nu"}]);
    assert_eq!(sent, json!({ "model": "m", "messages": merged }));
    assert!(!adaptation.learn_from(&refused(400, &error), &body), "the same refusal again");
    assert_eq!(adaptation.keep(), [SYSTEM_MESSAGE]);
    assert_eq!(limits.adaptation(Operation::Chat, "m").left_out.names().count(), 1);
}
