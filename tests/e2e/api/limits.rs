//! Rate limits that replicas share in Redis, and the behaviour if Redis does not answer.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use hapa_proto::auth::v1::RateLimit;
use hapa_proto::codegen::v1::{GetCodeHealthRequest, GetCodeHealthResponse};
use hapa_server::rate_limit::{Decision, Limiter, MemoryLimiter, Rate};
use hapa_test_harness::{CodegenClient, RedisServer, TestMesh, incident, within};
use tokio::task::JoinSet;
use tonic::{Code, Response, Status};

const METHOD: &str = "/hapa.test.v1.TestService/Test";
const HOUR: Duration = Duration::from_hours(1);
const READY: &str = "ready\n";

/// A limiter that reached this Redis.
async fn limiter(redis: &RedisServer) -> Limiter {
    let limiter = Limiter::new(&TestMesh::limits(), Some(&redis.url().into())).unwrap();
    within("the limiter to connect", async {
        while limiter.degraded().is_some() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    limiter
}

/// A mesh that reached this Redis.
async fn mesh(redis: &RedisServer) -> TestMesh {
    let mesh = TestMesh::start_with(&[&format!("--redis-url={}", redis.url())]).await;
    within("the mesh to connect", async { while mesh.page("/readyz").await.1 != READY {} }).await;
    mesh
}

/// A client that may call GetCodeHealth `limit` times per hour, and the id of its key.
async fn limited(mesh: &TestMesh, limit: u32) -> (CodegenClient, String) {
    let mut request = TestMesh::dev_key();
    let method = "GetCodeHealth".to_owned();
    request.rate_limits = vec![RateLimit { method, limit, window_seconds: 3_600 }];
    let made = mesh.create_key(request).await;
    (mesh.client_with(&made.key_text), made.key.unwrap().key_id)
}

async fn health(client: &mut CodegenClient) -> Result<Response<GetCodeHealthResponse>, Status> {
    within("a call", client.get_code_health(GetCodeHealthRequest {})).await
}

async fn fallbacks(mesh: &TestMesh) -> f64 {
    mesh.metrics().await.sum("hapa_limiter_fallbacks_total", &[])
}

/// The outcome of a trial during which Redis made every decision. On a busy machine a reply may be late. The
/// counter belongs to the process, so that other tests cost a trial at most.
async fn decided_by_redis<T>(mesh: &TestMesh, trial: impl AsyncFn() -> T) -> T {
    within("a trial without a fallback", async {
        loop {
            let before = fallbacks(mesh).await;
            let outcome = Box::pin(trial()).await;
            #[expect(clippy::float_cmp, reason = "a counter that did not move")]
            if fallbacks(mesh).await == before {
                return outcome;
            }
        }
    })
    .await
}

fn passes(decision: Option<Decision>) -> bool {
    decision.unwrap().retry_after.is_none()
}

/// The Redis key that counts an API key's calls of GetCodeHealth.
fn kept_name(key_id: &str) -> String {
    format!("hapa:limit:{{key:{key_id}}}:/hapa.codegen.v1.CodegenService/GetCodeHealth")
}

fn number(reply: &[String]) -> i64 {
    reply[0].parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn two_replicas_pass_exactly_the_limit() {
    let redis = RedisServer::start().await;
    let mesh = mesh(&redis).await;
    let replicas = [Arc::new(limiter(&redis).await), Arc::new(limiter(&redis).await)];
    let passed = decided_by_redis(&mesh, async || {
        let subject = subject();
        let mut callers = JoinSet::new();
        for caller in 0..20 {
            let (replica, subject) = (Arc::clone(&replicas[caller % 2]), subject.clone());
            callers.spawn(async move {
                let mut passed = 0;
                for _ in 0..50 {
                    let rate = Rate::new(100, HOUR);
                    passed += i32::from(passes(replica.decide(&subject, METHOD, rate).await));
                }
                passed
            });
        }
        callers.join_all().await.into_iter().sum::<i32>()
    })
    .await;
    assert_eq!(passed, 100);
}

/// Two limiters that both count two replicas.
async fn two(redis: &RedisServer) -> [Arc<Limiter>; 2] {
    let replicas = [Arc::new(limiter(redis).await), Arc::new(limiter(redis).await)];
    within("each to know the other", async {
        while replicas.iter().any(|replica| replica.replicas(METHOD) != Some(2)) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    replicas
}

/// Starts concurrent calls, half of them on each replica; each result is whether the call passed.
fn at_once(replicas: &[Arc<Limiter>; 2], subject: &str, calls: usize) -> JoinSet<bool> {
    let mut set = JoinSet::new();
    for call in 0..calls {
        let (replica, subject) = (Arc::clone(&replicas[call % 2]), subject.to_owned());
        set.spawn(
            async move { passes(replica.decide(&subject, METHOD, Rate::new(100, HOUR)).await) },
        );
    }
    set
}

async fn count(calls: JoinSet<bool>) -> usize {
    within("the calls", calls.join_all()).await.into_iter().filter(|passed| *passed).count()
}

/// Repeats calls until the limit is reached, and checks that no further call passes.
async fn ends_at_the_limit(replicas: &[Arc<Limiter>; 2], subject: &str, mut passed: usize) {
    within("the whole limit", async {
        while passed < 100 {
            passed += count(at_once(replicas, subject, 2)).await;
        }
    })
    .await;
    passed += count(at_once(replicas, subject, 200)).await;
    assert_eq!(passed, 100);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_three_thousand_calls_at_once_two_replicas_pass_exactly_the_limit() {
    let redis = RedisServer::start().await;
    let replicas = two(&redis).await;
    for _ in 0..3 {
        let subject = subject();
        let passed = count(at_once(&replicas, &subject, 3_000)).await;
        assert!(passed <= 100, "{passed} passed");
        ends_at_the_limit(&replicas, &subject, passed).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_stands_still_for_a_moment_lets_no_more_than_the_limit_through() {
    let redis = RedisServer::start().await;
    let replicas = two(&redis).await;
    // Before the first call, while calls are on their way, and when half of the limit is used.
    for before in [0, 1_000, 50] {
        let subject = subject();
        let mut begun = at_once(&replicas, &subject, before);
        let mut passed = 0;
        if before == 50 {
            passed += count(std::mem::take(&mut begun)).await;
        }
        redis.freeze().await;
        let during = at_once(&replicas, &subject, 600);
        tokio::time::sleep(Duration::from_millis(300)).await;
        redis.thaw().await;
        passed += count(during).await + count(begun).await;
        passed += count(at_once(&replicas, &subject, 600)).await;
        assert!(passed <= 100, "{passed} passed, {before} calls before");
        ends_at_the_limit(&replicas, &subject, passed).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_redis_each_replica_grants_its_share_which_counts_when_redis_is_back() {
    let redis = RedisServer::start().await;
    let replicas = two(&redis).await;
    let subjects = [subject(), subject()];
    // One replica alone uses a part of the second subject's limit before the outage.
    for _ in 0..30 {
        let used = replicas[0].decide(&subjects[1], METHOD, Rate::new(100, HOUR)).await;
        assert!(passes(used));
    }
    redis.freeze().await;
    let mut passed = [0, 30];
    for (subject, passed) in subjects.iter().zip(&mut passed) {
        *passed += count(at_once(&replicas, subject, 400)).await;
    }
    assert_eq!(passed[0], 100, "50 each");
    // The other replica did not receive the 30 calls: it is at its half, and the first one is at 50 of its
    // own.
    assert_eq!(passed[1], 100);
    assert!(replicas.iter().all(|replica| replica.degraded().is_some()));
    redis.thaw().await;
    within("Redis to be used again", async {
        while replicas.iter().any(|replica| replica.degraded().is_some()) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    for (subject, passed) in subjects.iter().zip(passed) {
        ends_at_the_limit(&replicas, subject, passed).await;
        let kept = redis.ask(&["GET", &format!("hapa:limit:{{{subject}}}:{METHOD}")]).await;
        assert_eq!(kept[0].split(' ').nth(1).unwrap(), "100", "{kept:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lone_caller_gets_the_whole_limit_through_every_outage_and_not_one_call_more() {
    let mut redis = RedisServer::start().await;
    let limiter = limiter(&redis).await;
    let (subject, rate) = (subject(), Rate::new(100, HOUR));
    for call in 0..100 {
        match call {
            10 | 60 => redis.freeze().await,
            20 | 70 => redis.thaw().await,
            // Redis loses its data, and the replica reports its granted calls again.
            40 => redis.kill().await,
            50 => redis.start_again().await,
            80 => drop(redis.ask(&["CLIENT", "KILL", "TYPE", "normal"]).await),
            _ => {}
        }
        assert!(passes(limiter.decide(&subject, METHOD, rate).await), "call {call} of 100");
    }
    for _ in 0..10 {
        assert!(!passes(limiter.decide(&subject, METHOD, rate).await));
    }
    within("Redis to know of all", async {
        loop {
            let kept = redis.ask(&["GET", &format!("hapa:limit:{{{subject}}}:{METHOD}")]).await;
            if kept[0].split(' ').nth(1) == Some("100") {
                return;
            }
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_redis_is_not_away() {
    let redis = RedisServer::start().await;
    let replicas = two(&redis).await;
    let subject = subject();
    let mut passed = 0;
    for _ in 0..10 {
        redis.ask(&["CLIENT", "PAUSE", "100", "ALL"]).await;
        passed += count(at_once(&replicas, &subject, 40)).await;
    }
    ends_at_the_limit(&replicas, &subject, passed).await;
    let subject = format!("key:{}", "x".repeat(8));
    redis.ask(&["CLIENT", "PAUSE", "100", "ALL"]).await;
    let first = replicas[0].decide(&subject, METHOD, Rate::new(3, HOUR)).await;
    assert_eq!(first.unwrap().remaining, 2);
    assert!(replicas.iter().all(|replica| replica.degraded().is_none()));
}

/// A replica's report to the script: start of the window, granted calls, whether disconnected, for how long.
type ReplicaState = [u64; 4];

/// One request of a replica at this time: sequence, wanted and report; passed, remaining, opened, granted.
async fn request(
    redis: &RedisServer,
    (replica, sequence, wanted, at): (&str, u64, u64, u64),
    report: ReplicaState,
) -> Vec<u64> {
    let script = include_str!("../../../services/chassis/server/src/rate_limit/window.lua");
    let script = script.replace("redis.call('TIME')", "{ ARGV[10], ARGV[11] }");
    let mut words: Vec<String> =
        ["EVAL", &script, "2", "w", "r", "10", "60000"].map(str::to_owned).into();
    words.extend([wanted.to_string(), replica.to_owned(), sequence.to_string()]);
    words.extend(report.iter().map(u64::to_string));
    words.extend([(at / 1_000).to_string(), (at % 1_000 * 1_000).to_string()]);
    let words: Vec<_> = words.iter().map(String::as_str).collect();
    let reply = redis.ask(&words).await;
    let reply: Vec<u64> = reply.iter().map(|value| value.parse().unwrap()).collect();
    match reply[..] {
        [passed, remaining, _, _, opened, granted] => vec![passed, remaining, opened, granted],
        _ => reply,
    }
}

#[tokio::test]
async fn a_report_counts_once_however_often_and_in_which_order_it_arrives() {
    const NOW: u64 = 1_000_000;
    let redis = RedisServer::start().await;
    let ask = async |words: (&str, u64, u64, u64), report| request(&redis, words, report).await;
    assert_eq!(ask(("a", 1, 3, NOW), [0; 4]).await, [3, 7, NOW, 3]);
    // The reply was lost: the replica decided alone, and granted one.
    assert_eq!(ask(("a", 2, 0, NOW + 5), [0, 1, 1, 5]).await, [0, 9, NOW, 1]);
    assert_eq!(ask(("a", 2, 0, NOW + 6), [0, 1, 1, 6]).await, [0, 9, NOW, 1]);
    // A request with an outdated sequence number changes nothing.
    assert!(ask(("a", 1, 3, NOW + 7), [0; 4]).await.is_empty());
    // Another replica reports calls granted while disconnected, and requests more than remain.
    assert_eq!(ask(("b", 3, 9, NOW + 8), [0, 4, 1, 8]).await, [5, 0, NOW, 9]);
    // It granted only two of them.
    assert_eq!(ask(("b", 4, 0, NOW + 9), [NOW, 6, 1, 9]).await, [0, 3, NOW, 6]);
    assert_eq!(ask(("a", 5, 9, NOW + 10), [NOW, 1, 0, 10]).await, [3, 0, NOW, 4]);
    // A report about the window before counts in the window before.
    let next = NOW + 60_000;
    assert_eq!(ask(("b", 6, 1, next), [NOW, 5, 1, 60_000]).await, [1, 0, next, 1]);
    // After Redis lost its data, each replica reports what it has granted.
    redis.ask(&["FLUSHALL"]).await;
    assert_eq!(ask(("b", 7, 0, next + 10), [next, 1, 0, 10]).await, [0, 9, next, 1]);
    assert_eq!(ask(("a", 8, 1, next + 10), [next, 2, 1, 10]).await, [1, 6, next, 3]);
    // What ended two windows ago does not count at all.
    assert_eq!(
        ask(("a", 9, 1, next + 180_000), [next, 3, 1, 180_000]).await,
        [1, 9, next + 180_000, 1]
    );
}

#[tokio::test]
async fn a_peek_returns_the_remaining_calls_and_counts_nothing() {
    let redis = RedisServer::start().await;
    let (mesh, limiter) = (mesh(&redis).await, limiter(&redis).await);
    let rate = Rate::new(2, HOUR);
    let (peeks, first, later) = decided_by_redis(&mesh, async || {
        let subject = subject();
        let peek = async || limiter.peek(&subject, METHOD, rate).await.unwrap();
        let decide = async || limiter.decide(&subject, METHOD, rate).await.unwrap();
        let peeks = [peek().await, peek().await, peek().await].map(|peek| peek.remaining);
        let first = [decide().await, decide().await].map(|decision| decision.remaining);
        (peeks, first, [decide().await, peek().await].map(|decision| decision.retry_after))
    })
    .await;
    assert_eq!((peeks, first), ([2; 3], [1, 0]));
    assert!(later.iter().all(Option::is_some), "{later:?}");
    assert_eq!(limiter.decide("a", METHOD, Rate::new(0, HOUR)).await, None);
    assert_eq!(limiter.peek("a", METHOD, Rate::new(0, HOUR)).await, None);
}

#[tokio::test]
async fn a_redis_without_the_script_receives_it_again() {
    let redis = RedisServer::start().await;
    let (mesh, limiter) = (mesh(&redis).await, limiter(&redis).await);
    let remaining = decided_by_redis(&mesh, async || {
        let subject = subject();
        let mut remaining = Vec::new();
        for _ in 0..3 {
            let decision = limiter.decide(&subject, METHOD, Rate::new(3, HOUR)).await;
            remaining.push(decision.unwrap().remaining);
            redis.ask(&["SCRIPT", "FLUSH"]).await;
        }
        remaining
    })
    .await;
    assert_eq!(remaining, [2, 1, 0]);
}

/// The script with a controlled clock, step by step beside the in-process limiter. The window is a prime
/// number of milliseconds, so that no call is both inside and outside by a rounding.
#[tokio::test]
async fn the_script_decides_as_the_process_does() {
    const WINDOW: u64 = 59_999;
    let redis = RedisServer::start().await;
    let script = include_str!("../../../services/chassis/server/src/rate_limit/window.lua");
    let script = script.replace("redis.call('TIME')", "{ ARGV[10], ARGV[11] }");
    let (memory, start) = (MemoryLimiter::default(), Instant::now());
    let rate = Rate::new(20, Duration::from_millis(WINDOW));
    let (mut at, mut seed, mut refused) = (0u64, 1u64, 0);
    // The last reply to the replica: the start of the window, and the calls that it granted in it.
    let mut told = ["0".to_owned(), "0".to_owned()];
    for step in 0..1_500u64 {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        at += (seed >> 33) % if step % 100 == 99 { 3 * WINDOW } else { 5_000 };
        let (counts, now) = (step % 7 != 0, start + Duration::from_millis(at));
        let here = if counts {
            memory.decide("a", METHOD, rate, now)
        } else {
            memory.peek("a", METHOD, rate, now)
        };
        let clock = [(1_000 + at / 1_000).to_string(), (at % 1_000 * 1_000).to_string()];
        let (wanted, sequence) = (if counts { "1" } else { "0" }, (step + 1).to_string());
        let age = (1_000_000 + at).saturating_sub(told[0].parse().unwrap()).to_string();
        let asked = ["20", "59999", wanted, "a", &sequence, &told[0], &told[1], "0", &age];
        let arguments = [&asked[..], &[&clock[0], &clock[1]]].concat();
        // Redis's own clock does not advance with the controlled one, so nothing expires.
        let keys = ["EVAL", &script, "2", "key", "replicas"];
        let there = redis.ask(&[&keys[..], &arguments].concat()).await;
        told = [there[4].clone(), there[5].clone()];
        let there: Vec<u128> = there.iter().map(|value| value.parse().unwrap()).collect();
        let wait = here.retry_after.map_or(0, |wait| wait.as_millis());
        let passes = here.retry_after.is_none();
        assert_eq!(there[0], u128::from(counts && passes), "step {step}");
        assert_eq!(there[1], u128::from(here.remaining), "step {step}");
        assert_eq!(there[2], here.reset.as_millis(), "step {step}");
        if !passes {
            assert!(there[3].abs_diff(wait) <= 1, "step {step}: {} and {wait}", there[3]);
        }
        refused += u32::from(wait > 0);
    }
    assert!((100..1_400).contains(&refused), "{refused} of 1,500 refused");
}

#[tokio::test]
async fn calls_pass_and_are_refused_through_redis_and_what_it_keeps_expires() {
    let redis = RedisServer::start().await;
    let mesh = mesh(&redis).await;
    let (remaining, refused, key_id) = decided_by_redis(&mesh, async || {
        let (mut client, key_id) = limited(&mesh, 2).await;
        let mut remaining = Vec::new();
        for _ in 0..2 {
            let reply = health(&mut client).await.unwrap();
            let header = |name| reply.metadata().get(name).unwrap().to_str().unwrap().to_owned();
            assert_eq!(header("ratelimit-limit"), "2");
            remaining.push(header("ratelimit-remaining"));
        }
        (remaining, health(&mut client).await.err(), key_id)
    })
    .await;
    assert_eq!(remaining, ["1", "0"]);
    let refused = refused.expect("the third call is refused");
    assert_eq!((incident(&refused).0.as_str(), refused.code()), ("E4004", Code::ResourceExhausted));
    for header in ["retry-after", "ratelimit-limit", "ratelimit-remaining", "ratelimit-reset"] {
        assert!(refused.metadata().contains_key(header), "{header} is missing");
    }
    assert_eq!(mesh.page("/readyz").await, (200, READY.to_owned()));

    let kept = redis.ask(&["KEYS", "*"]).await;
    assert!(kept.contains(&kept_name(&key_id)), "{kept:?}");
    for key in kept {
        let left = number(&redis.ask(&["PTTL", &key]).await);
        assert!((1..=2 * 3_600_000).contains(&left), "{key} lives for {left} ms");
    }
    mesh.finish().await;
}

#[tokio::test]
async fn a_frozen_redis_holds_no_call_up_and_is_used_again_when_it_thaws() {
    let redis = RedisServer::start().await;
    let mesh = mesh(&redis).await;
    let (mut client, _) = limited(&mesh, 3).await;
    let before = fallbacks(&mesh).await;
    redis.freeze().await;
    for remaining in ["2", "1", "0"] {
        let reply = health(&mut client).await.unwrap();
        assert_eq!(reply.metadata().get("ratelimit-remaining").unwrap(), remaining);
    }
    assert_eq!(incident(&health(&mut client).await.unwrap_err()).0, "E4004");
    assert!(fallbacks(&mesh).await >= before + 4.0);
    let (status, words) = mesh.page("/readyz").await;
    assert_eq!(status, 200);
    assert!(words.starts_with(READY) && words.contains("Redis does not answer"), "{words}");
    assert!(mesh.metrics().await.text().contains("\nhapa_redis_up "));

    redis.thaw().await;
    used_again(&mesh, &redis).await;
    mesh.finish().await;
}

#[tokio::test]
async fn a_redis_that_starts_late_blocks_no_start_and_is_used_then() {
    let mut redis = RedisServer::start().await;
    redis.kill().await;
    let mesh = TestMesh::start_with(&[&format!("--redis-url={}", redis.url())]).await;
    let (mut client, _) = limited(&mesh, 1).await;
    health(&mut client).await.unwrap();
    assert_eq!(incident(&health(&mut client).await.unwrap_err()).0, "E4004");
    let (status, words) = mesh.page("/readyz").await;
    assert_eq!(status, 200);
    assert!(words.contains("Redis does not answer"), "{words}");

    redis.start_again().await;
    used_again(&mesh, &redis).await;
    redis.kill().await;
    let (mut client, _) = limited(&mesh, 1).await;
    within("a call without Redis", async { while health(&mut client).await.is_ok() {} }).await;
    redis.start_again().await;
    used_again(&mesh, &redis).await;
    mesh.finish().await;
}

/// Repeats calls until Redis has counted one and `/readyz` is ready.
async fn used_again(mesh: &TestMesh, redis: &RedisServer) {
    within("Redis to be used again", async {
        loop {
            let (mut client, key_id) = limited(mesh, 1).await;
            let _ = health(&mut client).await;
            let kept = redis.ask(&["KEYS", "*"]).await;
            if kept.contains(&kept_name(&key_id)) && mesh.page("/readyz").await.1 == READY {
                return;
            }
        }
    })
    .await;
}

#[tokio::test]
async fn limits_that_are_off_leave_redis_alone() {
    let redis = RedisServer::start().await;
    let url = format!("--redis-url={}", redis.url());
    let mesh = TestMesh::start_with(&[&url, "--rate-limit-enabled=false"]).await;
    let (mut client, _) = limited(&mesh, 1).await;
    for _ in 0..3 {
        health(&mut client).await.unwrap();
    }
    assert_eq!(mesh.page("/readyz").await, (200, READY.to_owned()));
    // The connection for idempotency records, and the one of the query.
    assert_eq!(connections(&redis).await, 2);
    assert_eq!(number(&redis.ask(&["DBSIZE"]).await), 0);
    mesh.finish().await;
}

#[tokio::test]
async fn the_connection_ends_with_its_limiter_and_with_its_mesh() {
    let redis = RedisServer::start().await;
    let mut mesh = mesh(&redis).await;
    let limiter = limiter(&redis).await;
    assert_eq!(connections(&redis).await, 4);
    drop(limiter);
    mesh.begin_shutdown();
    mesh.wait_until_stopped().await;
    within("the connections to end", async { while connections(&redis).await > 1 {} }).await;
}

/// The number of connections to Redis, including the one of this query.
async fn connections(redis: &RedisServer) -> usize {
    redis.ask(&["CLIENT", "LIST"]).await[0].lines().filter(|line| !line.is_empty()).count()
}

/// A subject that no other trial uses.
fn subject() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("key:{}", NEXT.fetch_add(1, Ordering::Relaxed))
}
