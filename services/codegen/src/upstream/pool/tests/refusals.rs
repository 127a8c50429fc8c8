//! Tests of what follows a refusal of an engine: another try without a field, another engine, or the caller's
//! error.

use bytes::Bytes;
use hapa_proto::codegen::v1::EngineFindings;
use serde_json::json;

use super::super::*;
use crate::upstream::engine::tests::scripted_server::{Received, Reply, ScriptedServer};
use crate::upstream::engine::{EngineError, Operation, RefusalReason};

const CHAT: &str = "/v1/chat/completions";

async fn server(chat: impl Fn(&Received) -> Reply + Send + Sync + 'static) -> ScriptedServer {
    ScriptedServer::start(move |request| match request.path.as_str() {
        CHAT => chat(request),
        "/v1/models" => Reply::json(200, &json!([{ "id": "m" }])),
        _ => Reply::json(404, &json!({ "detail": "Not Found" })),
    })
    .await
}

fn answer() -> Reply {
    Reply::events(&[r#"{"choices":[{"index":0,"delta":{"content":"a"}}]}"#])
}

fn pool_of(servers: &[&ScriptedServer]) -> EnginePool {
    let urls: Vec<_> = servers.iter().map(|one| format!("http://{}/v1", one.address)).collect();
    pool_at(&urls.join(","))
}

fn pool_at(urls: &str) -> EnginePool {
    let sources = EngineSource::parse_list(urls).unwrap();
    let timeouts = PoolTimeouts { attempt: Duration::from_mins(1), stall: Duration::from_mins(1) };
    EnginePool::new(sources, EngineOptions::default(), timeouts).unwrap()
}

async fn call(pool: &EnginePool) -> Result<(), EngineError> {
    let body = json!({ "model": "m", "cache_salt": "s", "priority": 1, "temperature": 0.3 });
    start(pool, "m", &body).await.map(drop)
}

async fn start(
    pool: &EnginePool,
    model: &str,
    body: &serde_json::Value,
) -> Result<StartedStream, EngineError> {
    let request = EngineRequest {
        operation: Operation::Chat,
        body: Bytes::from(body.to_string()),
        model: model.to_owned(),
        affinity: None,
        report: hapa_core::call_stats::CallStats::default(),
        answered: CancellationToken::new(),
        span: tracing::Span::none(),
    };
    match pool.start_stream(request).await {
        Ok(started) => Ok(started),
        Err(DispatchError::Engine(error)) => Err(error),
        Err(other) => panic!("{other}"),
    }
}

fn fields(request: &Received) -> Vec<&str> {
    request.body.as_object().unwrap().keys().map(String::as_str).collect()
}

#[tokio::test]
async fn refused_extras_are_left_out_at_once_and_from_then_on() {
    let server = server(|request| match fields(request) {
        sent if sent.contains(&"cache_salt") => {
            Reply::json(400, &json!({"error": {"message": "Unrecognized request argument supplied: cache_salt"}}))
        }
        // The same inside a stream.
        sent if sent.contains(&"priority") => {
            let error = json!({"error": {"message": "Extra inputs are not permitted", "param": "priority", "code": 400}});
            Reply::events(&[&error.to_string()])
        }
        _ => answer(),
    })
    .await;
    let pool = pool_of(&[&server]);
    for _ in 0..6 {
        call(&pool).await.unwrap();
    }
    let received = server.received(CHAT);
    assert_eq!(received.len(), 8, "the first call is asked three times");
    assert_eq!(fields(&received[7]), ["model", "temperature"]);
    assert_eq!(pool.snapshot().endpoints[0].learned(), ["cache_salt", "priority"]);
}

#[tokio::test]
async fn findings_name_the_engines_of_which_something_was_learned() {
    let refusal =
        json!({"error": {"message": "Unsupported field cache_salt", "param": "cache_salt"}});
    let refusing = server(move |request| match fields(request) {
        sent if sent.contains(&"cache_salt") => Reply::json(400, &refusal),
        _ => answer(),
    })
    .await;
    let (usual, moved) = (server(|_| answer()).await, server(|_| answer()).await);
    let urls = format!(
        "http://{}/v1,http://{}/v1,http://me:hunter2@{}",
        refusing.address, usual.address, moved.address
    );
    let pool = pool_at(&urls);
    assert!(pool.snapshot().engine_findings().is_empty(), "nothing was asked yet");
    pool.refresh().await;
    while pool.snapshot().endpoints[0].learned().is_empty() {
        call(&pool).await.unwrap();
    }
    let finding = |server: &ScriptedServer, base_url: String, fields: &[&str]| EngineFindings {
        name: server.address.to_string(),
        base_url,
        unsupported_fields: fields.iter().map(|field| (*field).to_owned()).collect(),
    };
    let mut expected = [
        finding(&refusing, String::new(), &["cache_salt"]),
        finding(&moved, format!("http://{}/v1", moved.address), &[]),
    ];
    expected.sort_by(|a, b| a.name.cmp(&b.name));
    assert_eq!(pool.snapshot().engine_findings(), expected);
}

#[tokio::test]
async fn a_field_that_is_refused_without_being_sent_is_not_learned() {
    let refusal =
        json!({"error": {"message": "Unsupported field cache_salt", "param": "cache_salt"}});
    let server = server(move |_| Reply::json(400, &refusal)).await;
    let pool = pool_of(&[&server]);
    let error = call(&pool).await.unwrap_err();
    let (_, refusal) = error.rejection().unwrap();
    assert!(matches!(refusal, RefusalReason::FieldRefused { .. }), "{error}");
    assert_eq!(
        error.to_string(),
        "the engine answered 400 Bad Request: it refuses the field cache_salt"
    );
    assert_eq!(server.received(CHAT).len(), 2);
    assert!(pool.snapshot().endpoints[0].learned().is_empty());
}

#[tokio::test]
async fn a_missing_path_keeps_the_model_and_another_engine_is_asked() {
    let without = server(|_| Reply::json(404, &json!({ "detail": "Not Found" }))).await;
    let with = server(|_| answer()).await;
    let pool = pool_of(&[&without, &with]);
    for _ in 0..8 {
        call(&pool).await.unwrap();
    }
    assert!(pool.snapshot().endpoints.iter().all(|endpoint| endpoint.lists_model("m")));
    assert!(without.received(CHAT).len() <= 1, "the engine is avoided for this operation");
    let alone = pool_of(&[&without]);
    for _ in 0..8 {
        let error = call(&alone).await.unwrap_err();
        assert_eq!(error.rejection().unwrap().1, RefusalReason::PathMissing);
    }
    let snapshot = alone.snapshot();
    assert!(snapshot.serves("m") && snapshot.endpoints[0].is_healthy());
}

#[tokio::test]
async fn a_rejection_inside_a_stream_is_the_callers_and_no_failure() {
    let error = json!({"error": {"message": "This model's maximum context length is 8 tokens.", "type": "BadRequestError", "code": 400}});
    let refuse = move |_: &Received| Reply::events(&[&error.to_string(), "{}"]);
    let (first, second) = (server(refuse.clone()).await, server(refuse).await);
    let pool = pool_of(&[&first, &second]);
    for _ in 0..8 {
        let error = call(&pool).await.unwrap_err();
        assert_eq!(error.rejection().unwrap().1, RefusalReason::ContextTooLong);
    }
    assert_eq!(first.received(CHAT).len() + second.received(CHAT).len(), 8, "asked once each");
    assert!(pool.snapshot().endpoints.iter().all(|endpoint| endpoint.is_healthy()));
}

#[tokio::test]
async fn replies_that_can_not_be_read_open_the_circuit() {
    let server = server(|_| Reply::events(&["garbage"])).await;
    let pool = pool_of(&[&server]);
    for _ in 0..5 {
        let error = call(&pool).await.unwrap_err();
        assert!(matches!(error, EngineError::Truncated), "{error}");
    }
    assert!(!pool.snapshot().endpoints[0].is_healthy());
}

#[tokio::test]
async fn an_engine_that_rejects_the_credential_is_replaced_by_another() {
    let closed = server(|_| Reply::json(401, &json!({ "error": "Unauthorized" }))).await;
    let open = server(|_| answer()).await;
    let pool = pool_of(&[&closed, &open]);
    for _ in 0..8 {
        call(&pool).await.unwrap();
    }
    let error = call(&pool_of(&[&closed])).await.unwrap_err();
    assert!(error.is_credential_rejected());
}

#[tokio::test]
async fn what_one_model_lacks_does_not_concern_another() {
    let refuse = |request: &Received| match request.body["model"].as_str() {
        Some("m") if request.body.get("temperature").is_some() => Reply::json(
            400,
            &json!({"error": {"param": "temperature", "code": "unsupported_value"}}),
        ),
        Some("embed") => {
            Reply::json(400, &json!({"error": {"message": "\"embed\" does not support chat"}}))
        }
        _ => answer(),
    };
    let server = server(refuse).await;
    let pool = pool_of(&[&server]);
    let body = |model: &str| json!({ "model": model, "temperature": 0.3, "top_p": 1 });
    for _ in 0..2 {
        let started = start(&pool, "m", &body("m")).await.unwrap();
        assert_eq!(started.left_out, ["temperature"]);
    }
    let other = start(&pool, "other", &body("other")).await.unwrap();
    assert!(other.left_out.is_empty());
    let error = start(&pool, "embed", &body("embed")).await.err().unwrap();
    assert!(error.has_reason(RefusalReason::PathMissing));
    let endpoint = Arc::clone(&pool.snapshot().endpoints[0]);
    let lacks = |model: &str| endpoint.problems.lacks(Operation::Chat, model, Instant::now());
    assert!(lacks("embed") && !lacks("m") && endpoint.is_healthy());
}

#[tokio::test]
async fn a_refused_system_message_is_merged_and_asked_again() {
    let server = server(|request| match request.body["messages"][0]["role"].as_str() {
        Some("system") => Reply::json(400, &json!({"message": "System role not supported None"})),
        _ => answer(),
    })
    .await;
    let pool = pool_of(&[&server]);
    let messages = json!([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]);
    for _ in 0..2 {
        start(&pool, "m", &json!({ "messages": messages })).await.unwrap();
    }
    let received = server.received(CHAT);
    assert_eq!(received.len(), 3, "the second call is merged at once");
    let merged = json!([{"role": "user", "content": "s\n\nu"}]);
    assert!(received[1..].iter().all(|request| request.body["messages"] == merged));
}

#[tokio::test]
async fn a_content_filter_is_neither_a_failure_nor_asked_elsewhere() {
    let error = json!({"error": {"message": "filtered", "code": "content_filter"}});
    let refuse = move |_: &Received| Reply::events(&[&error.to_string()]);
    let (first, second) = (server(refuse.clone()).await, server(refuse).await);
    let pool = pool_of(&[&first, &second]);
    for _ in 0..8 {
        let error = call(&pool).await.unwrap_err();
        assert!(error.has_reason(RefusalReason::ContentFiltered));
        let published = crate::error::Error::from(error).into_rpc_error(false, "");
        assert_eq!(published.code().to_string(), "E4001");
    }
    assert_eq!(first.received(CHAT).len() + second.received(CHAT).len(), 8, "asked once each");
    assert!(pool.snapshot().endpoints.iter().all(|endpoint| endpoint.is_healthy()));
}

#[tokio::test]
async fn an_engine_without_credit_fails_until_another_is_preferred() {
    let unpaid = server(|_| Reply::json(402, &json!({"error": "Insufficient credits"}))).await;
    let paid = server(|_| answer()).await;
    let pool = pool_of(&[&unpaid, &paid]);
    for _ in 0..8 {
        call(&pool).await.unwrap();
    }
    let alone = pool_of(&[&unpaid]);
    for _ in 0..5 {
        let error = call(&alone).await.unwrap_err();
        assert!(error.has_reason(RefusalReason::Unpaid));
        let published = crate::error::Error::from(error).into_rpc_error(false, "");
        assert_eq!(published.code().to_string(), "E5006");
    }
    assert!(!alone.snapshot().endpoints[0].is_healthy());
}
