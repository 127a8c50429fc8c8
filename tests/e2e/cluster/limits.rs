//! Rate limits that two processes share in one Redis.

use std::time::Duration;

use hapa_proto::auth::v1::{CreateKeyRequest, RateLimit};
use hapa_proto::codegen::v1::ListModelsRequest;
use hapa_test_harness::{TestCluster, TestMesh, within};
use tokio::task::JoinSet;
use tokio::time::sleep;
use tonic::Code;

use super::{Load, POLL_INTERVAL, failure, health, say};

/// A key that may ask for the health so often in an hour, and that both replicas know: its id and its text.
async fn limited(cluster: &TestCluster, limit: u32) -> (String, String) {
    let method = "GetCodeHealth".to_owned();
    let rate_limits = vec![RateLimit { method, limit, window_seconds: 3_600 }];
    let made = cluster.create_key(CreateKeyRequest { rate_limits, ..TestMesh::dev_key() }).await;
    for mut client in cluster.clients(&made.key_text) {
        // A machine that is busy may not ask auth in time.
        within("the models", async {
            while client.list_models(ListModelsRequest {}).await.is_err() {}
        })
        .await;
    }
    (made.key.unwrap().key_id, made.key_text)
}

async fn fallbacks(cluster: &TestCluster) -> f64 {
    let name = "hapa_limiter_fallbacks_total";
    let [one, other] = &cluster.replicas;
    one.metrics().await.sum(name, &[]) + other.metrics().await.sum(name, &[])
}

/// How many of so many calls at once pass, half of them to each replica.
async fn at_once(cluster: &TestCluster, text: &str, count: usize) -> u32 {
    let (clients, mut calls) = (cluster.clients(text), JoinSet::new());
    for number in 0..count {
        let mut client = clients[number % 2].clone();
        calls.spawn(async move { health(&mut client).await });
    }
    let mut passed = 0;
    for outcome in within("the calls", calls.join_all()).await {
        match outcome.map_err(|status| failure(&status)) {
            Ok(()) => passed += 1,
            // Auth may be too slow on a busy machine; such a call was not counted.
            Err((code, _)) if code == "E5003" => {}
            Err(reason) => assert_eq!(reason, ("E4004".to_owned(), Code::ResourceExhausted)),
        }
    }
    passed
}

/// Repeats calls until the limit is reached, and checks that no further call passes.
async fn ends_at_the_limit(cluster: &TestCluster, text: &str, mut passed: u32) {
    within("the whole limit", async {
        while passed < 100 {
            passed += at_once(cluster, text, 2).await;
        }
    })
    .await;
    passed += at_once(cluster, text, 100).await;
    assert_eq!(passed, 100);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_three_thousand_calls_at_once_two_processes_pass_exactly_the_hundred() {
    let cluster = TestCluster::start().await;
    let (_, text) = limited(&cluster, 100).await;
    let before = fallbacks(&cluster).await;
    let passed = at_once(&cluster, &text, 3_000).await;
    let alone = fallbacks(&cluster).await - before;
    say(&format!("limit of 100: {passed} of 3,000 calls at once passed, {alone} decided alone"));
    ends_at_the_limit(&cluster, &text, passed).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_stands_still_for_a_moment_lets_no_more_than_the_hundred_through() {
    let cluster = TestCluster::start().await;
    for used_before in [0, 40] {
        let (_, text) = limited(&cluster, 100).await;
        let before = at_once(&cluster, &text, used_before).await;
        let calls = at_once(&cluster, &text, 600);
        let moment = async {
            cluster.redis.freeze().await;
            sleep(Duration::from_millis(300)).await;
            cluster.redis.thaw().await;
        };
        let (passed, ()) = tokio::join!(calls, moment);
        let passed = before + passed + at_once(&cluster, &text, 600).await;
        say(&format!("a moment without Redis: {passed} of 1,200 calls passed"));
        assert!(passed <= 100, "{passed} passed");
        ends_at_the_limit(&cluster, &text, passed).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_redis_fails_no_call_and_counts_again_when_it_thaws() {
    let cluster = TestCluster::start().await;
    let (_, text) = limited(&cluster, 1_000_000).await;
    let clients = cluster.clients(&text);
    for client in &clients {
        health(&mut client.clone()).await.unwrap();
    }
    let before = fallbacks(&cluster).await;
    let load = Load::begin(clients.iter().flat_map(|client| vec![client.clone(); 8]));
    cluster.redis.freeze().await;
    for replica in &cluster.replicas {
        within("the probe to say so", async {
            while !replica.page("/readyz").await.contains("Redis does not answer") {
                sleep(POLL_INTERVAL).await;
            }
        })
        .await;
    }
    within("calls to be counted alone", async {
        while fallbacks(&cluster).await < before + 500.0 {
            sleep(POLL_INTERVAL).await;
        }
    })
    .await;
    cluster.redis.thaw().await;
    for replica in 0..2 {
        within("Redis to count again", async { while !counted(&cluster, replica).await {} }).await;
    }
    let done = load.end().await;
    let failed = done.iter().filter_map(|call| call.failure.as_ref()).collect::<Vec<_>>();
    say(&format!("a frozen Redis: {} calls, {} failed", done.len(), failed.len()));
    assert!(failed.is_empty(), "{failed:?}");
}

/// Whether Redis has counted a call of a new key, and `/readyz` of the replica is ready.
async fn counted(cluster: &TestCluster, replica: usize) -> bool {
    let (key_id, text) = limited(cluster, 1_000).await;
    health(&mut cluster.replicas[replica].client(&text)).await.unwrap();
    let kept = cluster.redis.ask(&["KEYS", &format!("*{key_id}*GetCodeHealth")]).await;
    kept.len() == 1 && cluster.replicas[replica].page("/readyz").await == "ready\n"
}
