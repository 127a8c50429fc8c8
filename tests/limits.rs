//! Limits that replicas share in Redis, and what becomes of them when Redis does not answer.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use hapa_chassis::limit::{Decision, Limiter, Memory, Rate};
use hapa_proto::auth::v1::RateLimit;
use hapa_proto::codegen::v1::{GetCodeHealthRequest, GetCodeHealthResponse};
use hapa_tests::{Client, RedisServer, World, incident, within};
use tokio::task::JoinSet;
use tonic::{Code, Response, Status};

const METHOD: &str = "/hapa.test.v1.TestService/Test";
const HOUR: Duration = Duration::from_hours(1);
const READY: &str = "ready\n";

/// A limiter that reached this Redis.
async fn limiter(redis: &RedisServer) -> Limiter {
    let limiter = Limiter::new(&World::limits(), Some(&redis.url().into())).unwrap();
    within("the limiter to connect", async {
        while limiter.degraded().is_some() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    limiter
}

/// A world that reached this Redis.
async fn world(redis: &RedisServer) -> World {
    let world = World::with(&[&format!("--redis-url={}", redis.url())]).await;
    within("the world to connect", async { while world.page("/readyz").await.1 != READY {} }).await;
    world
}

/// A client that may ask for the health so often in an hour, and its key's id.
async fn limited(world: &World, limit: u32) -> (Client, String) {
    let mut request = World::dev_key();
    let method = "GetCodeHealth".to_owned();
    request.rate_limits = vec![RateLimit { method, limit, window_seconds: 3_600 }];
    let made = world.create_key(request).await;
    (world.client_with(&made.key_text), made.key.unwrap().key_id)
}

async fn health(client: &mut Client) -> Result<Response<GetCodeHealthResponse>, Status> {
    within("a call", client.get_code_health(GetCodeHealthRequest {})).await
}

async fn fallbacks(world: &World) -> f64 {
    world.metrics().await.sum("hapa_limiter_fallbacks_total", &[])
}

/// The outcome of a trial during which Redis decided everything: on a busy machine an answer may
/// come too late. The counter is the whole process's, so other stories cost a trial at most.
async fn decided_by_redis<T>(world: &World, trial: impl AsyncFn() -> T) -> T {
    within("a trial without a fallback", async {
        loop {
            let before = fallbacks(world).await;
            let outcome = Box::pin(trial()).await;
            #[expect(clippy::float_cmp, reason = "a counter that did not move")]
            if fallbacks(world).await == before {
                return outcome;
            }
        }
    })
    .await
}

fn passes(decision: Option<Decision>) -> bool {
    decision.unwrap().retry_after.is_none()
}

/// What Redis keeps of a key's calls for the health.
fn kept_name(key_id: &str) -> String {
    format!("hapa:limit:{{key:{key_id}}}:/hapa.codegen.v1.CodegenService/GetCodeHealth")
}

fn number(reply: &[String]) -> i64 {
    reply[0].parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn two_replicas_pass_exactly_the_limit() {
    let redis = RedisServer::start().await;
    let world = world(&redis).await;
    let replicas = [Arc::new(limiter(&redis).await), Arc::new(limiter(&redis).await)];
    let passed = decided_by_redis(&world, async || {
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

#[tokio::test]
async fn a_peek_tells_what_is_left_and_counts_nothing() {
    let redis = RedisServer::start().await;
    let (world, limiter) = (world(&redis).await, limiter(&redis).await);
    let rate = Rate::new(2, HOUR);
    let (peeks, first, later) = decided_by_redis(&world, async || {
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
async fn a_redis_that_forgot_the_script_is_told_again() {
    let redis = RedisServer::start().await;
    let (world, limiter) = (world(&redis).await, limiter(&redis).await);
    let remaining = decided_by_redis(&world, async || {
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

/// The script with a clock that is told, step by step beside the in-process limiter. The window is a
/// prime number of milliseconds, so that no call is both inside and outside by a rounding.
#[tokio::test]
async fn the_script_decides_as_the_process_does() {
    const WINDOW: u64 = 59_999;
    let redis = RedisServer::start().await;
    let script = include_str!("../services/chassis/src/limit/window.lua");
    let script = script.replace("redis.call('TIME')", "{ ARGV[4], ARGV[5] }");
    let (memory, start) = (Memory::default(), Instant::now());
    let rate = Rate::new(20, Duration::from_millis(WINDOW));
    let (mut at, mut seed, mut refused) = (0u64, 1u64, 0);
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
        let arguments = ["20", "59999", if counts { "1" } else { "0" }, &clock[0], &clock[1]];
        // Redis's own clock stands still beside the told one, so nothing expires meanwhile.
        let there = redis.ask(&[&["EVAL", &script, "1", "key"][..], &arguments].concat()).await;
        let there: Vec<u128> = there.iter().map(|value| value.parse().unwrap()).collect();
        let wait = here.retry_after.map_or(0, |wait| wait.as_millis());
        assert_eq!(there[0], u128::from(here.remaining), "step {step}");
        assert_eq!(there[1], here.reset.as_millis(), "step {step}");
        assert!(there[2].abs_diff(wait) <= 1, "step {step}: {} and {wait}", there[2]);
        assert_eq!(there[2] == 0, here.retry_after.is_none(), "step {step}");
        refused += u32::from(wait > 0);
    }
    assert!((100..1_400).contains(&refused), "{refused} of 1,500 refused");
}

#[tokio::test]
async fn calls_pass_and_are_refused_through_redis_and_what_it_keeps_expires() {
    let redis = RedisServer::start().await;
    let world = world(&redis).await;
    let (remaining, refused, key_id) = decided_by_redis(&world, async || {
        let (mut client, key_id) = limited(&world, 2).await;
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
    assert_eq!(world.page("/readyz").await, (200, READY.to_owned()));

    let kept = redis.ask(&["KEYS", "*"]).await;
    assert!(kept.contains(&kept_name(&key_id)), "{kept:?}");
    for key in kept {
        let left = number(&redis.ask(&["PTTL", &key]).await);
        assert!((1..=2 * 3_600_000).contains(&left), "{key} lives for {left} ms");
    }
    world.end().await;
}

#[tokio::test]
async fn a_frozen_redis_holds_no_call_up_and_is_used_again_when_it_thaws() {
    let redis = RedisServer::start().await;
    let world = world(&redis).await;
    let (mut client, _) = limited(&world, 3).await;
    let before = fallbacks(&world).await;
    redis.freeze().await;
    for remaining in ["2", "1", "0"] {
        let reply = health(&mut client).await.unwrap();
        assert_eq!(reply.metadata().get("ratelimit-remaining").unwrap(), remaining);
    }
    assert_eq!(incident(&health(&mut client).await.unwrap_err()).0, "E4004");
    assert!(fallbacks(&world).await >= before + 4.0);
    let (status, words) = world.page("/readyz").await;
    assert_eq!(status, 200);
    assert!(words.starts_with(READY) && words.contains("Redis does not answer"), "{words}");
    assert!(world.metrics().await.text().contains("\nhapa_redis_up "));

    redis.thaw().await;
    used_again(&world, &redis).await;
    world.end().await;
}

#[tokio::test]
async fn a_redis_that_is_not_there_yet_stops_nobody_and_is_used_when_it_comes() {
    let mut redis = RedisServer::start().await;
    redis.kill().await;
    let world = World::with(&[&format!("--redis-url={}", redis.url())]).await;
    let (mut client, _) = limited(&world, 1).await;
    health(&mut client).await.unwrap();
    assert_eq!(incident(&health(&mut client).await.unwrap_err()).0, "E4004");
    let (status, words) = world.page("/readyz").await;
    assert_eq!(status, 200);
    assert!(words.contains("Redis does not answer"), "{words}");

    redis.start_again().await;
    used_again(&world, &redis).await;
    redis.kill().await;
    let (mut client, _) = limited(&world, 1).await;
    within("a call without Redis", async { while health(&mut client).await.is_ok() {} }).await;
    redis.start_again().await;
    used_again(&world, &redis).await;
    world.end().await;
}

/// Calls until the world is whole, and one of them is counted in Redis.
async fn used_again(world: &World, redis: &RedisServer) {
    within("Redis to be used again", async {
        loop {
            let (mut client, key_id) = limited(world, 1).await;
            let _ = health(&mut client).await;
            let kept = redis.ask(&["KEYS", "*"]).await;
            if kept.contains(&kept_name(&key_id)) && world.page("/readyz").await.1 == READY {
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
    let world = World::with(&[&url, "--rate-limit-enabled=false"]).await;
    let (mut client, _) = limited(&world, 1).await;
    for _ in 0..3 {
        health(&mut client).await.unwrap();
    }
    assert_eq!(world.page("/readyz").await, (200, READY.to_owned()));
    assert_eq!(connections(&redis).await, 1);
    assert_eq!(number(&redis.ask(&["DBSIZE"]).await), 0);
    world.end().await;
}

#[tokio::test]
async fn the_connection_ends_with_its_limiter_and_with_its_mesh() {
    let redis = RedisServer::start().await;
    let mut world = world(&redis).await;
    let limiter = limiter(&redis).await;
    assert_eq!(connections(&redis).await, 3);
    drop(limiter);
    world.begin_shutdown();
    world.ended().await;
    within("the connections to end", async { while connections(&redis).await > 1 {} }).await;
}

/// Those that Redis has, the one that asks included.
async fn connections(redis: &RedisServer) -> usize {
    redis.ask(&["CLIENT", "LIST"]).await[0].lines().filter(|line| !line.is_empty()).count()
}

/// One that no other trial has.
fn subject() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("key:{}", NEXT.fetch_add(1, Ordering::Relaxed))
}
