//! Clients that stop reading lose their own stream after a timeout, and other clients lose nothing. The effect
//! on other answers is measured by `cargo bench --bench mesh -- --only readers`.

use hapa_engine_sim::Script;
use hapa_proto::codegen::v1::codegen_service_client::CodegenServiceClient;
use hapa_proto::codegen::v1::{GenerateCodeRequest, StreamGenerateCodeResponse};
use hapa_test_harness::{CodegenClient, Identity, TestMesh, within};
use tonic::transport::Endpoint;
use tonic::{Code, Streaming};

use crate::api::generate::{question, stream};

/// One connection with small HTTP/2 windows of its streams.
fn client(mesh: &TestMesh) -> CodegenClient {
    let endpoint = Endpoint::from_shared(format!("http://{}", mesh.address)).unwrap();
    let channel = endpoint
        .initial_stream_window_size(16 * 1024)
        .initial_connection_window_size(64 * 1024 * 1024)
        .connect_lazy();
    CodegenServiceClient::new(Identity::Key(&mesh.key).on(channel))
}

/// A stream of which nothing is read but its begin.
async fn stalled(client: &mut CodegenClient) -> Streaming<StreamGenerateCodeResponse> {
    let frames = client.stream_generate_code(asked()).await;
    let mut frames = frames.unwrap().into_inner();
    frames.message().await.unwrap().expect("it is started");
    frames
}

fn asked() -> GenerateCodeRequest {
    GenerateCodeRequest { max_tokens: Some(4_096), ..question("q") }
}

/// More than windows and sockets hold.
fn endless() -> Script {
    let token = "t".repeat(8 * 1024);
    Script::tokens(std::iter::repeat_n(token.as_str(), 4_096))
}

#[tokio::test]
async fn a_client_that_stops_reading_loses_the_stream_and_the_engine_stops() {
    let mesh = TestMesh::start_with(&["--reader-timeout-seconds=1"]).await;
    mesh.engine.script(endless());
    let mut frames = stalled(&mut client(&mesh)).await;
    mesh.engine.wait_for_aborted(1).await;
    let end = within("the end", async {
        loop {
            if let Err(status) = frames.message().await {
                return status;
            }
        }
    });
    assert_eq!(end.await.code(), Code::Cancelled);
    let counted = async {
        while mesh.metrics().await.sum("hapa_errors_total", &["error_code=\"E4014\""]) < 1.0 {}
    };
    within("the failure to be counted", counted).await;
}

#[tokio::test]
async fn fifty_stalled_readers_do_not_affect_the_others() {
    let mesh = TestMesh::start_with(&["--reader-timeout-seconds=2"]).await;
    let mut client = client(&mesh);
    mesh.engine.script(endless());
    let mut silent = Vec::new();
    for _ in 0..50 {
        silent.push(stalled(&mut client).await);
    }
    let answer = Script::text(&"a line of an answer\n".repeat(200));
    mesh.engine.script(answer.clone());
    for _ in 0..20 {
        let read = stream(&mut client, question("q")).await;
        assert!(read.explanation == answer.full_text());
        assert!(read.finished.is_some(), "{read:?}");
    }
    mesh.engine.wait_for_aborted(50).await;
}
