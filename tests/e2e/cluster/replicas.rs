//! One name for two auth processes: calls go to both, and the failure of one costs no cached principal a call.

use std::sync::{Arc, Mutex};

use hapa_test_harness::{TestCluster, TestMesh, within};

use super::{Load, health, say};

/// So many holders call at once.
const HOLDERS: usize = 8;

#[tokio::test(flavor = "multi_thread")]
async fn no_known_key_loses_a_call_when_one_of_two_auths_is_killed() {
    let cluster = TestCluster::start().await;
    let mut other = cluster.another_auth().await;
    let replica = cluster.replica_of(&[&cluster.auth, &other]).await;
    let mut texts = Vec::new();
    for _ in 0..2 * HOLDERS {
        texts.push(cluster.create_key(TestMesh::dev_key()).await.key_text);
    }
    for text in &texts {
        health(&mut replica.client(text)).await.expect("a key that was just made is good");
    }
    for auth in [&cluster.auth, &other] {
        let asked = auth.metrics().await.sum("hapa_requests_total", &["Authenticate"]);
        assert!(asked >= 4.0, "an auth was asked {asked} of {} times", texts.len());
    }
    let holders = texts.iter().take(HOLDERS).map(|text| Arc::new(Mutex::new(replica.client(text))));
    let load = Load::of(holders);
    load.has_called(200).await;
    other.kill().await;
    load.has_called(1_000).await;
    // Lookups of unknown keys go to the remaining auth process.
    for _ in 0..HOLDERS {
        let text = cluster.create_key(TestMesh::dev_key()).await.key_text;
        let answer = within("an answer", async { health(&mut replica.client(&text)).await }).await;
        answer.expect("one auth is left");
    }
    let done = load.end().await;
    let failed: Vec<_> = done.iter().filter_map(|call| call.failure.as_ref()).collect();
    say(&format!("one of two auths killed: {} calls, {} failed", done.len(), failed.len()));
    assert!(failed.is_empty(), "{failed:?}");
}
