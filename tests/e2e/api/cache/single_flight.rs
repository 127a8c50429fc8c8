//! Single flight: equal concurrent requests reach the engine once, and no subscriber depends on the first one.

use hapa_engine_sim::{Fault, Script};
use hapa_proto::analytics::v1::GetUsageRequest;
use hapa_proto::analytics::v1::analytics_service_client::AnalyticsServiceClient;
use hapa_proto::auth::v1::{CreateKeyRequest, RevokeKeyRequest};
use hapa_proto::codegen::v1::stream_generate_code_response::Event;
use hapa_proto::codegen::v1::{GenerateCodeRequest, StreamGenerateCodeResponse};
use hapa_test_harness::{CodegenClient, Identity, TestMesh, incident, within};
use tokio::task::JoinSet;
use tonic::{Code, Request, Streaming};

use super::{ON, ask, fresh};
use crate::api::generate::{question, stream};

/// A stream that was opened and read to a first token.
struct Open(Streaming<StreamGenerateCodeResponse>);

impl Open {
    async fn begin(
        client: &mut CodegenClient,
        request: impl tonic::IntoRequest<GenerateCodeRequest>,
    ) -> Open {
        let frames = within("a stream", client.stream_generate_code(request)).await.unwrap();
        let mut open = Open(frames.into_inner());
        open.token().await;
        open
    }

    /// The next piece of text; the end is none.
    async fn token(&mut self) -> Option<String> {
        within("a token", async {
            loop {
                match self.0.message().await.unwrap()?.event? {
                    Event::Delta(delta) => return Some(delta.text),
                    Event::Failed(failed) => panic!("{failed:?}"),
                    _ => {}
                }
            }
        })
        .await
    }

    async fn rest(mut self) -> String {
        let mut text = String::new();
        while let Some(token) = self.token().await {
            text += &token;
        }
        text
    }
}

#[tokio::test]
async fn twenty_concurrent_requests_share_one_generation_even_if_the_first_leaves() {
    let mesh = TestMesh::start_with(&[ON]).await;
    mesh.engine.once(Script::tokens(["a", "b", "c"]).hold(1).hold(2));
    let first = Open::begin(&mut mesh.client(), question("q")).await;
    let mut others = JoinSet::new();
    for number in 0..20 {
        let mut client = mesh.client();
        others.spawn(async move {
            let request_id = format!("mine-{number}");
            let request = GenerateCodeRequest { request_id: request_id.clone(), ..question("q") };
            if number % 2 == 0 {
                let read = stream(&mut client, request).await;
                let (started, finished) = (read.started.unwrap(), read.finished.unwrap());
                assert_eq!((started.request_id, started.cached), (request_id, true));
                (read.explanation, finished.usage)
            } else {
                let reply = client.generate_code(request).await.unwrap().into_inner();
                assert_eq!((reply.request_id, reply.cached), (request_id, true));
                (reply.generated_code, reply.usage)
            }
        });
    }
    within("all to have joined", async {
        let mut cache = super::clearing::cache(&mesh);
        while super::clearing::stats(&mut cache).await[0].hits < 20.0 {}
    })
    .await;
    mesh.engine.release();
    drop(first);
    mesh.engine.release();
    for (text, usage) in within("all of them", others.join_all()).await {
        assert_eq!((text.as_str(), usage.unwrap().completion_tokens), ("abc", 3));
    }
    let counts = mesh.engine.counts();
    assert_eq!((counts.started, counts.aborted), (1, 0), "{counts:?}");
    // The tokens count for exactly one of the calls.
    let mut analytics = AnalyticsServiceClient::new(mesh.channel_as(Identity::Mesh));
    within("the sums", async {
        loop {
            let model = "prompt".to_owned();
            let request = GetUsageRequest { model, ..GetUsageRequest::default() };
            let total = analytics.get_usage(request).await.unwrap().into_inner().total;
            let total = total.unwrap_or_default();
            if total.requests >= 21.0 {
                return assert!((total.completion_tokens - 3.0).abs() < 1e-9, "{total:?}");
            }
        }
    })
    .await;
}

#[tokio::test]
async fn when_the_last_leaves_the_engine_stops_and_the_next_is_a_first() {
    let mesh = TestMesh::start_with(&[ON]).await;
    mesh.engine.once(Script::tokens(["a", "b"]).hold(1));
    let mut readers = Vec::new();
    for _ in 0..5 {
        readers.push(Open::begin(&mut mesh.client(), question("q")).await);
    }
    let last = readers.pop();
    drop(readers);
    assert_eq!(mesh.engine.in_flight(), 1);
    drop(last);
    mesh.engine.wait_for_aborted(1).await;
    let again = ask(&mut mesh.client(), "q").await.unwrap();
    assert!(!again.cached);
    assert_eq!(mesh.engine.counts().started, 2);
}

#[tokio::test]
async fn a_deadline_ends_its_own_call_alone() {
    let mesh = TestMesh::start_with(&[ON]).await;
    mesh.engine.once(Script::tokens(["a", "b"]).hold(1));
    let mut request = Request::new(question("q"));
    // Set by hand: `set_timeout` would also end the call on this side, before the answer is read.
    request.metadata_mut().insert("grpc-timeout", "900m".parse().unwrap());
    let mut hasty = mesh.client();
    let hasty = tokio::spawn(async move { stream(&mut hasty, request).await });
    mesh.engine.wait_for_started(1).await;
    let patient = Open::begin(&mut mesh.client(), question("q")).await;
    let read = within("the hasty one", hasty).await.unwrap();
    let (failed, status) = (read.failed.unwrap(), read.status.unwrap());
    assert_eq!((failed.error_code.as_str(), failed.partial), ("E5001", true));
    assert_eq!(status.code(), Code::DeadlineExceeded);
    mesh.engine.release();
    assert_eq!(patient.rest().await, "b");
    let counts = mesh.engine.counts();
    assert_eq!((counts.started, counts.aborted), (1, 0));
    mesh.finish().await;
}

#[tokio::test]
async fn requests_share_per_credential_and_never_with_a_request_for_a_fresh_answer() {
    let mesh = TestMesh::start_with(&[ON]).await;
    mesh.engine.script(Script::tokens(["a", "b"]).hold(1));
    let made = mesh.create_key(CreateKeyRequest { ..TestMesh::dev_key() }).await;
    let mut other = mesh.client_with(&made.key_text);
    let first = Open::begin(&mut mesh.client(), question("q")).await;
    let mut same_owner = Open::begin(&mut other, question("q")).await;
    let alone = Open::begin(&mut mesh.client(), fresh("q")).await;
    assert_eq!(mesh.engine.counts().started, 3);
    // A subscriber with a revoked key does not end the others.
    let revoke = RevokeKeyRequest { key_id: made.key.unwrap().key_id };
    mesh.keys().revoke_key(revoke).await.unwrap();
    let status = within("the end", async {
        loop {
            if let Err(status) = same_owner.0.message().await {
                return status;
            }
        }
    });
    assert_eq!(incident(&status.await).0, "E4007");
    mesh.engine.wait_for_aborted(1).await;
    mesh.engine.release();
    mesh.engine.release();
    mesh.engine.release();
    assert_eq!((first.rest().await, alone.rest().await), ("b".to_owned(), "b".to_owned()));
    mesh.finish().await;
}

#[tokio::test]
async fn what_breaks_off_breaks_off_for_everyone_and_what_is_refused_is_refused_to_all() {
    let mesh = TestMesh::start_with(&[ON]).await;
    mesh.engine.once(Script::tokens(["a", "b"]).hold(1).fault(Fault::CutAfter(1)));
    let (mut one, mut other) = (mesh.client(), mesh.client());
    let reading = tokio::spawn(async move { stream(&mut one, question("q")).await });
    mesh.engine.wait_for_started(1).await;
    let mut joined = Open::begin(&mut other, question("q")).await;
    mesh.engine.release();
    let first = within("the first", reading).await.unwrap();
    let status = within("the other", async {
        loop {
            if let Err(status) = joined.0.message().await {
                return status;
            }
        }
    })
    .await;
    assert_eq!(first.failed.unwrap().error_code, "E5007");
    assert_eq!(incident(&status), incident(&first.status.unwrap()), "it is one failure");
    assert!(!ask(&mut other, "q").await.unwrap().cached);
    mesh.finish().await;
}

#[tokio::test]
async fn a_stalled_reader_does_not_delay_the_others() {
    let mesh = TestMesh::start_with(&[ON]).await;
    // More than sockets, flow-control windows and the buffer for slow subscribers can hold.
    let token = "t".repeat(16 * 1024);
    let script = Script::tokens(std::iter::repeat_n(token.as_str(), 2_000)).hold(1);
    mesh.engine.once(script);
    let request = || GenerateCodeRequest { max_tokens: Some(4_096), ..question("q") };
    let mut idle = Open::begin(&mut mesh.client(), request()).await;
    let mut eager = mesh.client_with_own_connection().await;
    let eager = Open::begin(&mut eager, request()).await;
    mesh.engine.release();
    let text = within("the eager one", eager.rest()).await;
    assert_eq!(text.len(), 1_999 * token.len());
    // A subscriber that reads much too late fails with an error. It never receives a truncated answer as a
    // whole one.
    let status = within("the idle one", async {
        loop {
            match idle.0.message().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("it ended as if it were whole"),
                Err(status) => return status,
            }
        }
    });
    assert_eq!(incident(&status.await).0, "E4014");
    assert_eq!(mesh.engine.counts().started, 1);
    mesh.finish().await;
}
