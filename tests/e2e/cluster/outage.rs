//! Auth fails or hangs while the replicas are busy. Cached principals continue for a short time, no valid key
//! is refused as wrong, and no revoked key is accepted.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use hapa_proto::auth::v1::RevokeKeyRequest;
use hapa_proto::codegen::v1::GetCodeHealthRequest;
use hapa_test_harness::{CodegenClient, TestCluster, TestMesh, within};
use secrecy::ExposeSecret as _;
use tokio::time::{sleep, sleep_until, timeout};
use tonic::{Code, Request};

use super::{Done, Load, POLL_INTERVAL, failure, health, say};

/// For at least this time no cached principal is affected.
const CACHED_PERIOD: Duration = Duration::from_secs(3);
/// After this time no call is admitted: 5 s, and a second for a slow machine.
const STALE_AFTER: Duration = Duration::from_secs(6);

/// How auth becomes unavailable.
#[derive(Clone, Copy, PartialEq)]
enum Way {
    Killed,
    Frozen,
}

#[tokio::test(flavor = "multi_thread")]
async fn auth_is_killed_under_load() {
    outage(Way::Killed).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn auth_hangs_under_load() {
    outage(Way::Frozen).await;
}

async fn outage(way: Way) {
    let mut cluster = TestCluster::start().await;
    let known = cluster.create_key(TestMesh::dev_key()).await.key_text;
    let fresh = cluster.create_key(TestMesh::dev_key()).await.key_text;
    // One revoked key is in continuous use; the other one was used before and is idle.
    let (used, resting) = (
        cluster.create_key(TestMesh::dev_key()).await,
        cluster.create_key(TestMesh::dev_key()).await,
    );
    load(&cluster, &resting.key_text, 0).await;
    let (busy, ending) = (load(&cluster, &known, 7).await, load(&cluster, &used.key_text, 1).await);

    match way {
        Way::Killed => cluster.auth.kill().await,
        Way::Frozen => cluster.auth.freeze().await,
    }
    let gone = Instant::now();
    strangers_wait(&cluster, way, &fresh).await;
    // Through another auth process that no replica subscribes to.
    let mut other = cluster.another_auth().await;
    for made in [&used, &resting] {
        let request = RevokeKeyRequest { key_id: made.key.as_ref().unwrap().key_id.clone() };
        within("a revocation", other.keys().revoke_key(request)).await.unwrap();
    }
    other.kill().await;
    // The test depends on elapsed time: no event marks the end of this period.
    sleep_until((gone + STALE_AFTER + CACHED_PERIOD).into()).await;
    strangers_wait(&cluster, way, &fresh).await;

    let back = Instant::now();
    match way {
        Way::Killed => cluster.auth.start_again().await,
        Way::Frozen => cluster.auth.thaw().await,
    }
    for text in [&known, &fresh] {
        for client in cluster.clients(text) {
            passes_again(client).await;
        }
    }
    say(&format!("auth {}: all pass again after {:?}", way.name(), back.elapsed()));
    for made in [&used, &resting] {
        for mut client in cluster.clients(&made.key_text) {
            let status = health(&mut client).await.unwrap_err();
            assert_eq!(failure(&status), ("E4007".to_owned(), Code::Unauthenticated));
        }
    }
    judge(way, &busy.end().await, gone, back);
    let revoked = ending.end().await;
    judge(way, &revoked, gone, back);
    let late = revoked.iter().filter(|call| call.begun > gone + STALE_AFTER);
    assert!(late.into_iter().all(|call| call.failure.is_some()), "a dead key came back");
}

/// Load by `callers` callers on each replica. Both replicas have cached the key.
async fn load(cluster: &TestCluster, text: &str, callers: usize) -> Load<Done> {
    let clients = cluster.clients(text);
    for client in &clients {
        health(&mut client.clone()).await.unwrap();
    }
    Load::begin(clients.iter().flat_map(|client| vec![client.clone(); callers]))
}

impl Way {
    fn name(self) -> &'static str {
        match self {
            Way::Killed => "killed",
            Way::Frozen => "frozen",
        }
    }

    /// How long a replica may wait for an answer that does not come.
    fn patience(self) -> Duration {
        match self {
            Way::Killed => Duration::from_secs(1),
            Way::Frozen => Duration::from_secs(3),
        }
    }
}

/// An unknown key, valid or invented, is refused with a retryable error.
async fn strangers_wait(cluster: &TestCluster, way: Way, fresh: &str) {
    let (_, made_up) = hapa_core::key_format::mint();
    let texts = [fresh, made_up.expose_secret()];
    let mut calls = Vec::new();
    for text in texts {
        calls.extend(cluster.clients(text));
    }
    join_all(calls.into_iter().map(async |mut client| {
        let begun = Instant::now();
        let status = health(&mut client).await.unwrap_err();
        assert_eq!(failure(&status), ("E5003".to_owned(), Code::Unavailable));
        assert!(begun.elapsed() < way.patience(), "{:?}", begun.elapsed());
    }))
    .await;
}

async fn passes_again(mut client: CodegenClient) {
    within("a call to pass", async {
        while let Err(status) = health(&mut client).await {
            assert_eq!(failure(&status), ("E5003".to_owned(), Code::Unavailable));
            sleep(POLL_INTERVAL).await;
        }
    })
    .await;
}

/// Checks the outcomes of calls with a cached key during the outage.
fn judge(way: Way, calls: &[Done], gone: Instant, back: Instant) {
    let away: Vec<_> = calls.iter().filter(|call| call.begun > gone && call.ended < back).collect();
    let unavailable = ("E5003".to_owned(), Code::Unavailable);
    for call in &away {
        let (after, failure) = (call.begun - gone, call.failure.as_ref());
        assert!(failure.is_none_or(|failure| *failure == unavailable), "{after:?}: {failure:?}");
        assert!(after > CACHED_PERIOD || failure.is_none(), "after {after:?}: {failure:?}");
        assert!(after < STALE_AFTER || failure.is_some(), "it passed after {after:?}");
    }
    let passed = away.iter().filter(|call| call.failure.is_none());
    let last = passed.clone().map(|call| call.begun - gone).max().expect("some passed");
    let (passed, refused) = (passed.count(), away.len());
    let name = way.name();
    say(&format!("auth {name}: {passed} of {refused} known calls passed, the last after {last:?}"));
    assert!(refused > passed, "the outage was too short to see");
}

#[tokio::test]
async fn a_caller_beside_one_with_a_short_deadline_gets_an_answer() {
    let cluster = TestCluster::start().await;
    let fresh = cluster.create_key(TestMesh::dev_key()).await.key_text;
    cluster.auth.freeze().await;
    let mut impatient = cluster.replicas[0].client(&fresh);
    let mut patient = impatient.clone();
    let mut request = Request::new(GetCodeHealthRequest {});
    request.set_timeout(Duration::from_millis(200));
    let mut waiting = Box::pin(health(&mut patient));
    {
        let first = impatient.get_code_health(request);
        tokio::select! {
            biased;
            outcome = first => drop(outcome.unwrap_err()),
            // In line behind the other one.
            outcome = async { sleep(10 * POLL_INTERVAL).await; (&mut waiting).await } => {
                panic!("{outcome:?}")
            }
        }
    }
    assert!(
        timeout(20 * POLL_INTERVAL, &mut waiting).await.is_err(),
        "it failed with the other one"
    );
    cluster.auth.thaw().await;
    waiting.await.unwrap();
}

#[tokio::test]
async fn a_hung_auth_costs_an_unknown_key_little_once_it_is_silent() {
    const CALLS: u32 = 20;
    let cluster = TestCluster::start().await;
    cluster.auth.freeze().await;
    let begun = Instant::now();
    for _ in 0..CALLS {
        let (_, made_up) = hapa_core::key_format::mint();
        let mut client = cluster.replicas[0].client(made_up.expose_secret());
        let status = health(&mut client).await.unwrap_err();
        assert_eq!(failure(&status), ("E5003".to_owned(), Code::Unavailable));
    }
    let each = begun.elapsed() / CALLS;
    say(&format!("a hung auth: an unknown key waits {each:?} on average"));
    // Each waited for 2 s before: a machine has to be five times as slow as it should be.
    assert!(each < Duration::from_secs(1), "{each:?}");
    cluster.auth.thaw().await;
    let fresh = cluster.create_key(TestMesh::dev_key()).await.key_text;
    passes_again(cluster.replicas[0].client(&fresh)).await;
}
