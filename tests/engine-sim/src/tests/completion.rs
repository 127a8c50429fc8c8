//! Completions: several choices with the probabilities of their tokens, in vLLM's shape.

use serde_json::{Value, json};

use super::super::{Engine, Script};
use super::client::{Client, Reply};

async fn complete(engine: &Engine, body: &Value) -> Reply {
    let mut client = Client::to(engine).await;
    client.post_to("/v1/completions", "", &body.to_string()).await;
    client.reply().await
}

fn ask() -> Value {
    json!({
        "model": "sim-coder", "prompt": "def f(", "n": 2, "max_tokens": 9, "logprobs": 1,
        "stream": true,
        "stream_options": {"include_usage": true, "continuous_usage_stats": true},
    })
}

#[tokio::test]
async fn choices_come_in_turn_with_logprobs_and_counts_of_their_own() {
    let engine = Engine::start();
    let first = Script::tokens(["a", "b"]).logprob(-0.5);
    engine.script(Script::choices([first, Script::tokens(["한"]).logprob(-1.0)]));
    let reply = complete(&engine, &ask()).await;
    assert!(reply.complete);
    let events = reply.events();
    let seen: Vec<_> = events[..5]
        .iter()
        .map(|event| {
            let choice = &event["choices"][0];
            (choice["index"].as_u64().unwrap(), choice["text"].as_str().unwrap())
        })
        .collect();
    assert_eq!(seen, [(0, "a"), (1, "한"), (0, "b"), (1, ""), (0, "")]);
    assert_eq!(events[0]["object"], "text_completion");
    assert!(events[0]["id"].as_str().unwrap().starts_with("cmpl-"));
    let logprobs = json!({
        "text_offset": [0], "token_logprobs": [-0.5], "tokens": ["a"], "top_logprobs": [{"a": -0.5}],
    });
    assert_eq!(events[0]["choices"][0]["logprobs"], logprobs);
    assert_eq!(events[2]["usage"]["completion_tokens"], 2);
    assert_eq!(events[3]["choices"][0]["finish_reason"], "stop");
    assert_eq!(events[5]["usage"]["completion_tokens"], 3);
    assert_eq!(events[5]["choices"], json!([]));
    assert_eq!(events[6], "[DONE]");
}

#[tokio::test]
async fn a_stop_string_and_max_tokens_end_a_choice_and_16_is_the_default() {
    let engine = Engine::start();
    engine.script(Script::tokens(["a", "b\nc", "d"]));
    let mut body = ask();
    body["stop"] = json!(["\n"]);
    let text = |reply: &Reply, index: u64| -> String {
        let events = reply.events();
        let choices = events.iter().map(|event| event["choices"][0].clone());
        let own = choices.filter(|choice| choice["index"] == index);
        own.filter_map(|choice| choice["text"].as_str().map(str::to_owned)).collect()
    };
    let reply = complete(&engine, &body).await;
    assert_eq!((text(&reply, 0).as_str(), text(&reply, 1).as_str()), ("ab", "ab"));
    body["max_tokens"] = json!(1);
    let reply = complete(&engine, &body).await;
    assert_eq!(text(&reply, 0), "a");
    assert_eq!(reply.events()[2]["choices"][0]["finish_reason"], "length");
    engine.script(Script::tokens(["x"; 20]));
    let whole = json!({"prompt": "p", "model": "sim-coder"});
    let reply = complete(&engine, &whole).await.json();
    assert_eq!(reply["choices"][0]["text"], "x".repeat(16));
    assert_eq!(reply["usage"]["completion_tokens"], 16);
}

#[tokio::test]
async fn what_vllm_refuses_is_refused() {
    let engine = Engine::start();
    for (field, value) in [
        ("suffix", json!("):")),
        ("stop", json!(["1", "2", "3", "4", "5"])),
        ("prompt", json!(null)),
    ] {
        let mut body = ask();
        body[field] = value;
        let reply = complete(&engine, &body).await;
        assert_eq!((reply.status, &reply.json()["error"]["param"]), (400, &json!(field)));
    }
}
