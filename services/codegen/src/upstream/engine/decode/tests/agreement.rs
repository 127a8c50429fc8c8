//! The fast and the lenient path agree on events in the usual form.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn maybe(value: impl Strategy<Value = Value>) -> impl Strategy<Value = Option<Value>> {
    prop_oneof![
        1 => Just(None),
        1 => Just(Some(Value::Null)),
        3 => value.prop_map(Some),
    ]
}

fn string() -> impl Strategy<Value = Value> {
    prop_oneof![Just(json!("")), "\\PC{0,6}".prop_map(Value::from)]
}

/// An object with those of these fields that are present.
fn object(fields: &[(&str, &Option<Value>)]) -> Value {
    let fields = fields
        .iter()
        .filter_map(|(name, value)| Some(((*name).to_owned(), Option::<Value>::clone(value)?)));
    Value::Object(fields.collect())
}

fn delta() -> impl Strategy<Value = Value> {
    (maybe(string()), maybe(string()), maybe(string())).prop_map(|(content, first, second)| {
        object(&[("content", &content), ("reasoning_content", &first), ("reasoning", &second)])
    })
}

fn logprobs() -> impl Strategy<Value = Value> {
    let number =
        || maybe(prop::sample::select(vec![-0.5, 0.0, 0.25, -9999.0]).prop_map(Value::from));
    let numbers = prop::collection::vec(number(), 0..4);
    let rows = prop::collection::vec(number(), 0..4);
    (
        maybe(numbers.prop_map(|all| json!(all))),
        maybe(rows.prop_map(|all| {
            let rows: Vec<_> = all.iter().map(|value| object(&[("logprob", value)])).collect();
            json!(rows)
        })),
    )
        .prop_map(|(numbers, rows)| object(&[("token_logprobs", &numbers), ("content", &rows)]))
}

fn usage() -> impl Strategy<Value = Value> {
    let count = || maybe((0..9_u32).prop_map(Value::from));
    (
        count(),
        count(),
        count(),
        maybe(count().prop_map(|cached| object(&[("cached_tokens", &cached)]))),
    )
        .prop_map(|(prompt, completion, total, details)| {
            object(&[
                ("prompt_tokens", &prompt),
                ("completion_tokens", &completion),
                ("total_tokens", &total),
                ("prompt_tokens_details", &details),
            ])
        })
}

fn choice() -> impl Strategy<Value = Value> {
    let index = maybe(prop_oneof![0..4_u32, 126..130_u32].prop_map(Value::from));
    let reason = prop::sample::select(vec!["stop", "length", "", "null", "other"]);
    let reason = maybe(reason.prop_map(Value::from));
    (index, maybe(delta()), maybe(string()), maybe(logprobs()), reason).prop_map(
        |(index, delta, text, logprobs, reason)| {
            object(&[
                ("index", &index),
                ("delta", &delta),
                ("text", &text),
                ("logprobs", &logprobs),
                ("finish_reason", &reason),
            ])
        },
    )
}

fn event() -> impl Strategy<Value = Value> {
    let choices = prop::collection::vec(choice(), 0..4).prop_map(|all| json!(all));
    (maybe(choices), maybe(usage()), maybe(string())).prop_map(|(choices, usage, model)| {
        object(&[("choices", &choices), ("usage", &usage), ("model", &model)])
    })
}

proptest! {
    #[test]
    fn both_paths_read_the_same(events in prop::collection::vec(event(), 1..6)) {
        let (mut fast, mut lenient) = (EngineDelta::default(), EngineDelta::default());
        let (mut streamed, mut decoder) = (StreamedChoices::default(), StreamDecoder::default());
        for event in &events {
            let text = event.to_string();
            let (usual, len) = UsualEvent::parse(text.as_bytes()).expect("the usual form");
            prop_assert_eq!(len, text.len());
            fast.push_usual(usual, &mut streamed);
            decoder.push_lenient(event, &mut lenient).unwrap();
        }
        prop_assert_eq!(&fast.pieces, &lenient.pieces);
        prop_assert_eq!(&fast.usage, &lenient.usage);
        prop_assert_eq!(&fast.model, &lenient.model);
        prop_assert_eq!(&streamed, &decoder.streamed);
    }

    #[test]
    fn no_bytes_make_the_decoder_panic_or_fail(
        events in prop::collection::vec(prop_oneof![
            prop::collection::vec(any::<u8>(), 0..60),
            "[\\[{\\]}\",:\\\\u0-9a-zD]{0,60}".prop_map(String::into_bytes),
        ], 1..6),
    ) {
        let mut delta = EngineDelta::default();
        for event in &events {
            let _ = delta.push_event(event);
        }
    }
}
