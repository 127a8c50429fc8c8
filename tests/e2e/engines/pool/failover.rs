//! One engine of three fails in every possible way: no caller is affected before the first token, and no text
//! is sent twice.

use hapa_engine_sim::{Fault, Script};
use hapa_proto::codegen::v1::GenerateCodeRequest;
use hapa_proto::errors::v1::error_tracking_service_client::ErrorTrackingServiceClient;
use hapa_proto::errors::v1::{GetDashboardRequest, ListIncidentsRequest};
use hapa_test_harness::{Identity, TestMesh, incident, within};

use super::{ANSWER, ask, cluster, is_quiet, is_whole, recovers, started};
use crate::api::generate::{question, stream};

/// No call fails while one engine of three has this fault.
async fn is_overcome(how: &str, mesh: &TestMesh) {
    let before = started(mesh);
    for read in ask(mesh, 24, 3).await {
        assert!(read.finished.is_some(), "{how}: {read:?}");
        is_whole(&read);
    }
    eprintln!("{how}: 24 calls took {} attempts", started(mesh) - before);
    is_quiet(mesh).await;
}

#[tokio::test]
async fn an_engine_that_was_killed_is_not_noticed_and_is_used_again() {
    let mesh = cluster(3).await;
    is_overcome("all well", &mesh).await;
    mesh.engine.stop().await;
    is_overcome("one killed", &mesh).await;
    mesh.engine.resume();
    println!("the engine was used again after {:?}", recovers(&mesh).await);
    is_overcome("all well again", &mesh).await;
}

#[tokio::test]
async fn a_frozen_engine_does_not_consume_the_timeout_of_the_others() {
    let mesh = cluster(3).await;
    mesh.engine.freeze();
    is_overcome("one frozen", &mesh).await;
    mesh.engine.thaw();
    println!("the engine was used again after {:?}", recovers(&mesh).await);
}

#[tokio::test]
async fn engines_that_refuse_break_off_or_are_slow_are_not_noticed() {
    let slow = Script::text(ANSWER).first_after(std::time::Duration::from_millis(700));
    let faults = [
        Fault::status(500),
        Fault::status(503),
        Fault::too_many_requests(1),
        Fault::CutBeforeHeaders,
        Fault::ErrorAfter(0),
        Fault::CutAfter(0),
    ];
    let ill = faults.map(|fault| (format!("{fault:?}"), Script::text(ANSWER).fault(fault)));
    for (how, script) in ill.into_iter().chain([("slow".to_owned(), slow)]) {
        let mesh = cluster(3).await;
        // The retry budget allows at least nine retries. The breaker opens earlier if the fault is a failure.
        for _ in 0..9 {
            mesh.engine.once(script.clone());
        }
        is_overcome(&how, &mesh).await;
    }
}

#[tokio::test]
async fn an_adapter_that_an_engine_has_lost_is_asked_for_elsewhere() {
    let mesh = cluster(3).await;
    let request = || GenerateCodeRequest { model: "comment".to_owned(), ..question("q") };
    is_whole(&stream(&mut mesh.client(), request()).await);
    mesh.engine.remove_adapter("comment");
    for _ in 0..20 {
        is_whole(&stream(&mut mesh.client(), request()).await);
    }
    // A model that no engine has is an error of the caller: there is no retry.
    let before = started(&mesh);
    let unknown = GenerateCodeRequest { model: "gpt".to_owned(), ..question("q") };
    let status = mesh.client().generate_code(unknown).await.unwrap_err();
    assert_eq!((incident(&status).0.as_str(), started(&mesh) - before), ("E4010", 1));
    mesh.finish().await;
}

#[tokio::test]
async fn nothing_is_asked_for_again_once_a_token_has_come() {
    let mesh = cluster(3).await;
    for fault in [Fault::CutAfter(1), Fault::ErrorAfter(1), Fault::EndAfter(1)] {
        let script = Script::tokens(["one ", "two"]).fault(fault);
        mesh.engines().for_each(|engine| engine.script(script.clone()));
        let before = started(&mesh);
        let read = stream(&mut mesh.client(), question("q")).await;
        assert_eq!(read.explanation, "one ");
        assert!(read.failed.unwrap().partial);
        assert_eq!(incident(&read.status.unwrap()).0, "E5007");
        assert_eq!(started(&mesh) - before, 1);
    }
    mesh.finish().await;
}

#[tokio::test]
async fn what_was_overcome_is_remembered_as_such() {
    let mesh = cluster(2).await;
    mesh.engine.script(Fault::status(500));
    let mut calls = 0;
    while mesh.engine.counts().started < 2 {
        is_whole(&stream(&mut mesh.client(), question("q")).await);
        calls += 1;
    }
    let mut errors = ErrorTrackingServiceClient::new(mesh.channel_as(Identity::Mesh));
    let found = within("the incident", async {
        loop {
            let listed = errors.list_incidents(ListIncidentsRequest::default()).await.unwrap();
            let listed = listed.into_inner().incidents;
            if let Some(found) = listed.into_iter().find(|incident| incident.recovered_count == 2) {
                return found;
            }
            tokio::time::sleep(super::POLL_INTERVAL).await;
        }
    })
    .await;
    assert_eq!((found.error_code.as_str(), found.count), ("E5006", 2));
    assert_eq!(found.method, "/hapa.codegen.v1.CodegenService/StreamGenerateCode");
    let shown = errors.get_dashboard(GetDashboardRequest {}).await.unwrap().into_inner();
    assert_eq!((shown.total_errors, shown.top_error_codes[0].code.as_str()), (2, "E5006"));
    let recent = &shown.recent_incidents[0];
    assert_eq!((&recent.incident_id, recent.recovered_count), (&found.incident_id, 2));
    let metrics = mesh.metrics().await;
    let whole = metrics.sum("hapa_errors_total", &["StreamGenerateCode", "E5006"]);
    println!("{calls} calls, 2 failures overcome; E5006 that callers of all tests saw: {whole}");
    assert!(metrics.sum("hapa_engine_retries_total", &["outcome=\"recovered\""]) >= 2.0);
}
