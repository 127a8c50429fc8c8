//! A key gets a new secret while its holders call continuously.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use hapa_engine_sim::Script;
use hapa_proto::auth::v1::RotateKeyRequest;
use hapa_test_harness::{CodegenClient, TestCluster, TestMesh, within};
use tokio::time::sleep;

use super::{Load, Open, POLL_INTERVAL, health, refused, say, shown};

const SECOND: Duration = Duration::from_secs(1);

async fn rotate(cluster: &TestCluster, key_id: &str, overlap_seconds: u32) -> String {
    let overlap_seconds = Some(overlap_seconds);
    let request = RotateKeyRequest { key_id: key_id.to_owned(), overlap_seconds };
    let done = within("a rotation", cluster.auth.keys().rotate_key(request)).await;
    done.unwrap().into_inner().key_text
}

#[tokio::test(flavor = "multi_thread")]
async fn no_call_is_refused_while_callers_move_to_a_new_text() {
    let cluster = TestCluster::start().await;
    let made = cluster.create_key(TestMesh::dev_key()).await;
    let (key_id, old) = (made.key.unwrap().key_id, made.key_text);
    let clients = |text: &str| {
        let clients = cluster.clients(text).into_iter();
        clients.flat_map(|client| vec![client; 4]).map(|client| Arc::new(Mutex::new(client)))
    };
    let holders: Vec<_> = clients(&old).collect();
    let load = Load::of(holders.clone());
    load.has_called(200).await;
    let new = rotate(&cluster, &key_id, 3_600).await;
    let renewed: Vec<Arc<Mutex<CodegenClient>>> = clients(&new).collect();
    for (holder, renewed) in holders.iter().zip(&renewed) {
        let renewed = renewed.lock().unwrap().clone();
        *holder.lock().unwrap() = renewed;
        load.has_called(50).await;
    }
    let old_use = within("the old text's last use", async {
        loop {
            let texts = shown(&cluster, &key_id).await.texts;
            assert_eq!(texts.len(), 2);
            assert!(texts[0].expire_time.is_none() && texts[1].expire_time.is_some(), "{texts:?}");
            if let (Some(_), Some(old_use)) = (texts[0].last_use_time, texts[1].last_use_time) {
                return old_use;
            }
            sleep(10 * POLL_INTERVAL).await;
        }
    })
    .await;
    let done = load.end().await;
    let failed: Vec<_> = done.iter().filter_map(|call| call.failure.as_ref()).collect();
    say(&format!(
        "rotation: {} calls, {} refused; the old text's last use {old_use}",
        done.len(),
        failed.len()
    ));
    assert!(failed.is_empty(), "{failed:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn texts_without_an_overlap_are_refused_everywhere_within_a_second() {
    let cluster = TestCluster::start().await;
    let made = cluster.create_key(TestMesh::dev_key()).await;
    let (key_id, old) = (made.key.unwrap().key_id, made.key_text);
    let new = rotate(&cluster, &key_id, 3_600).await;
    for client in [cluster.clients(&old), cluster.clients(&new)].as_flattened() {
        health(&mut client.clone()).await.unwrap();
    }
    let begin = Instant::now();
    let newest = rotate(&cluster, &key_id, 0).await;
    let ([one, other], [third, fourth]) = (cluster.clients(&old), cluster.clients(&new));
    tokio::join!(refused(one), refused(other), refused(third), refused(fourth));
    let took = begin.elapsed();
    say(&format!(
        "rotation without overlap: both old texts refused on both replicas after {took:?}"
    ));
    assert!(took < SECOND, "{took:?}");
    for client in cluster.clients(&newest) {
        health(&mut client.clone()).await.unwrap();
    }
}

#[tokio::test]
async fn a_stream_ends_with_the_text_that_began_it_and_with_no_other() {
    let cluster = TestCluster::start().await;
    cluster.engine.script(Script::tokens(["a", "b"]).hold(1));
    let made = cluster.create_key(TestMesh::dev_key()).await;
    let key_id = made.key.unwrap().key_id;
    let first = Open::begin(cluster.replicas[0].client(&made.key_text)).await;
    let mut texts = Vec::new();
    for _ in 0..2 {
        texts.push(rotate(&cluster, &key_id, 3_600).await);
    }
    // At most two secrets of a key are valid.
    first.ended().await;
    let second = Open::begin(cluster.replicas[0].client(&texts[0])).await;
    let mut third = Open::begin(cluster.replicas[1].client(&texts[1])).await;

    let before = Instant::now();
    texts.push(rotate(&cluster, &key_id, 2).await);
    let after = Instant::now();
    second.ended().await;
    assert!(third.goes_on().await);
    third.ended().await;
    let (longest, shortest) = (before.elapsed(), after.elapsed());
    say(&format!("a stream of a text with an overlap of 2 s ended after {longest:?}"));
    assert!(longest >= 2 * SECOND && shortest < 3 * SECOND, "{longest:?}, {shortest:?}");
    let mut fourth = Open::begin(cluster.replicas[1].client(&texts[2])).await;
    assert!(fourth.goes_on().await);
}

#[tokio::test]
async fn an_auth_that_is_stopped_writes_down_what_was_used_before() {
    let mut cluster = TestCluster::start().await;
    let made = cluster.create_key(TestMesh::dev_key()).await;
    health(&mut cluster.replicas[0].client(&made.key_text)).await.unwrap();
    cluster.auth.stop().await;
    cluster.auth.start_again().await;
    let key = shown(&cluster, &made.key.unwrap().key_id).await;
    assert!(key.last_use_time.is_some(), "{key:?}");
}
