//! Token budgets: the remaining tokens decide, and used tokens are booked, however a generation ends.

use std::time::Duration;

use hapa_engine_sim::{Fault, Script};
use hapa_proto::auth::v1::auth_service_client::AuthServiceClient;
use hapa_proto::auth::v1::key_service_client::KeyServiceClient;
use hapa_proto::auth::v1::user_service_client::UserServiceClient;
use hapa_proto::auth::v1::{
    CreateKeyRequest, GetKeyRequest, GetUserRequest, ReserveTokensRequest, SettleTokensRequest,
    Settlement, TokenBudget, TokenUsage, UpdateUserRequest,
};
use hapa_proto::codegen::v1::stream_generate_code_response::Event;
use hapa_proto::codegen::v1::{
    CompleteCodeRequest, GenerateCodeRequest, StreamGenerateCodeResponse,
};
use hapa_test_harness::{Identity, Store, TestMesh, incident, within};
use prost_types::FieldMask;
use tonic::{Code, Streaming};
use tonic_types::StatusExt as _;

use crate::api::generate::question;

/// A key with this budget of a day: its id and its text.
async fn budgeted(mesh: &TestMesh, per_day: i64) -> (String, String) {
    let token_budget = Some(TokenBudget { per_day, per_month: 0 });
    let made = mesh.create_key(CreateKeyRequest { token_budget, ..TestMesh::dev_key() }).await;
    (made.key.unwrap().key_id, made.key_text)
}

async fn usage(mesh: &TestMesh, key_id: &str) -> TokenUsage {
    let request = GetKeyRequest { key_id: key_id.to_owned() };
    let key = mesh.keys().get_key(request).await.unwrap().into_inner().key.unwrap();
    key.token_usage.unwrap()
}

/// The used tokens, once no reservation is open and some tokens are booked.
async fn settled(mesh: &TestMesh, key_id: &str) -> i64 {
    within("the settlement", async {
        loop {
            let usage = usage(mesh, key_id).await;
            if usage.reserved_tokens == 0 && usage.day_tokens > 0 {
                assert_eq!(usage.day_tokens, usage.month_tokens);
                return usage.day_tokens;
            }
        }
    })
    .await
}

#[tokio::test]
async fn real_usage_is_booked_and_a_used_up_budget_says_when_it_begins_anew() {
    for store in Store::both().await {
        let mesh = TestMesh::start_on(&store, &[]).await;
        let (key_id, text) = budgeted(&mesh, 100).await;
        mesh.engine.script(Script::text("x = 1").usage(70, 40));
        let mut client = mesh.client_with(&text);
        client.generate_code(question("q")).await.unwrap();
        assert_eq!(settled(&mesh, &key_id).await, 110);

        let started = mesh.engine.counts().started;
        let status = client.generate_code(question("q")).await.unwrap_err();
        assert_eq!(
            (incident(&status).0.as_str(), status.code()),
            ("E4008", Code::ResourceExhausted)
        );
        let wait = status.get_details_retry_info().unwrap().retry_delay.unwrap();
        assert!(!wait.is_zero() && wait <= Duration::from_hours(24), "{wait:?}");
        let quota = status.get_details_quota_failure().unwrap();
        assert_eq!(quota.violations[0].subject, format!("key:{key_id}/tokens_per_day"));
        let status = client.stream_generate_code(question("q")).await.unwrap_err();
        assert_eq!(incident(&status).0, "E4008");
        assert_eq!(mesh.engine.counts().started, started, "the engine was asked");
        mesh.finish().await;
    }
}

#[tokio::test]
async fn an_engine_that_claims_too_much_is_booked_for_the_reservation_alone() {
    const BUDGET: i64 = 1_000_000;
    for store in Store::both().await {
        let mesh = TestMesh::start_on(&store, &[]).await;
        let (key_id, text) = budgeted(&mesh, BUDGET).await;
        let mut client = mesh.client_with(&text);
        let small = || GenerateCodeRequest { max_tokens: Some(10), ..question("q") };
        let mut booked = 0;
        for (prompt, completion) in
            [(5, 4_000_000_000), (4_000_000_000, 4_000_000_000), (1 << 40, 1 << 40)]
        {
            mesh.engine.once(Script::text("x = 1").usage(prompt, completion).hold(1));
            let mut frames = client.stream_generate_code(small()).await.unwrap().into_inner();
            within("the start", frames.message()).await.unwrap().unwrap();
            let reserved = usage(&mesh, &key_id).await.reserved_tokens;
            assert!((10..BUDGET).contains(&reserved), "{reserved}");
            mesh.engine.release();
            within("the end", async { while frames.message().await.unwrap().is_some() {} }).await;
            within("the settlement", async {
                while usage(&mesh, &key_id).await.reserved_tokens > 0 {}
            })
            .await;
            let used = usage(&mesh, &key_id).await.day_tokens;
            assert_eq!(used - booked, reserved);
            booked = used;
        }
        let counted = async |outcome: &str| {
            let outcome = format!("outcome=\"{outcome}\"");
            mesh.metrics().await.sum("hapa_ledger_tokens_total", &[&outcome])
        };
        assert!(counted("excess").await > 1.2e10, "{}", counted("excess").await);
        // Completions too.
        mesh.engine.once(Script::tokens(["a"]).usage(4_000_000_000, 0));
        let request =
            CompleteCodeRequest { prefix: "f(".to_owned(), ..CompleteCodeRequest::default() };
        client.complete_code(request).await.unwrap();
        within("the settlement", async {
            while usage(&mesh, &key_id).await.day_tokens == booked {}
        })
        .await;
        assert!(usage(&mesh, &key_id).await.day_tokens < booked + 10_000);
        client.generate_code(small()).await.unwrap();
        mesh.finish().await;
    }
}

/// Tokens of a lease of this key.
fn report(key_id: &str, lease: &str, tokens: i64) -> Settlement {
    let (lease_id, key_id) = (lease.to_owned(), key_id.to_owned());
    Settlement { lease_id, key_id, user_id: String::new(), tokens }
}

/// A lease of 1,000 tokens.
fn reservation(key_id: &str, lease: &str, used_tokens: i64) -> ReserveTokensRequest {
    ReserveTokensRequest {
        lease_id: lease.to_owned(),
        key_id: key_id.to_owned(),
        user_id: String::new(),
        tokens: 1_000,
        lease_seconds: 86_400,
        used_tokens,
    }
}

/// Used today, used this month, held.
async fn state(mesh: &TestMesh, key_id: &str) -> (i64, i64, i64) {
    let usage = usage(mesh, key_id).await;
    (usage.day_tokens, usage.month_tokens, usage.reserved_tokens)
}

#[tokio::test]
async fn a_lease_that_ends_unsettled_books_what_was_reported_last() {
    const LEASES: [&str; 4] = ["silent", "told", "lies", "late"];
    for store in Store::both().await {
        let mesh = TestMesh::start_on(&store, &[]).await;
        let mut auth = AuthServiceClient::new(mesh.channel_as(Identity::Mesh));
        let (key_id, _) = budgeted(&mesh, 1_000_000).await;
        for lease in LEASES {
            auth.reserve_tokens(reservation(&key_id, lease, 70)).await.unwrap();
        }
        let report = |lease: &str, tokens: i64| report(&key_id, lease, tokens);
        let first = [("told", 300), ("lies", 4_000_000), ("late", 500), ("unknown", 500)];
        let first = first.map(|(lease, tokens)| report(lease, tokens)).to_vec();
        // A report with a smaller number than the last one is outdated.
        for running in [first, vec![report("told", 200)]] {
            let request = SettleTokensRequest { settlements: Vec::new(), running };
            auth.settle_tokens(request).await.unwrap();
        }
        // The end is recent, because leases are deleted some time after their end.
        let ended = hapa_core::timestamps::now() - 1;
        let end = format!("UPDATE token_leases SET expire_time = {ended} WHERE lease_id <> 'late'");
        store.execute(&end).await;
        let booked = 70 + 300 + 1_000;
        within("the leases to end", async { while state(&mesh, &key_id).await.2 > 1_000 {} }).await;
        assert_eq!(state(&mesh, &key_id).await, (booked, booked, 1_000));

        // A report after the end changes nothing. A settlement replaces the booked tokens, once.
        let running = vec![report("told", 900)];
        let request = SettleTokensRequest { settlements: Vec::new(), running };
        auth.settle_tokens(request).await.unwrap();
        assert_eq!(state(&mesh, &key_id).await, (booked, booked, 1_000));
        for _ in 0..2 {
            let settlements = [("told", 250), ("lies", 4_000_000), ("late", 4_000_000)];
            let settlements = settlements.map(|(lease, tokens)| report(lease, tokens)).to_vec();
            let request = SettleTokensRequest { settlements, running: Vec::new() };
            auth.settle_tokens(request).await.unwrap();
            let booked = 70 + 250 + 1_000 + 1_000;
            assert_eq!(state(&mesh, &key_id).await, (booked, booked, 0));
        }
        let too_much = auth.reserve_tokens(reservation(&key_id, "much", 1_001)).await.unwrap_err();
        assert_eq!(incident(&too_much).0, "E4001");
        mesh.finish().await;
    }
}

#[tokio::test]
async fn of_many_calls_on_the_last_of_a_budget_one_passes() {
    for store in Store::both().await {
        let mesh = TestMesh::start_on(&store, &[]).await;
        let (key_id, text) = budgeted(&mesh, 10).await;
        mesh.engine
            .script(Script::text("x = 1").usage(70, 40).first_after(Duration::from_millis(50)));
        let mut calls = tokio::task::JoinSet::new();
        for _ in 0..100 {
            let mut client = mesh.client_with(&text);
            calls.spawn(async move { client.generate_code(question("q")).await });
        }
        let replies = within("the calls", calls.join_all()).await;
        let refused: Vec<_> = replies.into_iter().filter_map(Result::err).collect();
        assert_eq!(refused.len(), 99);
        assert!(refused.iter().all(|status| incident(status).0 == "E4008"));
        assert_eq!(settled(&mesh, &key_id).await, 110);
        mesh.finish().await;
    }
}

#[tokio::test]
async fn cancelled_and_broken_generations_pay_for_the_generated_tokens() {
    let mesh = TestMesh::start().await;
    let (key_id, text) = budgeted(&mesh, 1_000_000).await;
    mesh.engine.once(Script::tokens(["a", "b", "c", "d"]).hold(3));
    let mut client = mesh.client_with(&text);
    let mut frames = client.stream_generate_code(question("q")).await.unwrap().into_inner();
    within("the start", frames.message()).await.unwrap().unwrap();
    within("a token", frames.message()).await.unwrap().unwrap();
    assert!(usage(&mesh, &key_id).await.reserved_tokens > 1_024, "max_tokens are held");
    drop(frames);
    let left = settled(&mesh, &key_id).await;
    assert!(left > 1, "{left}");

    mesh.engine.once(Script::tokens(["a", "b"]).without_finish().without_done());
    let status = client.generate_code(question("q")).await.unwrap_err();
    assert_eq!(incident(&status).0, "E5007");
    within("the settlement", async { while settled(&mesh, &key_id).await <= left {} }).await;

    // A call that the engine refuses uses no tokens.
    let before = settled(&mesh, &key_id).await;
    mesh.engine.once(Fault::status(500));
    client.generate_code(question("q")).await.unwrap_err();
    assert_eq!(settled(&mesh, &key_id).await, before);
    mesh.finish().await;
}

/// Reads heartbeats until the mesh has received this many reasoning tokens; returns their number.
async fn reasoned(frames: &mut Streaming<StreamGenerateCodeResponse>, tokens: u32) -> i64 {
    within("the reasoning", async {
        loop {
            match frames.message().await.unwrap().unwrap().event.unwrap() {
                Event::Heartbeat(beat) if beat.reasoning_tokens >= tokens => {
                    return beat.reasoning_tokens.into();
                }
                Event::Started(_) | Event::Heartbeat(_) => {}
                other => panic!("{other:?} before the end of the reasoning"),
            }
        }
    })
    .await
}

#[tokio::test]
async fn a_stream_that_is_cancelled_in_its_reasoning_pays_for_what_the_model_has_thought() {
    const REASONING: usize = 1_500;
    let mesh = TestMesh::start_with(&["--heartbeat-seconds=0.02"]).await;
    let (key_id, text) = budgeted(&mesh, 1_000_000).await;
    let thoughts = || Script::tokens(vec!["hm "; REASONING + 10]).reasoning(REASONING);
    // Cancels once the mesh has received `tokens`: how many it had then, how many the engine had sent,
    // and how many were booked.
    let cancel = async |script: Script, tokens: u32| {
        let before = usage(&mesh, &key_id).await.day_tokens;
        let aborted = mesh.engine.counts().aborted;
        mesh.engine.once(script);
        let mut client = mesh.client_with(&text);
        let mut frames = client.stream_generate_code(question("q")).await.unwrap().into_inner();
        let received = reasoned(&mut frames, tokens).await;
        let reserved = usage(&mesh, &key_id).await.reserved_tokens;
        assert!(reserved > i64::try_from(REASONING).unwrap(), "max_tokens are held: {reserved}");
        drop(frames);
        mesh.engine.wait_for_aborted(aborted + 1).await;
        let sent = i64::try_from(mesh.engine.aborts().last().unwrap().tokens_sent).unwrap();
        (received, sent, settled(&mesh, &key_id).await - before)
    };

    // Without a token the prompt alone is booked. It is the same for all calls.
    let (received, sent, prompt) = cancel(thoughts().hold(0), 0).await;
    assert_eq!((received, sent), (0, 0));
    assert!(prompt > 0);
    // The engine waits in its reasoning, so the mesh has received every token that was sent.
    let (received, sent, booked) = cancel(thoughts().hold(700), 700).await;
    assert_eq!((received, sent, booked - prompt), (700, 700, 700));
    // The engine continues, so tokens may be on their way when the mesh closes the connection.
    let (received, sent, booked) = cancel(thoughts().gap(Duration::from_millis(2)), 50).await;
    let tokens = booked - prompt;
    assert!((received..=sent).contains(&tokens), "{received} <= {tokens} <= {sent}");
    assert!(sent < i64::try_from(REASONING).unwrap(), "the engine was stopped in its reasoning");
    mesh.finish().await;
}

#[tokio::test]
async fn completions_that_share_a_call_pay_for_it_once_and_what_is_remembered_is_free() {
    let mesh = TestMesh::start().await;
    let (key_id, text) = budgeted(&mesh, 1_000_000).await;
    let asked =
        || CompleteCodeRequest { prefix: "f(".to_owned(), ..CompleteCodeRequest::default() };
    mesh.engine.script(Script::tokens(["a", "b"]).hold(2).usage(70, 40));
    let mut calls = tokio::task::JoinSet::new();
    for number in 0..3 {
        let mut client = mesh.client_with(&text);
        calls.spawn(async move { client.complete_code(asked()).await });
        if number == 0 {
            mesh.engine.wait_for_started(1).await;
        }
    }
    within("the calls to be in progress", async {
        let of = [r#"CompleteCode""#];
        while mesh.metrics().await.sum("hapa_requests_in_flight", &of) < 2.9 {}
    })
    .await;
    assert!(usage(&mesh, &key_id).await.reserved_tokens >= 5 * 128, "all suggestions are held");
    mesh.engine.release();
    for reply in within("the calls", calls.join_all()).await {
        // A call that started late may receive the suggestions of the others from the cache.
        let reply = reply.unwrap().into_inner();
        assert_eq!(reply.usage.unwrap().total_tokens, if reply.cached { 0 } else { 110 });
    }
    assert_eq!(settled(&mesh, &key_id).await, 110);
    assert!(mesh.client_with(&text).complete_code(asked()).await.unwrap().into_inner().cached);
    assert_eq!(settled(&mesh, &key_id).await, 110);
    assert_eq!(mesh.engine.counts().started, 1);
    mesh.finish().await;
}

#[tokio::test]
async fn a_users_budget_counts_over_its_keys_and_sessions() {
    let mesh = TestMesh::start().await;
    let kim = mesh.log_in_new_user("kim@example.com", &[]).await;
    let budget = UpdateUserRequest {
        user_id: kim.user.user_id.clone(),
        update_mask: Some(FieldMask { paths: vec!["token_budget".to_owned()] }),
        token_budget: Some(TokenBudget { per_day: 0, per_month: 150 }),
        ..UpdateUserRequest::default()
    };
    let mut users = UserServiceClient::new(mesh.channel_as(Identity::Mesh));
    users.update_user(budget).await.unwrap();
    let mut keys = KeyServiceClient::new(mesh.channel_as(Identity::Session(&kim.access_token)));
    let mut texts = Vec::new();
    for _ in 0..2 {
        let request = CreateKeyRequest {
            name: "own".to_owned(),
            scopes: vec!["codegen:generate".to_owned()],
            ..CreateKeyRequest::default()
        };
        texts.push(keys.create_key(request).await.unwrap().into_inner().key_text);
    }
    mesh.engine.script(Script::text("x = 1").usage(60, 40));
    let used = async || {
        let request = GetUserRequest { user_id: kim.user.user_id.clone() };
        let mut users = UserServiceClient::new(mesh.channel_as(Identity::Mesh));
        users.get_user(request).await.unwrap().into_inner().user.unwrap().token_usage.unwrap()
    };
    for (number, text) in texts.iter().enumerate() {
        mesh.client_with(text).generate_code(question("q")).await.unwrap();
        let expected = 100 * i64::try_from(number + 1).unwrap();
        within("the settlement", async {
            loop {
                let used = used().await;
                if (used.month_tokens, used.reserved_tokens) == (expected, 0) {
                    return;
                }
            }
        })
        .await;
    }
    let mut session = hapa_proto::codegen::v1::codegen_service_client::CodegenServiceClient::new(
        mesh.channel_as(Identity::Session(&kim.access_token)),
    );
    let status = session.generate_code(question("q")).await.unwrap_err();
    assert_eq!(incident(&status).0, "E4008");
    let quota = status.get_details_quota_failure().unwrap();
    let subject = format!("user:{}/tokens_per_month", kim.user.user_id);
    assert_eq!(quota.violations[0].subject, subject);
    mesh.finish().await;
}
