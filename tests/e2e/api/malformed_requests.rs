//! Requests that are not a message of their method: E4001 for the caller, once, under one incident id. They
//! never cause E5004, which means a bug.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use hapa_proto::codegen::v1::ListModelsRequest;
use hapa_proto::errors::v1::error_tracking_service_client::ErrorTrackingServiceClient;
use hapa_proto::errors::v1::{GetDashboardRequest, GetIncidentRequest};
use hapa_test_harness::{Gateway, Identity, TestChannel, TestMesh, incident, refusal, within};
use http_body::Frame;
use http_body_util::{BodyExt as _, Full, StreamBody};
use proptest::prelude::*;
use serde_json::Value;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::{Service as _, http};

const GENERATE: &str = "/hapa.codegen.v1.CodegenService/GenerateCode";
const LOG_IN: &str = "/hapa.auth.v1.SessionService/CreateSession";

/// Sends these bytes as a gRPC request's body; returns how the call ended.
async fn send(mut wire: TestChannel, path: &str, headers: &[(&str, &str)], bytes: Bytes) -> Status {
    let builder = http::Request::post(path).header("content-type", "application/grpc");
    let builder = builder.header("te", "trailers");
    let builder =
        headers.iter().fold(builder, |builder, (name, value)| builder.header(*name, *value));
    let request = builder.body(Body::new(Full::new(bytes))).unwrap();
    within("a place", std::future::poll_fn(|cx| wire.poll_ready(cx))).await.unwrap();
    let reply = within("an answer", wire.call(request)).await.expect("an answer");
    if let Some(status) = Status::from_header_map(reply.headers()) {
        return status;
    }
    let whole =
        within("the answer's end", reply.into_body().collect()).await.expect("a whole answer");
    Status::from_header_map(whole.trailers().expect("trailers")).expect("a status")
}

/// What the errors service keeps, by code, when all that failed before has arrived there.
async fn stored(mesh: &TestMesh) -> BTreeMap<String, u32> {
    let (_, nobody) = hapa_core::key_format::mint();
    let mut last = mesh.client_with(secrecy::ExposeSecret::expose_secret(&nobody));
    let status = last.list_models(ListModelsRequest::default()).await.unwrap_err();
    occurrences_of(mesh, &incident(&status).1).await;
    let mut errors = ErrorTrackingServiceClient::new(Identity::Mesh.on(mesh.connect().await));
    let sums = errors.get_dashboard(GetDashboardRequest {}).await.unwrap().into_inner();
    let codes = sums.top_error_codes.into_iter().map(|of| (of.code, of.count));
    // Looking for what has not arrived yet is E4010.
    codes.filter(|(code, _)| code != "E4010").collect()
}

/// What is sent, with which further headers and body, and the code that it gets.
type Case = (&'static str, Vec<(&'static str, &'static str)>, Vec<u8>, &'static str);

fn cases() -> Vec<Case> {
    let framed = |flag: u8, length: u32, message: &[u8]| {
        [&[flag], &length.to_be_bytes()[..], message].concat()
    };
    vec![
        ("no body", vec![], vec![], "E4001"),
        ("three bytes of the prefix", vec![], vec![0, 0, 0], "E4001"),
        ("an unknown compression flag", vec![], framed(7, 2, b"ab"), "E4001"),
        ("compressed without an encoding", vec![], framed(1, 2, b"ab"), "E4001"),
        ("less than the length says", vec![], framed(0, 100, b"ab"), "E4001"),
        ("no protobuf", vec![], framed(0, 4, &[0xff; 4]), "E4001"),
        ("no UTF-8 where text is", vec![], framed(0, 3, &[0x0a, 1, 0xff]), "E4001"),
        ("an unknown encoding", vec![("grpc-encoding", "hunter2")], framed(1, 2, b"ab"), "E4012"),
        ("a message and a broken one", vec![], [framed(0, 0, b""), vec![0, 0]].concat(), "E4001"),
        ("a length beyond every limit", vec![], framed(0, u32::MAX, b"ab"), "E4006"),
    ]
}

#[tokio::test]
async fn a_malformed_message_is_the_callers_error_at_the_mesh_and_at_the_gateway() {
    let mesh = TestMesh::start().await;
    let gateway = mesh.gateway(&[]).await;
    let mut expected = BTreeMap::from([("E4003".to_owned(), 1)]);
    for (what, headers, bytes, code) in cases() {
        for path in [GENERATE, LOG_IN] {
            let direct = mesh.channel_as(Identity::Key(&mesh.key));
            for wire in [direct, gateway.channel_as(Identity::Key(&mesh.key))] {
                let status = send(wire, path, &headers, bytes.clone().into()).await;
                assert_eq!(incident(&status).0, code, "{what}, {path}: {status:?}");
                assert!(!status.message().contains("hunter2"), "{what}: {}", status.message());
                *expected.entry(code.to_owned()).or_default() += 1;
            }
        }
    }
    assert_eq!(stored(&mesh).await, expected, "each once");
    mesh.finish().await;
}

#[tokio::test]
async fn a_request_that_is_broken_off_is_no_bug() {
    let mesh = TestMesh::start().await;
    let mut wire = mesh.channel_as(Identity::Key(&mesh.key));
    let begun = stream::iter([Ok(Frame::data(Bytes::from_static(&[0, 0, 0, 0, 9, 1])))]);
    let (break_off, broken) = tokio::sync::oneshot::channel::<()>();
    let broken = stream::once(async {
        let _ = broken.await;
        Err(Status::internal("the client's own trouble"))
    });
    let body = Body::new(StreamBody::new(futures_util::StreamExt::chain(begun, broken)));
    let request = http::Request::post(GENERATE).header("content-type", "application/grpc");
    within("a place", std::future::poll_fn(|cx| wire.poll_ready(cx))).await.unwrap();
    let call = tokio::spawn(wire.call(request.body(body).unwrap()));
    let mut errors = ErrorTrackingServiceClient::new(Identity::Mesh.on(mesh.connect().await));
    drop(break_off);
    let _ = within("the call to end", call).await;
    within("the call to be remembered", async {
        while errors.get_dashboard(GetDashboardRequest {}).await.unwrap().into_inner().total_errors
            == 0
        {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    let expected = [("E4003".to_owned(), 1), ("E4011".to_owned(), 1)];
    assert_eq!(stored(&mesh).await, BTreeMap::from(expected));
    mesh.finish().await;
}

#[tokio::test]
async fn malformed_json_is_refused_once_and_reaches_no_service() {
    let mesh = TestMesh::start().await;
    let gateway = mesh.gateway(&[]).await;
    let mut refused = 0;
    for (path, body) in [
        ("/api/v1/generate-code", "{"),
        ("/api/v1/generate-code", "{\"user_question\": \"a\", "),
        ("/api/v1/generate-code", "[1, 2"),
        ("/api/v1/generate-code", "{\"user_question\": {\"x\": 1}}"),
        ("/api/v1/enhanced-stream-generate", "{\"user_question\": \"a}"),
        ("/api/v1/keys", "{\"name\": [\"hunter2hunter2\"]}"),
        ("/api/v1/complete", "\u{0}"),
    ] {
        for key in [None, Some(mesh.key.as_str())] {
            let reply = post(&gateway, path, key, body).await;
            assert_eq!(reply.status(), 400, "{path} {body}");
            let told: Value = serde_json::from_str(&reply.text().await.unwrap()).unwrap();
            let (code, id) = refusal(&told);
            assert_eq!(code, "E4001", "{path} {body}");
            assert_eq!(occurrences_of(&mesh, &id).await, 1, "{path} {body}: once");
            refused += 1;
        }
    }
    let expected = [("E4001".to_owned(), refused), ("E4003".to_owned(), 1)];
    assert_eq!(
        stored(&mesh).await,
        BTreeMap::from(expected),
        "no service had a failure of its own"
    );
    mesh.finish().await;
}

async fn post(gateway: &Gateway, path: &str, key: Option<&str>, body: &str) -> reqwest::Response {
    let request = gateway.request("POST", path).header("content-type", "application/json");
    let request = match key {
        Some(key) => request.header("x-api-key", key),
        None => request,
    };
    request.body(body).send().await
}

/// How many kept occurrences were shown as this id, as soon as there is one.
async fn occurrences_of(mesh: &TestMesh, id: &str) -> usize {
    let mut errors = ErrorTrackingServiceClient::new(Identity::Mesh.on(mesh.connect().await));
    within("the incident", async {
        loop {
            let request = GetIncidentRequest { incident_id: id.to_owned() };
            if let Ok(found) = errors.get_incident(request).await {
                let found = found.into_inner();
                return found.occurrences.iter().filter(|one| one.incident_id == id).count();
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
}

#[test]
fn no_bytes_make_a_bug() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let mesh = runtime.block_on(TestMesh::start());
    let config =
        ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() };
    proptest!(config, |(bytes in proptest::collection::vec(any::<u8>(), 0..64), flag in 0u8..3)| {
        let framed = [&[flag][..], &u32::try_from(bytes.len()).unwrap().to_be_bytes(), &bytes].concat();
        for body in [bytes.clone(), framed] {
            let wire = mesh.channel_as(Identity::Key(&mesh.key));
            let status = runtime.block_on(send(wire, GENERATE, &[], body.into()));
            let code = hapa_core::rpc_error::published_code(&status).map(|(code, _)| code);
            prop_assert_ne!(code.as_deref(), Some("E5004"));
        }
    });
    runtime.block_on(async {
        assert!(!stored(&mesh).await.contains_key("E5004"));
        mesh.finish().await;
    });
}
