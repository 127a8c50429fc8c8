//! Token budgets under races, and reservations that are never settled.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::Duration;

use hapa_engine_sim::{Engine, Fault, Script};
use hapa_proto::auth::v1::{
    CreateKeyRequest, CreateUserRequest, GetKeyRequest, GetUserRequest, TokenBudget, TokenUsage,
};
use hapa_proto::codegen::v1::GenerateCodeRequest;
use hapa_proto::codegen::v1::stream_generate_code_response::Event;
use hapa_test_harness::{CodegenClient, RoleProcess, TOKEN, TestCluster, TestMesh, within};
use tokio::task::JoinSet;
use tokio::time::sleep;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use super::{Open, POLL_INTERVAL, failure, say, shown};
use crate::api::generate::question;

const DAY: Duration = Duration::from_hours(24);
/// What one answer uses.
const USED: i64 = 100;

/// A cluster with an engine that reports the same usage for every answer.
async fn cluster() -> TestCluster {
    let cluster = TestCluster::start().await;
    cluster.engine.script(Script::tokens(["a", "b"]).usage(30, 70));
    cluster
}

/// A key with so many tokens a day: its id and its text.
async fn key(cluster: &TestCluster, owner: &str, per_day: i64) -> (String, String) {
    let token_budget = Some(TokenBudget { per_day, per_month: 0 });
    let owner = owner.to_owned();
    let request = CreateKeyRequest { owner, token_budget, ..TestMesh::dev_key() };
    let made = cluster.create_key(request).await;
    (made.key.unwrap().key_id, made.key_text)
}

/// Requests an answer with `max_tokens` above every budget here; returns the used tokens.
async fn ask(client: &mut CodegenClient) -> Result<i64, Status> {
    let request = GenerateCodeRequest { max_tokens: Some(4_096), ..question("q") };
    let reply = within("an answer", client.generate_code(request)).await?.into_inner();
    Ok(reply.usage.unwrap().total_tokens.into())
}

/// The token usage of a key, once no reservation is open.
async fn settled(cluster: &TestCluster, key_id: &str) -> TokenUsage {
    within("all to be settled", async {
        loop {
            let usage = shown(cluster, key_id).await.token_usage.unwrap();
            if usage.reserved_tokens == 0 {
                return usage;
            }
            sleep(POLL_INTERVAL).await;
        }
    })
    .await
}

/// Checks the refusal of a caller with an exhausted budget.
fn assert_used_up(status: &Status) {
    assert_eq!(failure(status), ("E4008".to_owned(), Code::ResourceExhausted), "{status:?}");
    let quota = status.get_details_quota_failure().unwrap();
    assert!(quota.violations[0].subject.ends_with("/tokens_per_day"), "{quota:?}");
    let wait = status.get_details_retry_info().unwrap().retry_delay.unwrap();
    assert!(!wait.is_zero() && wait <= DAY, "{wait:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_hundred_calls_at_once_no_more_pass_than_a_budget_and_one_call_allow() {
    const BUDGET: i64 = 250;
    let cluster = cluster().await;
    let (key_id, text) = key(&cluster, "tester", BUDGET).await;
    let clients = cluster.clients(&text);
    let mut calls = JoinSet::new();
    for number in 0..100 {
        let mut client = clients[number % 2].clone();
        calls.spawn(async move { ask(&mut client).await });
    }
    let (mut used, mut refused) = (0, 0);
    for outcome in within("the calls", calls.join_all()).await {
        match outcome {
            Ok(tokens) => used += tokens,
            Err(status) => {
                assert_used_up(&status);
                refused += 1;
            }
        }
    }
    let usage = settled(&cluster, &key_id).await;
    assert_eq!((usage.day_tokens, usage.month_tokens), (used, used));
    assert!((USED..=BUDGET + USED).contains(&used), "{used} tokens were used");
    say(&format!("budget of {BUDGET}: {used} used by 100 calls at once, {refused} refused"));
    // Released reservations are available again: calls pass one by one until the budget is used up.
    let status = loop {
        match ask(&mut clients[0].clone()).await {
            Ok(tokens) => used += tokens,
            Err(status) => break status,
        }
        settled(&cluster, &key_id).await;
    };
    assert_used_up(&status);
    assert!((BUDGET..=BUDGET + USED).contains(&used), "{used} tokens were used");
    assert_eq!(settled(&cluster, &key_id).await.day_tokens, used);
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelled_and_broken_generations_are_settled_with_their_usage() {
    let cluster = cluster().await;
    let (key_id, text) = key(&cluster, "tester", 1_000_000).await;
    let [client, mut other] = cluster.clients(&text);
    cluster.engine.once(Script::tokens(["a", "b"]).hold(1));
    let stream = Open::begin(client).await;
    let held = shown(&cluster, &key_id).await.token_usage.unwrap();
    assert!(held.reserved_tokens > 1_000 && held.day_tokens == 0, "{held:?}");
    drop(stream);
    let after_leaving = settled(&cluster, &key_id).await.day_tokens;
    assert!(after_leaving > 0);

    cluster.engine.once(Script::tokens(["a", "b", "c"]).fault(Fault::CutAfter(2)));
    let status = ask(&mut other).await.unwrap_err();
    assert_eq!(failure(&status).0, "E5007");
    let after_break = settled(&cluster, &key_id).await.day_tokens;
    assert!(after_break > after_leaving, "{after_break} and {after_leaving}");
    // A call that the engine refuses uses no tokens.
    cluster.engine.once(Fault::status(500));
    ask(&mut other).await.unwrap_err();
    assert_eq!(settled(&cluster, &key_id).await.day_tokens, after_break);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_users_budget_counts_over_all_of_its_keys() {
    let cluster = cluster().await;
    let request = CreateUserRequest {
        email: "user@example.com".to_owned(),
        name: "User".to_owned(),
        scopes: TestMesh::dev_key().scopes,
        token_budget: Some(TokenBudget { per_day: 250, per_month: 0 }),
        ..CreateUserRequest::default()
    };
    let user = cluster.auth.users().create_user(request).await.unwrap().into_inner().user.unwrap();
    let mut keys = Vec::new();
    for _ in 0..2 {
        keys.push(key(&cluster, &user.user_id, 0).await);
    }
    let usage = async || {
        let request = GetUserRequest { user_id: user.user_id.clone() };
        let user = cluster.auth.users().get_user(request).await.unwrap().into_inner().user;
        user.unwrap().token_usage.unwrap()
    };
    for round in 0..3 {
        let mut client = cluster.replicas[round % 2].client(&keys[round % 2].1);
        assert_eq!(ask(&mut client).await.unwrap(), USED);
        within("the user's usage", async { while usage().await.reserved_tokens > 0 {} }).await;
    }
    for (_, text) in &keys {
        for mut client in cluster.clients(text) {
            assert_used_up(&ask(&mut client).await.unwrap_err());
        }
    }
    assert_eq!(usage().await.day_tokens, 3 * USED);
    let of_keys = [settled(&cluster, &keys[0].0).await, settled(&cluster, &keys[1].0).await];
    assert_eq!(of_keys.map(|usage| usage.day_tokens), [2 * USED, USED]);
}

/// Reads a stream until it ends or breaks, and adds its reported tokens.
async fn read(client: &mut CodegenClient, told: &AtomicI64) {
    let request = GenerateCodeRequest { max_tokens: Some(1_000), ..question("q") };
    let Ok(frames) = client.stream_generate_code(request).await else {
        return sleep(POLL_INTERVAL).await;
    };
    let (mut frames, mut tokens) = (frames.into_inner(), 0);
    while let Ok(Some(frame)) = frames.message().await {
        let new = match frame.event {
            // Each token of the script is a letter.
            Some(Event::Delta(delta)) => i64::try_from(delta.text.len()).unwrap(),
            Some(Event::Finished(end)) => i64::from(end.usage.unwrap().total_tokens) - tokens,
            _ => 0,
        };
        tokens += new;
        told.fetch_add(new, Ordering::Relaxed);
    }
}

/// Kills a replica repeatedly while callers read from it. Returns the number of received tokens, and the
/// maximum number of broken calls.
async fn kill_under_load(replica: &mut RoleProcess, engine: &Engine, text: &str) -> (i64, i64) {
    const KILLS: usize = 3;
    const CALLERS: usize = 4;
    let told = Arc::new(AtomicI64::new(0));
    // Short answers and long ones: kills find calls at their begin, on their way and at their end.
    for (kill, tokens) in [300, 3, 60].into_iter().enumerate() {
        engine.script(Script::tokens(vec!["x"; tokens]).gap(POLL_INTERVAL));
        let over = Arc::new(AtomicBool::new(false));
        let mut callers = JoinSet::new();
        for _ in 0..CALLERS {
            let (mut client, over) = (replica.client(text), Arc::clone(&over));
            let told = Arc::clone(&told);
            callers.spawn(async move {
                while !over.load(Ordering::Relaxed) {
                    read(&mut client, &told).await;
                }
            });
        }
        let enough = told.load(Ordering::Relaxed) + 400;
        within("tokens", async {
            while told.load(Ordering::Relaxed) < enough {
                sleep(POLL_INTERVAL).await;
            }
        })
        .await;
        replica.kill().await;
        over.store(true, Ordering::Relaxed);
        within("the callers", callers.join_all()).await;
        if kill + 1 < KILLS {
            replica.start_again().await;
        }
    }
    (told.load(Ordering::Relaxed), i64::try_from(KILLS * CALLERS).unwrap())
}

/// Checks what was booked for calls of which some were cut off by kills.
fn assert_booked(usage: &TokenUsage, told: i64, broken: i64) {
    assert!(usage.day_tokens >= told, "{} of {told} told tokens were booked", usage.day_tokens);
    // No more than a reservation for each call that broke.
    let most = told + broken * 3_000;
    assert!(usage.day_tokens <= most, "{} were booked and {told} told", usage.day_tokens);
    assert_eq!(usage.day_tokens, usage.month_tokens);
    say(&format!("{told} tokens told by replicas that were killed, {} booked", usage.day_tokens));
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_replicas_return_no_tokens_that_were_delivered() {
    let cluster = cluster().await;
    let mut replica = cluster.another_replica(&["--vllm-timeout-seconds=4"]).await;
    let (key_id, text) = key(&cluster, "tester", 100_000_000).await;
    let (told, broken) = kill_under_load(&mut replica, &cluster.engine, &text).await;
    assert_booked(&settled(&cluster, &key_id).await, told, broken);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_process_of_all_roles_returns_no_tokens_that_were_delivered() {
    let engine = Engine::start();
    let settings = [
        ("MESH_TOKEN", TOKEN.to_owned()),
        ("AI_MODEL_ENDPOINT", engine.url().to_owned()),
        ("CACHE_TTL", "0".to_owned()),
        ("VLLM_TIMEOUT_SECONDS", "4".to_owned()),
    ];
    let mut all = RoleProcess::start("all", &settings, &[]).await;
    let token_budget = Some(TokenBudget { per_day: 100_000_000, per_month: 0 });
    let request = CreateKeyRequest { token_budget, ..TestMesh::dev_key() };
    let made = within("a key", all.keys().create_key(request)).await.unwrap().into_inner();
    let (told, broken) = kill_under_load(&mut all, &engine, &made.key_text).await;
    all.start_again().await;
    let request = GetKeyRequest { key_id: made.key.unwrap().key_id };
    let usage = within("all to be settled", async {
        loop {
            if let Ok(key) = all.keys().get_key(request.clone()).await {
                let usage = key.into_inner().key.unwrap().token_usage.unwrap();
                if usage.reserved_tokens == 0 {
                    return usage;
                }
            }
            sleep(10 * POLL_INTERVAL).await;
        }
    })
    .await;
    assert_booked(&usage, told, broken);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_killed_replica_held_comes_back() {
    let cluster = cluster().await;
    let mut replica = cluster.another_replica(&["--vllm-timeout-seconds=3"]).await;
    let (key_id, text) = key(&cluster, "tester", 1_000).await;
    cluster.engine.once(Script::tokens(["a", "b"]).hold(1));
    let stream = Open::begin(replica.client(&text)).await;
    replica.kill().await;
    let held = shown(&cluster, &key_id).await.token_usage.unwrap();
    assert!(held.reserved_tokens > 1_000, "{held:?}");
    let [mut client, _] = cluster.clients(&text);
    assert_used_up(&ask(&mut client).await.unwrap_err());
    // Its prompt and a token were used, and a few more might have been.
    let booked = settled(&cluster, &key_id).await.day_tokens;
    assert!((10..held.reserved_tokens / 2).contains(&booked), "{booked} of {held:?}");
    assert_eq!(ask(&mut client).await.unwrap(), USED);
    within("the settlement", async {
        while settled(&cluster, &key_id).await.day_tokens < booked + USED {}
    })
    .await;
    drop(stream);
}
