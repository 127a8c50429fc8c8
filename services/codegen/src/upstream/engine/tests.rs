//! Tests of the client against a scripted server.

pub(in crate::upstream) mod scripted_server;

use std::future::poll_fn;

use bytes::Bytes;
use reqwest::StatusCode;
use secrecy::SecretString;
use serde_json::json;

use self::scripted_server::{Reply, ScriptedServer};
use super::*;

fn engine(url: &str) -> Engine {
    let key = SecretString::from("key");
    Engine::new(url, None, &EngineOptions::new(Some(&key), false)).unwrap()
}

async fn send(engine: &Engine) -> Result<ResponseStream, EngineError> {
    engine.send(Operation::Chat, HeaderMap::new(), Bytes::from_static(b"{}")).await
}

#[tokio::test]
async fn only_a_reused_connection_that_closes_before_a_response_is_replaced() {
    let server = ScriptedServer::start(|request| match request.index {
        0 | 2 | 4 | 5 => Reply::Close,
        _ => Reply::events(&["[DONE]"]),
    })
    .await;
    let engine = engine(&format!("http://{}/v1", server.address));
    let closed = EngineError::Unreachable(TransportError::Closed);
    assert_eq!(send(&engine).await.unwrap_err(), closed, "a fresh connection");
    assert_eq!(server.received("/v1/chat/completions").len(), 1);
    for sent in [2, 4] {
        let mut stream = send(&engine).await.unwrap();
        poll_fn(|cx| stream.poll_close(cx)).await;
        assert_eq!(server.received("/v1/chat/completions").len(), sent);
    }
    assert_eq!(send(&engine).await.unwrap_err(), closed, "a reused and a fresh connection");
    assert_eq!(server.received("/v1/chat/completions").len(), 6);
}

#[tokio::test]
async fn a_request_is_not_repeated_after_the_first_byte_of_its_response() {
    let server = ScriptedServer::start(|_| Reply::CutBody).await;
    let engine = engine(&format!("http://{}/v1", server.address));
    let mut stream = send(&engine).await.unwrap();
    let mut delta = EngineDelta::default();
    let error = loop {
        if let Err(error) = poll_fn(|cx| stream.poll_read(&mut delta, cx)).await {
            break error;
        }
    };
    assert_eq!(error, EngineError::Unreachable(TransportError::Closed));
    assert_eq!(server.received("/v1/chat/completions").len(), 1);
}

#[tokio::test]
async fn a_base_url_is_found_with_and_without_the_version() {
    for (served, set) in [("/v1", ""), ("", "/v1"), ("/v1", "/v1"), ("/v1", "/v1/chat/completions")]
    {
        let server = ScriptedServer::start(move |request| match request.path.as_str() {
            path if path == format!("{served}/models?a=b") => Reply::json(200, &json!(["m"])),
            path if path == format!("{served}/chat/completions?a=b") => Reply::events(&["[DONE]"]),
            "/models?a=b" => Reply::json(200, &json!({"error": "Unexpected endpoint"})),
            "/v1/models?a=b" => Reply::Whole(200, "text/html", "<html>".to_owned()),
            _ => Reply::json(404, &json!({"detail": "Not Found"})),
        })
        .await;
        let engine = engine(&format!("http://{}{set}?a=b", server.address));
        for _ in 0..2 {
            assert_eq!(engine.models().await.unwrap()[0].id, "m", "{served} {set}");
        }
        assert!(send(&engine).await.is_ok(), "{served} {set}");
        let other = if served.is_empty() { "/v1/models" } else { "/models" };
        assert!(server.received(other).len() <= 1, "the found base is used from then on");
    }
}

#[tokio::test]
async fn an_engine_without_a_list_of_models_is_reported_by_its_first_refusal() {
    let server = ScriptedServer::start(|request| match request.path.as_str() {
        "/x/models" => Reply::json(405, &json!({"detail": "Method Not Allowed"})),
        _ => Reply::json(404, &json!({"detail": "Not Found"})),
    })
    .await;
    let engine = engine(&format!("http://{}/x", server.address));
    let Err(EngineError::Refused { status, refusal, .. }) = engine.models().await else {
        panic!("there is no list")
    };
    assert_eq!((status, refusal), (StatusCode::METHOD_NOT_ALLOWED, RefusalReason::PathMissing));
    assert_eq!(server.received("/x/v1/models").len(), 1);
}

#[tokio::test]
async fn a_refused_credential_is_not_a_missing_path() {
    let server = ScriptedServer::start(|request| {
        assert!(request.head.contains("authorization: bearer key"), "{}", request.head);
        Reply::json(401, &json!({"error": "Unauthorized"}))
    })
    .await;
    let engine = engine(&format!("http://{}", server.address));
    assert!(engine.models().await.unwrap_err().is_credential_rejected());
    assert!(server.received("/v1/models").is_empty());
}
