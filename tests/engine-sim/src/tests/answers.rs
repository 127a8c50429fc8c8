//! Answers without faults, and refusals of requests that the engine cannot serve.

use std::time::{Duration, Instant};

use serde_json::json;

use super::super::{Engine, LineEnd, Script, Setup};
use super::client::{Client, Reply, ask};

async fn answer(engine: &Engine, body: &serde_json::Value) -> Reply {
    let mut client = Client::to(engine).await;
    client.post(body).await;
    client.reply().await
}

#[tokio::test]
async fn a_stream_has_the_chunks_of_vllm() {
    let engine = Engine::start();
    engine.script(Script::tokens(["안녕", " \"you\"\n"]));
    let mut client = Client::to(&engine).await;
    client.post_with("X-Request-Id: r1\r\n", &ask().to_string()).await;
    let reply = client.reply().await;
    assert_eq!(reply.status, 200);
    assert!(reply.complete);
    assert!(reply.head.contains("content-type: text/event-stream; charset=utf-8\r\n"));
    let events = reply.events();
    assert_eq!(events.len(), 6);
    for event in &events[..5] {
        assert_eq!(event["id"], "chatcmpl-r1");
        assert_eq!(event["object"], "chat.completion.chunk");
        assert_eq!(event["model"], "sim-coder");
        assert!(event["created"].as_u64().unwrap() > 0);
    }
    let choices: Vec<_> = events[..5].iter().map(|event| event["choices"].clone()).collect();
    let role = json!({"role": "assistant", "content": ""});
    assert_eq!(choices[0][0]["delta"], role);
    assert_eq!(
        choices[1],
        json!([{"index": 0, "delta": {"content": "안녕"}, "logprobs": null,
            "finish_reason": null, "token_ids": null}])
    );
    assert_eq!(choices[2][0]["delta"]["content"], " \"you\"\n");
    assert_eq!(
        choices[3],
        json!([{"index": 0, "delta": {"content": ""}, "logprobs": null,
            "finish_reason": "stop", "stop_reason": null, "token_ids": null}])
    );
    assert_eq!(choices[4], json!([]));
    let usage = json!({"prompt_tokens": 3, "total_tokens": 5, "completion_tokens": 2});
    assert_eq!(events[4]["usage"], usage);
    assert!(events[4]["system_fingerprint"].is_string());
    assert!(events[3].get("usage").is_none() && events[3].get("system_fingerprint").is_none());
    assert_eq!(events[5], "[DONE]");
}

#[tokio::test]
async fn usage_comes_only_when_asked_for_and_on_every_chunk_when_continuous() {
    let engine = Engine::start();
    engine.script(Script::tokens(["a", "b"]).usage(7, 9));
    let mut body = ask();
    body["stream_options"] = json!({"include_usage": true, "continuous_usage_stats": true});
    let events = answer(&engine, &body).await.events();
    let completion: Vec<_> =
        events[..5].iter().map(|e| e["usage"]["completion_tokens"].as_u64().unwrap()).collect();
    assert_eq!(completion, [0, 1, 2, 2, 9]);

    body.as_object_mut().unwrap().remove("stream_options");
    let events = answer(&engine, &body).await.events();
    assert_eq!(events.len(), 5, "no usage chunk");
    assert!(events[3]["system_fingerprint"].is_string());
}

#[tokio::test]
async fn a_whole_answer_has_the_text_the_reason_and_the_usage() {
    let engine = Engine::start();
    let script = Script::default();
    let body = json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]});
    let reply = answer(&engine, &body).await.json();
    assert_eq!(reply["object"], "chat.completion");
    assert_eq!(reply["model"], "sim-coder");
    assert_eq!(reply["choices"][0]["message"]["content"], script.full_text());
    assert_eq!(reply["choices"][0]["finish_reason"], "stop");
    assert_eq!(reply["usage"]["completion_tokens"], script.token_count());
    assert_eq!(reply["usage"]["prompt_tokens"], 1);
}

#[tokio::test]
async fn max_tokens_shortens_an_answer_and_says_length() {
    let engine = Engine::start();
    engine.script(Script::tokens(["a", "b", "c"]));
    let mut body = ask();
    body["max_tokens"] = json!(2);
    let reply = answer(&engine, &body).await;
    assert_eq!(reply.said(), "ab");
    assert_eq!(reply.events()[3]["choices"][0]["finish_reason"], "length");
    body = json!({"messages": [], "max_completion_tokens": 1});
    let reply = answer(&engine, &body).await.json();
    assert_eq!(reply["choices"][0]["finish_reason"], "length");
}

#[tokio::test]
async fn a_text_is_split_into_tokens_that_join_to_the_text() {
    for text in
        ["", " ", "one two", "a\n\n    b\tc", "가나다라마바사아 자차카타파하🙂", "longerthansix"]
    {
        assert_eq!(Script::text(text).full_text(), text);
    }
    assert!(Script::default().full_text().contains("```python\n"));
    assert!(Script::default().token_count() > 30);
}

#[tokio::test]
async fn line_ends_comments_batches_and_pieces_change_the_bytes_but_not_the_text() {
    let engine = Engine::start();
    let script = Script::default();
    let text = script.full_text();

    engine.once(script.clone().line_end(LineEnd::CrLf).comments());
    let reply = Client::streaming(&engine).await.reply().await;
    assert_eq!(reply.said(), text);
    assert!(reply.text().starts_with(": keep-alive\r\n\r\ndata: {"));
    assert!(reply.text().ends_with("data: [DONE]\r\n\r\n"));
    assert_eq!(reply.text().replace("\r\n", "").find('\n'), None);

    engine.once(script.clone().batch(usize::MAX));
    let reply = Client::streaming(&engine).await.reply().await;
    assert_eq!(reply.said(), text);
    assert_eq!(reply.pieces.len(), 1);

    for bytes in [1, 3] {
        engine.once(script.clone().batch(8).pieces(bytes));
        let reply = Client::streaming(&engine).await.reply().await;
        assert!(reply.complete);
        assert_eq!(reply.said(), text);
        assert!(reply.pieces.iter().all(|piece| piece.len() <= bytes));
        assert!(reply.pieces.iter().any(|piece| std::str::from_utf8(piece).is_err()));
    }
}

#[tokio::test]
async fn a_script_may_leave_out_finish_done_and_usage() {
    let engine = Engine::start();
    engine.once(Script::tokens(["a"]).without_finish());
    let events = Client::streaming(&engine).await.reply().await.events();
    assert!(events.iter().all(|event| event["choices"][0]["finish_reason"].is_null()));
    assert_eq!(events.last().unwrap(), "[DONE]");

    engine.once(Script::tokens(["a"]).without_done().without_usage());
    let reply = Client::streaming(&engine).await.reply().await;
    assert!(reply.complete);
    assert_eq!(reply.events().last().unwrap()["choices"][0]["finish_reason"], "stop");
}

#[tokio::test]
async fn tokens_keep_their_pace() {
    let engine = Engine::start();
    let gap = Duration::from_millis(10);
    engine.script(Script::tokens(["a", "b", "c", "d"]).gap(gap).first_after(gap));
    let before = Instant::now();
    Client::streaming(&engine).await.reply().await;
    assert!(before.elapsed() >= gap * 4);
}

#[tokio::test]
async fn a_connection_serves_one_request_after_the_other_and_chunked_bodies() {
    let engine = Engine::start();
    let mut client = Client::to(&engine).await;
    for _ in 0..3 {
        client.post(&ask()).await;
        assert!(client.reply().await.complete);
    }
    let (first, second) = (r#"{"messages":"#, "[]}");
    client
        .send(&format!(
            "POST /v1/chat/completions HTTP/1.1\r\nContent-Type: application/json\r\n\
             Transfer-Encoding: chunked\r\n\r\n{:x}\r\n{first}\r\n{:x}\r\n{second}\r\n0\r\n\r\n",
            first.len(),
            second.len()
        ))
        .await;
    assert_eq!(client.reply().await.status, 200);
    assert_eq!(engine.requests()[3].body, json!({"messages": []}));
    assert_eq!(engine.requests()[3].header("content-type"), Some("application/json"));
    let counts = engine.wait_until(|counts| counts.finished == 4).await;
    assert_eq!((counts.started, counts.in_flight()), (4, 0));
}

#[tokio::test]
async fn what_it_cannot_serve_is_refused_in_the_words_of_vllm() {
    let setup = Setup { max_model_len: 10, ..Setup::default() };
    let engine = Engine::start_with(setup);
    let mut body = ask();
    body["model"] = json!("nobody");
    let reply = answer(&engine, &body).await;
    assert_eq!(reply.status, 404);
    let message = "The model `nobody` does not exist.";
    assert_eq!(
        reply.json(),
        json!({"error": {"message": message, "type": "NotFoundError", "param": "model", "code": 404}})
    );

    body = ask();
    body["messages"][0]["content"] = json!("x".repeat(41));
    let reply = answer(&engine, &body).await;
    let error = &reply.json()["error"];
    assert_eq!((reply.status, &error["param"]), (400, &json!("input_tokens")));
    let message = error["message"].as_str().unwrap();
    assert!(message.starts_with("This model's maximum context length is 10 tokens. However, "));

    body = ask();
    body["stream"] = json!(false);
    let reply = answer(&engine, &body).await;
    assert_eq!((reply.status, &reply.json()["error"]["param"]), (400, &json!("stream_options")));

    for broken in ["", "{", "[]", "{}", r#"{"messages": [], "stream": "yes"}"#] {
        let mut client = Client::to(&engine).await;
        client.post_with("", broken).await;
        let reply = client.reply().await;
        assert_eq!((reply.status, &reply.json()["error"]["code"]), (400, &json!(400)), "{broken}");
    }
}

#[tokio::test]
async fn a_key_guards_v1_and_nothing_else() {
    let setup = Setup { api_key: Some("k1".into()), ..Setup::default() };
    let engine = Engine::start_with(setup);
    let mut client = Client::streaming(&engine).await;
    let reply = client.reply().await;
    assert_eq!((reply.status, reply.json()), (401, json!({"error": "Unauthorized"})));
    assert_eq!(client.get("/v1/models").await.status, 401);
    assert_eq!(client.get("/health").await.status, 200);
    client.post_with("Authorization: Bearer k1\r\n", &ask().to_string()).await;
    assert_eq!(client.reply().await.status, 200);
}

#[tokio::test]
async fn models_metrics_version_and_health_tell_the_truth() {
    let engine = Engine::start();
    engine.script(Script::tokens(["a", "b"]).hold(1));
    let mut asked = Client::streaming(&engine).await;
    asked.head().await;
    asked.read_until("\"a\"").await;
    let mut client = Client::to(&engine).await;
    let models = client.get("/v1/models").await.json();
    assert_eq!(models["data"][0]["id"], "sim-coder");
    assert_eq!(models["data"][0]["max_model_len"], 32_768);
    assert_eq!(models["data"][1]["parent"], "sim-coder");
    assert_eq!(models["data"][1]["max_model_len"], json!(null));
    assert_eq!(client.get("/version").await.json()["version"], "0.32.0");
    assert!(client.get("/health").await.text().is_empty());
    assert_eq!(client.get("/nothing").await.status, 404);
    assert_eq!(client.get("/v1/chat/completions").await.status, 405);

    let labels = r#"engine="0",model_name="sim-coder""#;
    let page = client.get("/metrics").await.text();
    assert!(page.contains(&format!("vllm:num_requests_running{{{labels}}} 1\n")), "{page}");
    assert!(page.contains(&format!("vllm:kv_cache_usage_perc{{{labels}}} 0.00390625\n")), "{page}");
    engine.release();
    asked.read_until("[DONE]").await;
    engine.wait_until(|counts| counts.finished == 1).await;
    let page = client.get("/metrics").await.text();
    for (name, labels, value) in [
        ("num_requests_running", labels.to_owned(), 0),
        ("num_requests_waiting", labels.to_owned(), 0),
        ("prompt_tokens_total", labels.to_owned(), 3),
        ("generation_tokens_total", labels.to_owned(), 2),
        ("request_success_total", format!(r#"{labels},finished_reason="stop""#), 1),
        ("request_success_total", format!(r#"{labels},finished_reason="abort""#), 0),
    ] {
        assert!(page.contains(&format!("vllm:{name}{{{labels}}} {value}\n")), "{name}: {page}");
    }
}
