//! Replies under idempotency keys in a Redis that replicas share, and the behaviour without it.

use hapa_engine_sim::Script;
use hapa_proto::codegen::v1::GenerateCodeResponse;
use hapa_test_harness::{RedisServer, TestMesh, incident, within};
use tokio::task::JoinSet;
use tonic::{Response, Status};

use super::{is_replayed, keyed};
use crate::api::generate::question;

/// Two replicas with one engine, with timeouts that suffice on a busy machine.
async fn pair(redis: &RedisServer) -> [TestMesh; 2] {
    let url = format!("--redis-url={}", redis.url());
    let flags = [&url, "--cache-timeout-seconds=20", "--redis-timeout-seconds=20"];
    let one = TestMesh::start_with(&flags).await;
    let endpoint = format!("--ai-model-endpoint={}", one.engine.url());
    let flags: Vec<_> = flags.into_iter().chain([endpoint.as_str()]).collect();
    let other = TestMesh::start_with(&flags).await;
    [one, other]
}

/// Calls with the mesh token, which identifies the same caller on both replicas.
async fn ask(
    mesh: &TestMesh,
    text: &str,
    key: &str,
) -> Result<Response<GenerateCodeResponse>, Status> {
    let mut client =
        hapa_test_harness::CodegenClient::new(mesh.channel_as(hapa_test_harness::Identity::Mesh));
    within("an answer", client.generate_code(keyed(question(text), key))).await
}

#[tokio::test]
async fn a_reply_of_one_replica_is_repeated_by_another() {
    let redis = RedisServer::start().await;
    let [one, other] = pair(&redis).await;
    let first = ask(&one, "q", "k").await.unwrap();
    let again = ask(&other, "q", "k").await.unwrap();
    assert!(!is_replayed(&first) && is_replayed(&again));
    assert_eq!(first.into_inner(), again.into_inner());
    assert_eq!(one.engine.counts().started, 1);
    assert_eq!(incident(&ask(&other, "r", "k").await.unwrap_err()).0, "E4009");
    one.finish().await;
    other.finish().await;
}

#[tokio::test]
async fn of_equal_requests_at_two_replicas_one_is_asked_and_a_failure_hands_over() {
    let redis = RedisServer::start().await;
    let [one, other] = pair(&redis).await;
    one.engine.once(Script::tokens(["a", "b"]).hold(1));
    let mut asked = JoinSet::new();
    for mesh in [&one, &other, &one, &other] {
        let mut client = hapa_test_harness::CodegenClient::new(
            mesh.channel_as(hapa_test_harness::Identity::Mesh),
        );
        asked.spawn(async move { client.generate_code(keyed(question("q"), "k")).await });
    }
    one.engine.wait_until(|counts| counts.held == 1).await;
    one.engine.release();
    let replies = within("all of them", asked.join_all()).await;
    let replies: Vec<_> = replies.into_iter().map(Result::unwrap).collect();
    assert_eq!(replies.iter().filter(|reply| !is_replayed(reply)).count(), 1);
    assert!(replies.iter().all(|reply| reply.get_ref() == replies[0].get_ref()));
    assert_eq!(one.engine.counts().started, 1);

    // The lease of one that leaves ends at once, not when it would have expired.
    one.engine.once(Script::tokens(["a", "b"]).hold(1));
    let mut client =
        hapa_test_harness::CodegenClient::new(one.channel_as(hapa_test_harness::Identity::Mesh));
    let left = tokio::spawn(async move { client.generate_code(keyed(question("q"), "l")).await });
    one.engine.wait_until(|counts| counts.held == 1).await;
    left.abort();
    assert!(!is_replayed(&ask(&other, "q", "l").await.unwrap()));
    assert_eq!(one.engine.counts().started, 3);
    assert!(redis.ask(&["KEYS", "*claim*"]).await.is_empty(), "no lease is left");
    one.finish().await;
    other.finish().await;
}

#[tokio::test]
async fn what_redis_keeps_shows_neither_question_nor_answer_nor_key_and_ends_after_a_day() {
    let redis = RedisServer::start().await;
    let url = format!("--redis-url={}", redis.url());
    let mesh = TestMesh::start_with(&[&url, "--cache-timeout-seconds=20"]).await;
    mesh.engine.script(Script::text("an-answer-to-be-found"));
    ask(&mesh, "a-question-to-be-found", "a-key-to-be-found").await.unwrap();
    let names = within("Redis to keep it", async {
        loop {
            let names = redis.ask(&["KEYS", "hapa:{idempotency}:*"]).await;
            if names.len() == 4 && !names.iter().any(|name| name.contains("claim")) {
                return names;
            }
        }
    })
    .await;
    for name in &names {
        let kind = redis.ask(&["TYPE", name]).await.remove(0);
        let kept = match kind.as_str() {
            "string" => redis.ask(&["GET", name]).await,
            _ => redis.ask(&["ZRANGE", name, "0", "-1"]).await,
        };
        let shown = format!("{name} {kept:?}");
        assert!(!shown.contains("to-be-found"), "{shown}");
    }
    let is_record = |name: &&String| name.len() > 64 && !name.contains(":of:");
    let record = names.iter().find(is_record).expect("a record");
    let seconds: i64 = redis.ask(&["TTL", record]).await[0].parse().unwrap();
    assert!((86_000..=86_400).contains(&seconds), "{seconds}");
    mesh.finish().await;
}

#[tokio::test]
async fn without_redis_a_reply_says_so_and_is_repeated_by_its_own_replica() {
    let redis = RedisServer::start().await;
    let url = format!("--redis-url={}", redis.url());
    let mesh = TestMesh::start_with(&[&url, "--rate-limit-enabled=false"]).await;
    redis.freeze().await;
    let first = ask(&mesh, "q", "k").await.unwrap();
    assert!(!is_replayed(&first));
    assert!(first.get_ref().warnings[0].starts_with("E5002: "), "{first:?}");
    let again = ask(&mesh, "q", "k").await.unwrap();
    assert!(is_replayed(&again));
    assert_eq!(first.into_inner(), again.into_inner());
    assert_eq!(mesh.engine.counts().started, 1);
    redis.thaw().await;
    mesh.finish().await;
}
