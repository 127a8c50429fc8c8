//! The lifecycle of a process: health, probes and drain.

mod descriptors;
mod shutdown;

use hapa_engine_sim::Script;
use hapa_proto::codegen::v1::stream_generate_code_response::Event;
use hapa_test_harness::{TestMesh, incident, within};
use tonic::Code;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::api::generate::question;

#[tokio::test]
async fn each_service_and_the_whole_report_serving_without_a_key() {
    let mesh = TestMesh::start().await;
    let mut health = HealthClient::new(mesh.connect().await);
    let services = [
        "",
        "hapa.codegen.v1.CodegenService",
        "hapa.auth.v1.AuthService",
        "hapa.auth.v1.KeyService",
    ];
    for service in services {
        let request = HealthCheckRequest { service: service.to_owned() };
        let status = health.check(request).await.unwrap().into_inner().status();
        assert_eq!(status, ServingStatus::Serving, "{service:?}");
    }
    let unknown = HealthCheckRequest { service: "else".to_owned() };
    assert_eq!(health.check(unknown).await.unwrap_err().code(), Code::NotFound);
    assert_eq!(mesh.page("/livez").await, (200, "alive\n".to_owned()));
    assert_eq!(mesh.page("/readyz").await, (200, "ready\n".to_owned()));
}

#[tokio::test]
async fn a_drain_lets_open_streams_finish() {
    let mut mesh = TestMesh::start().await;
    mesh.engine.once(Script::tokens(["a", "b"]).hold(1));
    let mut frames = mesh.client().stream_generate_code(question("q")).await.unwrap().into_inner();
    within("the first frame", frames.message()).await.unwrap();
    let mut health = HealthClient::new(mesh.connect().await);
    let watch = health.watch(HealthCheckRequest::default()).await.unwrap();
    let mut watch = watch.into_inner();
    within("health", watch.message()).await.unwrap();
    mesh.begin_shutdown();
    let status = within("health to change", watch.message()).await.unwrap().unwrap().status();
    assert_eq!(status, ServingStatus::NotServing);
    assert_eq!(mesh.page("/readyz").await.0, 503);
    drop((watch, health));
    mesh.engine.release();
    let mut last = None;
    while let Some(frame) = within("a frame", frames.message()).await.unwrap() {
        last = frame.event;
    }
    assert!(matches!(last, Some(Event::Finished(_))), "{last:?}");
    mesh.wait_until_stopped().await;
}

#[tokio::test]
async fn an_unfinished_stream_gets_an_error_and_the_drain_ends_in_time() {
    let mut mesh = TestMesh::start_with(&["--drain-timeout-seconds=0.6"]).await;
    mesh.engine.once(Script::tokens(["a", "b"]).hold(1));
    let mut frames = mesh.client().stream_generate_code(question("q")).await.unwrap().into_inner();
    // A socket that sends no byte, and an idle HTTP/2 connection.
    let silent = tokio::net::TcpStream::connect(mesh.address).await.unwrap();
    let idle = mesh.connect().await;
    mesh.begin_shutdown();
    let mut failed = None;
    let status = loop {
        match within("a frame", frames.message()).await {
            Ok(Some(frame)) => {
                if let Some(Event::Failed(event)) = frame.event {
                    failed = Some(event);
                }
            }
            Ok(None) => panic!("the stream ended as if it were whole"),
            Err(status) => break status,
        }
    };
    assert_eq!(status.code(), Code::Unavailable);
    let failed = failed.unwrap();
    assert_eq!(incident(&status), (failed.error_code, failed.incident_id));
    assert_eq!(incident(&status).0, "E5008");
    mesh.wait_until_stopped().await;
    mesh.engine.wait_for_aborted(1).await;
    drop((silent, idle));
}

#[tokio::test]
async fn what_is_not_http2_is_closed_and_does_not_disturb_others() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mesh = TestMesh::start().await;
    let mut http1 = tokio::net::TcpStream::connect(mesh.address).await.unwrap();
    http1.write_all(b"GET /api/v1/code/models HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let mut rest = Vec::new();
    let _ = within("the socket to be closed", http1.read_to_end(&mut rest)).await;
    assert!(mesh.client().generate_code(question("q")).await.is_ok());
}

#[tokio::test]
async fn calls_are_counted_by_what_became_of_them_and_no_label_holds_a_key() {
    let mesh = TestMesh::start().await;
    let rpc = "rpc=\"/hapa.codegen.v1.CodegenService/GenerateCode\"";
    let before = mesh.metrics().await;
    let count = |metrics: &hapa_test_harness::Metrics, code: &str| {
        metrics.sum("hapa_requests_total", &[rpc, code])
    };
    mesh.client().generate_code(question("q")).await.unwrap();
    mesh.client().generate_code(question("")).await.unwrap_err();
    within("the counts", async {
        loop {
            let now = mesh.metrics().await;
            let more = |code| count(&now, code) > count(&before, code);
            if more("code=\"OK\"") && more("code=\"INVALID_ARGUMENT\"") {
                break;
            }
        }
    })
    .await;
    let now = mesh.metrics().await;
    let held = |metrics: &hapa_test_harness::Metrics| {
        metrics.sum("hapa_inter_token_added_seconds_count", &[rpc])
    };
    assert!(held(&now) > held(&before), "how long an engine's words were here");
    assert!(now.sum("hapa_ai_tokens_used_total", &["output"]) > 0.0);
    assert!(now.sum("hapa_errors_total", &["error_code=\"E4002\""]) > 0.0);
    assert!(!now.text().contains(&mesh.key), "no label holds a key");
    mesh.finish().await;
}
