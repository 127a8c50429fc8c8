//! Answers in a Redis that replicas share. A Redis that does not answer costs only a warning.

use hapa_engine_sim::Script;
use hapa_proto::errors::v1::error_tracking_service_client::ErrorTrackingServiceClient;
use hapa_proto::errors::v1::{GetIncidentRequest, ListIncidentsRequest};
use hapa_test_harness::{Identity, RedisServer, TestMesh, within};

use super::clearing::{cache, clear, stats};
use super::{ANSWER, ON, ask, fresh};
use crate::api::generate::{question, stream};

/// Two replicas, with timeouts that suffice on a busy machine.
async fn pair(redis: &RedisServer) -> [TestMesh; 2] {
    let url = format!("--redis-url={}", redis.url());
    let flags = [ON, &url, "--cache-timeout-seconds=20", "--redis-timeout-seconds=20"];
    let one = TestMesh::start_with(&flags).await;
    let endpoint = format!("--ai-model-endpoint={}", one.engine.url());
    let flags: Vec<_> = flags.into_iter().chain([endpoint.as_str()]).collect();
    let other = TestMesh::start_with(&flags).await;
    [one, other]
}

async fn stored(redis: &RedisServer, count: usize) {
    within("Redis to keep it", async {
        while redis.ask(&["ZRANGE", "hapa:{cache}:index", "0", "-1"]).await.len() != count {}
    })
    .await;
}

#[tokio::test]
async fn replicas_share_answers_and_a_clearing_on_one_is_one_on_all() {
    let redis = RedisServer::start().await;
    let [one, other] = pair(&redis).await;
    one.engine.script(Script::text(ANSWER).usage(11, 7));
    assert!(!ask(&mut one.client(), "인사").await.unwrap().cached);
    // The answer is cached even before Redis has stored it.
    assert!(ask(&mut one.client(), "인사").await.unwrap().cached);
    stored(&redis, 1).await;
    let read = stream(&mut other.client(), question("인사")).await;
    assert!(read.started.unwrap().cached);
    assert_eq!(
        (read.code.as_str(), read.explanation.as_str()),
        ("print('안녕')\n", "먼저 보기입니다.\n끝.")
    );
    assert_eq!(read.finished.unwrap().usage.unwrap().total_tokens, 18);
    assert_eq!(one.engine.counts().started, 1);
    let [answers, _] = stats(&mut cache(&other)).await;
    assert_eq!(
        (answers.backend.as_str(), answers.entries, answers.bytes),
        ("redis", Some(1), None)
    );
    let cleared = cache(&other).clear_cache(clear("code_generation")).await.unwrap().into_inner();
    assert_eq!((cleared.cleared[0].entries, cleared.cleared[0].scope.as_str()), (1, "mesh"));
    assert!(!ask(&mut one.client(), "인사").await.unwrap().cached);
    assert_eq!(one.engine.counts().started, 2);
}

#[tokio::test]
async fn redis_keeps_no_more_than_it_should_and_nothing_that_can_be_read_in_a_name() {
    let redis = RedisServer::start().await;
    let url = format!("--redis-url={}", redis.url());
    let flags = [ON, &url, "--cache-timeout-seconds=20", "--max-cache-size=3"];
    let mesh = TestMesh::start_with(&flags).await;
    for number in 0..5 {
        ask(&mut mesh.client(), &format!("canary-{number}")).await.unwrap();
        stored(&redis, 3.min(number + 1)).await;
        // The index has a resolution of 1 ms.
        let begun = redis.ask(&["TIME"]).await;
        let millisecond = |time: &[String]| format!("{}{:0>6}", time[0], time[1])[..13].to_owned();
        while millisecond(&redis.ask(&["TIME"]).await) == millisecond(&begun) {}
    }
    within("the oldest to go", async {
        while stats(&mut cache(&mesh)).await[0].evictions < 2.0 {}
    })
    .await;
    let names = redis.ask(&["KEYS", "*cache*"]).await;
    assert_eq!(names.len(), 5, "three answers, the index and the era: {names:?}");
    assert!(!names.iter().any(|name| name.contains("canary") || name.contains("tester")));
    for name in names.iter().filter(|name| name.len() > 64) {
        let stored = redis.ask(&["GET", name]).await.remove(0);
        assert!(
            stored.contains("def greet") && !stored.contains("canary"),
            "answers, no questions"
        );
    }
    assert!(!ask(&mut mesh.client(), "canary-0").await.unwrap().cached);
    // An invalid entry counts as a miss.
    let entry = names.iter().find(|name| name.len() > 64).unwrap();
    let era = redis.ask(&["GET", "hapa:{cache}:era"]).await.remove(0);
    for junk in
        ["junk".to_owned(), era.clone(), format!("{era}\u{1}\u{fffd}"), format!("{era}\u{2}x")]
    {
        redis.ask(&["SET", entry, &junk]).await;
        for number in 0..5 {
            ask(&mut mesh.client(), &format!("canary-{number}")).await.unwrap();
        }
    }
}

#[tokio::test]
async fn a_redis_that_lost_the_era_forgets_rather_than_remembers_what_was_cleared() {
    let redis = RedisServer::start().await;
    let [one, other] = pair(&redis).await;
    ask(&mut one.client(), "q").await.unwrap();
    stored(&redis, 1).await;
    redis.ask(&["DEL", "hapa:{cache}:era"]).await;
    assert!(!ask(&mut other.client(), "q").await.unwrap().cached);
}

#[tokio::test]
async fn a_frozen_redis_costs_a_warning_and_no_answer() {
    let redis = RedisServer::start().await;
    let url = format!("--redis-url={}", redis.url());
    let mesh = TestMesh::start_with(&[ON, &url, "--rate-limit-enabled=false"]).await;
    let mut client = mesh.client();
    within("the cache to work", async { while !ask(&mut client, "q").await.unwrap().cached {} })
        .await;
    redis.freeze().await;
    let warned = within("a warning", async {
        loop {
            let reply = ask(&mut client, "q").await.unwrap();
            assert_eq!(reply.status, "success");
            if !reply.warnings.is_empty() {
                return reply;
            }
        }
    })
    .await;
    assert!(warned.warnings[0].starts_with("E5002: "), "{warned:?}");
    let before = mesh.engine.counts().started;
    for number in 0..20 {
        let read = stream(&mut client, question(&format!("other {number}"))).await;
        let finished = read.finished.expect("it goes on");
        assert!(finished.warnings[0].starts_with("E5002: "), "{finished:?}");
    }
    assert!(stream(&mut client, fresh("q")).await.finished.is_some());
    assert_eq!(mesh.engine.counts().started, before + 21);
    let status = cache(&mesh).clear_cache(clear("all")).await.unwrap_err();
    assert_eq!(hapa_test_harness::incident(&status).0, "E5003");
    assert_eq!(stats(&mut cache(&mesh)).await[0].entries, None);
    assert!(mesh.metrics().await.sum("hapa_cache_errors_total", &[]) >= 20.0);
    overcome(&mesh).await;
    redis.thaw().await;
    within("answers to be known again", async {
        while !ask(&mut client, "q").await.unwrap().cached {}
    })
    .await;
    assert_eq!(ask(&mut client, "q").await.unwrap().warnings, [""; 0]);
    mesh.finish().await;
}

/// Waits until the errors service has an occurrence that affected no caller.
async fn overcome(mesh: &TestMesh) {
    let mut errors = ErrorTrackingServiceClient::new(mesh.channel_as(Identity::Mesh));
    within("the errors service to be told", async {
        loop {
            let error_code = "E5002".to_owned();
            let request = ListIncidentsRequest { error_code, ..ListIncidentsRequest::default() };
            let found = errors.list_incidents(request).await.unwrap().into_inner().incidents;
            let Some(incident) = found.into_iter().next() else { continue };
            assert_eq!(incident.recovered_count, incident.count);
            let request = GetIncidentRequest { incident_id: incident.incident_id };
            let shown = errors.get_incident(request).await.unwrap().into_inner().occurrences;
            return assert!(shown.iter().all(|one| one.recovered), "{shown:?}");
        }
    })
    .await;
}
