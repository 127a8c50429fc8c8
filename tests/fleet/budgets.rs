//! Budgets of tokens under races, and what becomes of reservations when nobody settles them.

use std::time::Duration;

use hapa_proto::auth::v1::{
    CreateKeyRequest, CreateUserRequest, GetUserRequest, TokenBudget, TokenUsage,
};
use hapa_proto::codegen::v1::GenerateCodeRequest;
use hapa_tests::engine::{Fault, Script};
use hapa_tests::{Client, Fleet, World, within};
use tokio::task::JoinSet;
use tokio::time::sleep;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use super::{Open, SHORTLY, failure, say, shown};
use crate::generate::question;

const DAY: Duration = Duration::from_hours(24);
/// What one answer uses.
const USED: i64 = 100;

/// A fleet whose engine says that every answer used as much.
async fn fleet() -> Fleet {
    let fleet = Fleet::start().await;
    fleet.engine.script(Script::tokens(["a", "b"]).usage(30, 70));
    fleet
}

/// A key with so many tokens a day: its id and its text.
async fn key(fleet: &Fleet, owner: &str, per_day: i64) -> (String, String) {
    let token_budget = Some(TokenBudget { per_day, per_month: 0 });
    let owner = owner.to_owned();
    let request = CreateKeyRequest { owner, token_budget, ..World::dev_key() };
    let made = fleet.create_key(request).await;
    (made.key.unwrap().key_id, made.key_text)
}

/// Asks for an answer that may be longer than any budget here; how much it used.
async fn ask(client: &mut Client) -> Result<i64, Status> {
    let request = GenerateCodeRequest { max_tokens: Some(4_096), ..question("q") };
    let reply = within("an answer", client.generate_code(request)).await?.into_inner();
    Ok(reply.usage.unwrap().total_tokens.into())
}

/// What a key has used, once nothing is held for it any more.
async fn settled(fleet: &Fleet, key_id: &str) -> TokenUsage {
    within("all to be settled", async {
        loop {
            let usage = shown(fleet, key_id).await.token_usage.unwrap();
            if usage.reserved_tokens == 0 {
                return usage;
            }
            sleep(SHORTLY).await;
        }
    })
    .await
}

/// Checks what a caller is told whose budget is used up.
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
    let fleet = fleet().await;
    let (key_id, text) = key(&fleet, "tester", BUDGET).await;
    let clients = fleet.clients(&text);
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
    let usage = settled(&fleet, &key_id).await;
    assert_eq!((usage.day_tokens, usage.month_tokens), (used, used));
    assert!((USED..=BUDGET + USED).contains(&used), "{used} tokens were used");
    say(&format!("budget of {BUDGET}: {used} used by 100 calls at once, {refused} refused"));
    // What was only held comes back: calls pass one by one until the budget is used up.
    let status = loop {
        match ask(&mut clients[0].clone()).await {
            Ok(tokens) => used += tokens,
            Err(status) => break status,
        }
        settled(&fleet, &key_id).await;
    };
    assert_used_up(&status);
    assert!((BUDGET..=BUDGET + USED).contains(&used), "{used} tokens were used");
    assert_eq!(settled(&fleet, &key_id).await.day_tokens, used);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_leaves_and_what_breaks_off_is_settled_with_what_was_used() {
    let fleet = fleet().await;
    let (key_id, text) = key(&fleet, "tester", 1_000_000).await;
    let [client, mut other] = fleet.clients(&text);
    fleet.engine.once(Script::tokens(["a", "b"]).hold(1));
    let stream = Open::begin(client).await;
    let held = shown(&fleet, &key_id).await.token_usage.unwrap();
    assert!(held.reserved_tokens > 1_000 && held.day_tokens == 0, "{held:?}");
    drop(stream);
    let after_leaving = settled(&fleet, &key_id).await.day_tokens;
    assert!(after_leaving > 0);

    fleet.engine.once(Script::tokens(["a", "b", "c"]).fault(Fault::CutAfter(2)));
    let status = ask(&mut other).await.unwrap_err();
    assert_eq!(failure(&status).0, "E5007");
    let after_break = settled(&fleet, &key_id).await.day_tokens;
    assert!(after_break > after_leaving, "{after_break} and {after_leaving}");
    // What the engine never began costs nothing.
    fleet.engine.once(Fault::status(500));
    ask(&mut other).await.unwrap_err();
    assert_eq!(settled(&fleet, &key_id).await.day_tokens, after_break);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_users_budget_counts_over_all_of_its_keys() {
    let fleet = fleet().await;
    let request = CreateUserRequest {
        email: "user@example.com".to_owned(),
        name: "User".to_owned(),
        scopes: World::dev_key().scopes,
        token_budget: Some(TokenBudget { per_day: 250, per_month: 0 }),
        ..CreateUserRequest::default()
    };
    let user = fleet.auth.users().create_user(request).await.unwrap().into_inner().user.unwrap();
    let mut keys = Vec::new();
    for _ in 0..2 {
        keys.push(key(&fleet, &user.user_id, 0).await);
    }
    let usage = async || {
        let request = GetUserRequest { user_id: user.user_id.clone() };
        let user = fleet.auth.users().get_user(request).await.unwrap().into_inner().user;
        user.unwrap().token_usage.unwrap()
    };
    for round in 0..3 {
        let mut client = fleet.replicas[round % 2].client(&keys[round % 2].1);
        assert_eq!(ask(&mut client).await.unwrap(), USED);
        within("the user's usage", async { while usage().await.reserved_tokens > 0 {} }).await;
    }
    for (_, text) in &keys {
        for mut client in fleet.clients(text) {
            assert_used_up(&ask(&mut client).await.unwrap_err());
        }
    }
    assert_eq!(usage().await.day_tokens, 3 * USED);
    let of_keys = [settled(&fleet, &keys[0].0).await, settled(&fleet, &keys[1].0).await];
    assert_eq!(of_keys.map(|usage| usage.day_tokens), [2 * USED, USED]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_killed_replica_held_comes_back() {
    let fleet = fleet().await;
    let mut replica = fleet.another_replica(&["--vllm-timeout-seconds=3"]).await;
    let (key_id, text) = key(&fleet, "tester", 1_000).await;
    fleet.engine.once(Script::tokens(["a", "b"]).hold(1));
    let stream = Open::begin(replica.client(&text)).await;
    replica.kill().await;
    let held = shown(&fleet, &key_id).await.token_usage.unwrap();
    assert!(held.reserved_tokens > 1_000, "{held:?}");
    let [mut client, _] = fleet.clients(&text);
    assert_used_up(&ask(&mut client).await.unwrap_err());
    assert_eq!(settled(&fleet, &key_id).await.day_tokens, 0, "nobody settled it");
    assert_eq!(ask(&mut client).await.unwrap(), USED);
    drop(stream);
}
