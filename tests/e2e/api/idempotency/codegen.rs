//! Generations with an idempotency key: one call of the engine, charged once.

use hapa_engine_sim::{Fault, Script};
use hapa_proto::auth::v1::{CreateKeyRequest, GetKeyRequest, RevokeKeyRequest, TokenBudget};
use hapa_proto::codegen::v1::CompleteCodeRequest;
use hapa_test_harness::{Identity, TestMesh, incident, within};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::Code;

use super::{is_replayed, keyed};
use crate::api::generate::question;

fn cursor(prefix: &str) -> CompleteCodeRequest {
    CompleteCodeRequest { prefix: prefix.to_owned(), ..CompleteCodeRequest::default() }
}

#[tokio::test]
async fn a_repeated_generation_asks_the_engine_once_and_is_charged_once() {
    let mesh = TestMesh::start().await;
    let budget = Some(TokenBudget { per_day: 1_000_000, per_month: 0 });
    let made =
        mesh.create_key(CreateKeyRequest { token_budget: budget, ..TestMesh::dev_key() }).await;
    let key_id = made.key.unwrap().key_id;
    let mut client = mesh.client_with(&made.key_text);
    mesh.engine.script(Script::text("x = 1").usage(70, 40));
    let first = client.generate_code(keyed(question("q"), "k")).await.unwrap();
    let again = client.generate_code(keyed(question("q"), "k")).await.unwrap();
    assert!(!is_replayed(&first) && is_replayed(&again));
    // Word for word, also its id and its time.
    assert_eq!(first.into_inner(), again.into_inner());
    assert_eq!(mesh.engine.counts().started, 1);

    let first = client.complete_code(keyed(cursor("def f("), "k")).await.unwrap();
    let again = client.complete_code(keyed(cursor("def f("), "k")).await.unwrap();
    assert!(!is_replayed(&first) && is_replayed(&again));
    let first = first.into_inner();
    assert!(!first.suggestions.is_empty());
    assert_eq!(first, again.into_inner());
    assert_eq!(mesh.engine.counts().started, 2);
    let used = within("the settlement", async {
        loop {
            let request = GetKeyRequest { key_id: key_id.clone() };
            let key = mesh.keys().get_key(request).await.unwrap().into_inner().key.unwrap();
            let usage = key.token_usage.unwrap();
            // The completion's tokens are booked last.
            if usage.reserved_tokens == 0 && usage.day_tokens > 110 {
                return usage.day_tokens;
            }
        }
    })
    .await;
    assert_eq!(used, 220, "one generation and one completion of 110 tokens");
    let metrics = mesh.metrics().await;
    let replayed = metrics.sum("hapa_idempotent_requests_total", &["outcome=\"replayed\""]);
    assert!(replayed >= 2.0, "{replayed}");
    mesh.finish().await;
}

#[tokio::test]
async fn another_question_under_a_used_key_is_a_conflict_and_another_caller_is_not() {
    let mesh = TestMesh::start().await;
    let mut client = mesh.client();
    client.generate_code(keyed(question("q"), "k")).await.unwrap();
    client.complete_code(keyed(cursor("x"), "k")).await.unwrap();
    let refused = client.generate_code(keyed(question("r"), "k")).await.unwrap_err();
    assert_eq!((incident(&refused).0.as_str(), refused.code()), ("E4009", Code::Aborted));
    let refused = client.complete_code(keyed(cursor("y"), "k")).await.unwrap_err();
    assert_eq!(incident(&refused).0, "E4009");
    assert_eq!(mesh.engine.counts().started, 2);
    let other = mesh.create_key(TestMesh::dev_key()).await.key_text;
    let reply = mesh.client_with(&other).generate_code(keyed(question("r"), "k")).await.unwrap();
    assert!(!is_replayed(&reply));
    // Without a key, or with another, it is another request.
    client.generate_code(question("q")).await.unwrap();
    client.generate_code(keyed(question("q"), "l")).await.unwrap();
    assert_eq!(mesh.engine.counts().started, 5);
    mesh.finish().await;
}

#[tokio::test]
async fn of_equal_questions_at_the_same_time_one_is_asked_and_the_others_wait() {
    let mesh = TestMesh::start().await;
    mesh.engine.once(Script::tokens(["a", "b"]).hold(1));
    let mut asked = JoinSet::new();
    for _ in 0..8 {
        let mut client = mesh.client();
        asked.spawn(async move { client.generate_code(keyed(question("q"), "k")).await });
    }
    mesh.engine.wait_until(|counts| counts.held == 1).await;
    mesh.engine.release();
    let replies = within("all of them", asked.join_all()).await;
    let replies: Vec<_> = replies.into_iter().map(Result::unwrap).collect();
    assert_eq!(replies.iter().filter(|reply| !is_replayed(reply)).count(), 1);
    assert!(replies.iter().all(|reply| reply.get_ref() == replies[0].get_ref()));
    assert_eq!(mesh.engine.counts().started, 1);
    mesh.finish().await;
}

#[tokio::test]
async fn when_the_first_leaves_or_fails_the_next_one_takes_over() {
    let mesh = TestMesh::start().await;
    mesh.engine.once(Script::tokens(["a", "b"]).hold(1));
    let (mut one, leave) = (mesh.client(), CancellationToken::new());
    let left = leave.clone();
    let first = tokio::spawn(async move {
        tokio::select! {
            _ = one.generate_code(keyed(question("q"), "k")) => panic!("the engine holds it"),
            () = left.cancelled() => {}
        }
    });
    mesh.engine.wait_until(|counts| counts.held == 1).await;
    let mut other = mesh.client();
    let second = tokio::spawn(async move { other.generate_code(keyed(question("q"), "k")).await });
    leave.cancel();
    first.await.unwrap();
    let reply = within("the second", second).await.unwrap().unwrap();
    assert!(!is_replayed(&reply));
    assert_eq!(mesh.engine.counts().started, 2);

    mesh.engine.once(Script::tokens(["a", "b"]).fault(Fault::CutAfter(1)));
    let mut client = mesh.client();
    let broken = client.generate_code(keyed(question("q"), "broken")).await.unwrap_err();
    assert_eq!(incident(&broken).0, "E5007");
    let reply = client.generate_code(keyed(question("q"), "broken")).await.unwrap();
    assert!(!is_replayed(&reply));
    assert_eq!(mesh.engine.counts().started, 4);
    mesh.finish().await;
}

#[tokio::test]
async fn a_request_that_waits_for_the_first_ends_with_its_deadline_and_takes_nothing_over() {
    let mesh = TestMesh::start().await;
    mesh.engine.once(Script::tokens(["a", "b"]).hold(1));
    let mut one = mesh.client();
    let first = tokio::spawn(async move { one.generate_code(keyed(question("q"), "k")).await });
    mesh.engine.wait_until(|counts| counts.held == 1).await;
    let mut request = keyed(question("q"), "k");
    request.set_timeout(std::time::Duration::from_millis(300));
    // With a timeout the client may be the first to give up.
    let mut channel =
        hapa_test_harness::CodegenClient::new(Identity::Key(&mesh.key).on(mesh.connect().await));
    let refused = within("a deadline", channel.generate_code(request)).await.unwrap_err();
    assert!([Code::Cancelled, Code::DeadlineExceeded].contains(&refused.code()), "{refused}");
    first.abort();
    mesh.engine.wait_for_aborted(1).await;
    let reply = mesh.client().generate_code(keyed(question("q"), "k")).await.unwrap();
    assert!(!is_replayed(&reply));
    assert_eq!(mesh.engine.counts().started, 2);
    mesh.finish().await;
}

#[tokio::test]
async fn a_request_that_waits_for_the_first_ends_with_its_credential() {
    let mesh = TestMesh::start().await;
    let made = mesh.create_key(TestMesh::dev_key()).await;
    mesh.engine.once(Script::tokens(["a", "b"]).hold(1));
    let mut asked = JoinSet::new();
    for _ in 0..3 {
        let mut client = mesh.client_with(&made.key_text);
        asked.spawn(async move { client.generate_code(keyed(question("q"), "k")).await });
    }
    mesh.engine.wait_until(|counts| counts.held == 1).await;
    let key_id = made.key.unwrap().key_id;
    mesh.keys().revoke_key(RevokeKeyRequest { key_id }).await.unwrap();
    for refused in within("all of them", asked.join_all()).await {
        assert_eq!(incident(&refused.unwrap_err()).0, "E4007");
    }
    assert_eq!(mesh.engine.counts().started, 1);
    mesh.finish().await;
}
