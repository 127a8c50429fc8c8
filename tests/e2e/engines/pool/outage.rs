//! All engines fail at once: they receive few requests, callers receive a retry delay, and the pool recovers
//! with the engines.

use hapa_engine_sim::{Fault, Script};
use hapa_test_harness::incident;
use tonic::Code;
use tonic_types::StatusExt as _;

use super::{ask, cluster, is_quiet, is_whole, recovers, started};
use crate::api::generate::{question, stream};

#[tokio::test]
async fn an_outage_of_all_engines_is_not_made_worse_by_retries() {
    let mesh = cluster(3).await;
    mesh.engines().for_each(|engine| engine.script(Fault::status(500)));
    let before = started(&mesh);
    let reads = ask(&mesh, 500, 10).await;
    let attempts = started(&mesh) - before;
    println!("500 calls on three engines that fail: {attempts} attempts");
    assert!(attempts <= 550, "{attempts}");
    let mut codes = std::collections::BTreeMap::new();
    for read in &reads {
        let status = read.status.as_ref().unwrap();
        assert_eq!(status.code(), Code::Unavailable);
        *codes.entry(incident(status).0).or_insert(0) += 1;
    }
    println!("what they were told: {codes:?}");
    assert!(codes.keys().all(|code| matches!(code.as_str(), "E5006" | "E5009")), "{codes:?}");
    assert!(codes["E5009"] > 250, "{codes:?}");
    mesh.engines().for_each(super::answers);
    println!("all three were used again after {:?}", recovers(&mesh).await);
    ask(&mesh, 20, 5).await.iter().for_each(is_whole);
    is_quiet(&mesh).await;
    mesh.finish().await;
}

#[tokio::test]
async fn engines_that_are_left_alone_are_said_to_be_so_and_tried_again_by_one() {
    let mesh = cluster(1).await;
    mesh.engine.script(Fault::status(500));
    for _ in 0..5 {
        let status = mesh.client().generate_code(question("q")).await.unwrap_err();
        assert_eq!(incident(&status).0, "E5006");
    }
    let status = mesh.client().generate_code(question("q")).await.unwrap_err();
    assert_eq!((incident(&status).0.as_str(), status.code()), ("E5009", Code::Unavailable));
    assert!(!status.get_details_retry_info().unwrap().retry_delay.unwrap().is_zero());
    assert_eq!(mesh.engine.counts().started, 5);

    // The first request after the pause probes the engine. The others receive a retry delay.
    mesh.engine.script(Script::tokens(["a", "b"]).hold(0));
    let mut tries = tokio::task::JoinSet::new();
    for _ in 0..20 {
        let mut client = mesh.client();
        tries.spawn(async move {
            loop {
                let read = stream(&mut client, question("q")).await;
                if read.finished.is_some() {
                    return read;
                }
                assert_eq!(incident(&read.status.unwrap()).0, "E5009");
                tokio::time::sleep(super::POLL_INTERVAL).await;
            }
        });
    }
    mesh.engine.wait_until(|counts| counts.held == 1).await;
    assert_eq!(mesh.engine.counts().started, 6);
    (0..20).for_each(|_| mesh.engine.release());
    let reads = hapa_test_harness::within("all of them", tries.join_all()).await;
    assert!(reads.iter().all(|read| read.explanation == "ab"));
    is_quiet(&mesh).await;
    mesh.finish().await;
}

#[tokio::test]
async fn an_engine_that_is_stuck_is_seen_by_its_counters_and_others_are_asked() {
    let flags = ["--engine-stall-seconds=1", "--first-token-timeout-seconds=60"];
    let mesh = hapa_test_harness::TestMesh::with_engines(2, &flags).await;
    mesh.engine.script(Fault::HangAfterHeaders);
    super::answers(&mesh.others[0]);
    let mut waiting = Vec::new();
    while mesh.engine.in_flight() == 0 {
        let call = mesh.client().stream_generate_code(question("q")).await;
        waiting.push(call.unwrap().into_inner());
    }
    let ill = super::model_becomes(&mesh, "sim-coder", |model| model.replicas_healthy == 1).await;
    assert_eq!((ill.replicas, ill.status.as_str()), (2, "degraded"));
    let before = mesh.engine.counts().started;
    ask(&mesh, 10, 2).await.iter().for_each(is_whole);
    assert_eq!(mesh.engine.counts().started, before);
    drop(waiting);
    is_quiet(&mesh).await;
}
