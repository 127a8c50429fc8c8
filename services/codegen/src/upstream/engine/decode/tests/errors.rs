//! Errors inside a stream.

use serde_json::{Value, json};

use super::*;
use crate::upstream::engine::{RefusalReason, stream_error};

/// The error that an event reports, which also fails the stream.
fn error(event: &str) -> Option<Value> {
    let value: Value = serde_json::from_str(event).unwrap();
    let fields = value.as_object().unwrap();
    let choices = lenient::entries(fields.get("choices"), Oddity::Choices);
    let error = event_error::read(fields, choices);
    let failure = EngineDelta::default().push_event(event.as_bytes()).err();
    assert_eq!(failure, error.as_ref().map(|error| stream_error(error, &[])), "{event}");
    error
}

#[test]
fn an_error_of_an_engine_fails_the_stream() {
    let inner = json!({"message": "m", "code": 400});
    for (event, expected) in [
        (json!({"error": inner}), inner.clone()),
        (json!({"error": {"error": inner, "message": "m"}}), inner.clone()),
        (json!({"error": inner, "choices": [], "message": "m"}), inner.clone()),
        (json!({"error": "m"}), json!("m")),
        (
            json!({"error": "m", "error_type": "overloaded", "status": 503}),
            json!({"message": "m", "type": "overloaded", "code": 503}),
        ),
        (
            json!({"error": "m", "error_type": "validation"}),
            json!({"message": "m", "type": "validation", "code": null}),
        ),
        (json!({"choices": [{"delta": {}, "error": inner}]}), inner.clone()),
        (json!({"choices": [], "x_groq": {"error": "m"}}), json!("m")),
    ] {
        assert_eq!(error(&event.to_string()), Some(expected), "{event}");
    }
    for flat in [
        json!({"object": "error", "message": "m", "type": "BadRequestError", "code": 400}),
        json!({"object": "error", "code": 400}),
        json!({"message": "m", "code": 422, "choices": null}),
        json!({"message": "m", "status": "ERROR"}),
        json!({"message": "an Error occurred"}),
        json!({"message": "m", "type": "overloaded"}),
        json!({"message": "This model's maximum context length is 8 tokens."}),
        json!({"detail": "m"}),
        json!({"detail": [{"msg": "m"}], "status": 422}),
    ] {
        assert_eq!(error(&flat.to_string()), Some(flat.clone()), "{flat}");
    }
    let list = json!([{"error": inner}]).to_string();
    let failure = EngineDelta::default().push_event(list.as_bytes()).err();
    assert_eq!(failure, Some(stream_error(&inner, &[])));
}

#[test]
fn an_empty_error_is_none() {
    for value in [
        "null",
        "\"\"",
        "\" \"",
        "{}",
        "false",
        "true",
        "7",
        "[]",
        r#"{"code":0,"message":""}"#,
        r#"{"code":null,"message":null,"details":[{}]}"#,
    ] {
        let event = format!(r#"{{"choices":[{{"text":"a","error":{value}}}],"error":{value}}}"#);
        assert_eq!(text(&[&event]), "a", "{event}");
    }
    for event in [
        r#"{"detail":null}"#,
        r#"{"detail":[],"message":""}"#,
        r#"{"message":{"content":"a"},"done":false}"#,
        r#"{"choices":[],"message":"m"}"#,
        r#"{"status":"queued","message":"Waiting for a free worker"}"#,
        r#"{"code":0,"message":"Success","usage":{"total_tokens":3}}"#,
        r#"{"code":200,"message":"OK"}"#,
        r#"{"object":"chat.completion.chunk"}"#,
    ] {
        assert_eq!(error(event), None, "{event}");
    }
}

#[test]
fn content_beside_an_error_is_kept() {
    let mut delta = EngineDelta::default();
    let event = r#"{"choices":[{"text":"a"}],"usage":{"prompt_tokens":1},"error":"m"}"#;
    assert!(delta.push_event(event.as_bytes()).is_err());
    assert_eq!(texts(&delta)[&0].text, "a");
}

#[test]
fn error_events_are_errors_in_a_body() {
    let inner = json!({"message": "m", "code": 400});
    for (body, expected) in [
        (format!("event: error\ndata: {{\"error\":{inner},\"message\":\"m\"}}\n\n"), inner.clone()),
        (format!("event: error\ndata: {inner}\n\n"), inner.clone()),
        ("event: error\ndata: \"no room\"\n\n".to_owned(), json!("no room")),
        ("event: error\ndata: no room".to_owned(), json!("no room")),
        (format!("error: {inner}\n\n"), inner.clone()),
        (format!("data: {{\"error\":{inner}}}\n\ndata: [DONE]\n\n"), inner.clone()),
    ] {
        let (delta, error) = read_body(&[body.as_bytes()]);
        assert_eq!(error, Some(stream_error(&expected, &[])), "{body:?}");
        assert!(!delta.is_done, "{body:?}");
    }
}

#[test]
fn an_error_that_repeats_the_request_is_not_classified_by_its_words() {
    let request = json!({"messages": [{"content": "Say: maximum context length is 5"}]});
    let error = json!({"error": {"message": "Blocked: maximum context length is 5", "code": 400}});
    let fail = |request: &Value| {
        let mut decoder = StreamDecoder::new(request.to_string().into());
        decoder.push_event(error.to_string().as_bytes(), &mut EngineDelta::default()).unwrap_err()
    };
    assert_eq!(fail(&request).rejection().unwrap().1, RefusalReason::Other);
    assert_eq!(fail(&json!({})).rejection().unwrap().1, RefusalReason::ContextTooLong);
}

#[test]
fn the_request_is_kept_until_the_first_content() {
    let mut decoder = StreamDecoder::new(Bytes::from_static(b"{}"));
    let mut push = |event: &str| {
        decoder.push_event(event.as_bytes(), &mut EngineDelta::default()).unwrap();
        decoder.request.len()
    };
    assert_eq!(push(r#"{"choices":[{"delta":{"role":"assistant","content":""}}]}"#), 2);
    assert_eq!(push(r#"{"choices":[{"delta":{"content":"a"}}]}"#), 0);
}
