//! Engines are killed, frozen and restored under load, repeatedly: no state is leaked.

use std::time::Duration;

use hapa_engine_sim::Fault;
use hapa_test_harness::incident;

use super::{answers, ask, cluster, is_quiet, is_whole, recovers};

#[tokio::test]
async fn after_a_run_of_chaos_every_gauge_is_back_and_no_answer_was_spoilt() {
    let mesh = cluster(3).await;
    let (mut whole, mut told, mut slowest) = (0, 0, Duration::ZERO);
    for round in 0..12 {
        let Some(ill) = mesh.engines().nth(round % 3) else { continue };
        match round % 4 {
            0 => ill.stop().await,
            1 => ill.freeze(),
            2 => ill.script(Fault::status(500)),
            _ => ill.script(Fault::CutBeforeHeaders),
        }
        for read in ask(&mesh, 20, 5).await {
            match &read.status {
                None => {
                    is_whole(&read);
                    whole += 1;
                }
                // More failures at once than the retry budget allows: a published code, and no text before it.
                Some(status) => {
                    assert!(read.code.is_empty() && read.explanation.is_empty(), "{read:?}");
                    assert!(matches!(incident(status).0.as_str(), "E5006" | "E5009" | "E5001"));
                    told += 1;
                }
            }
        }
        ill.resume();
        ill.thaw();
        answers(ill);
        // Without this wait, all three engines would be skipped within the same second.
        slowest = slowest.max(recovers(&mesh).await);
    }
    println!("{whole} answers whole, {told} calls told of a failure before their first token");
    assert!(whole >= 200, "{whole} of 240");
    println!("the slowest recovery took {slowest:?}");
    is_quiet(&mesh).await;
    mesh.finish().await;
}
