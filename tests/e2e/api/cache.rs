//! The response cache: cached answers, and those that are being generated.

mod clearing;
mod shared;
mod single_flight;

use hapa_engine_sim::{Fault, Script};
use hapa_proto::analytics::v1::analytics_service_client::AnalyticsServiceClient;
use hapa_proto::analytics::v1::{GetPerformanceRequest, GetUsageRequest};
use hapa_proto::auth::v1::{CreateKeyRequest, TokenBudget};
use hapa_proto::codegen::v1::{GenerateCodeRequest, GenerateCodeResponse};
use hapa_test_harness::{CodegenClient, Identity, TestMesh, within};
use tonic::Status;

use crate::api::generate::{question, stream};

const ON: &str = "--cache-ttl=1800";
const ANSWER: &str = "먼저 보기입니다.\n```python\nprint('안녕')\n```\n끝.";

async fn ask(client: &mut CodegenClient, text: &str) -> Result<GenerateCodeResponse, Status> {
    Ok(within("an answer", client.generate_code(question(text))).await?.into_inner())
}

fn fresh(text: &str) -> GenerateCodeRequest {
    GenerateCodeRequest { no_cache: true, ..question(text) }
}

#[tokio::test]
async fn the_same_question_is_answered_twice_and_generated_once() {
    let mesh = TestMesh::start_with(&[ON]).await;
    mesh.engine.script(Script::text(ANSWER).usage(11, 7));
    let mut client = mesh.client();
    let first = stream(&mut client, question("인사")).await;
    let named = GenerateCodeRequest { request_id: "second".to_owned(), ..question("인사") };
    let second = stream(&mut client, named).await;
    assert_eq!(mesh.engine.counts().started, 1);
    let (before, started) = (first.started.unwrap(), second.started.unwrap());
    assert_eq!((before.cached, started.cached), (false, true));
    assert_eq!((started.request_id.as_str(), started.model), ("second", before.model));
    assert_eq!((second.code, second.explanation), (first.code, first.explanation));
    let (before, finished) = (first.finished.unwrap(), second.finished.unwrap());
    assert_eq!((finished.finish_reason, finished.usage), (before.finish_reason, before.usage));
    assert_eq!(finished.warnings, [""; 0]);
    // The unary RPC returns the answer that is cached by the streaming RPC.
    let whole = ask(&mut client, "인사").await.unwrap();
    assert_eq!((whole.cached, whole.generated_code.as_str()), (true, "print('안녕')\n"));
    assert_eq!(whole.explanation, "먼저 보기입니다.\n끝.");
    assert_eq!(whole.usage.unwrap().total_tokens, 18);
    assert_eq!(mesh.engine.counts().started, 1);
    // Every field that changes the engine's request also changes the cache key.
    let warmer = GenerateCodeRequest { temperature: Some(0.4), ..question("인사") };
    assert!(!within("an answer", client.generate_code(warmer)).await.unwrap().into_inner().cached);
    assert!(!ask(&mut client, "인사 ").await.unwrap().cached);
    mesh.finish().await;
}

#[tokio::test]
async fn an_answer_is_cached_for_its_owner_alone() {
    let mesh = TestMesh::start_with(&[ON]).await;
    let client = async |owner: &str| {
        let request = CreateKeyRequest { owner: owner.to_owned(), ..TestMesh::dev_key() };
        mesh.client_with(&mesh.create_key(request).await.key_text)
    };
    let (mut ann, mut anns_other, mut bob) =
        (client("ann").await, client("ann").await, client("bob").await);
    assert!(!ask(&mut ann, "q").await.unwrap().cached);
    assert!(!ask(&mut bob, "q").await.unwrap().cached);
    assert!(ask(&mut anns_other, "q").await.unwrap().cached);
    let mut service = hapa_proto::codegen::v1::codegen_service_client::CodegenServiceClient::new(
        mesh.channel_as(Identity::Mesh),
    );
    assert!(!ask(&mut service, "q").await.unwrap().cached);
    assert_eq!(mesh.engine.counts().started, 3);
    mesh.finish().await;
}

#[tokio::test]
async fn an_answer_that_broke_off_is_never_given_again() {
    let mesh = TestMesh::start_with(&[ON]).await;
    let mut client = mesh.client();
    let whole = || Script::tokens(["a", "b"]);
    let broken = [
        Script::from(Fault::status(500)),
        whole().fault(Fault::CutAfter(1)),
        whole().fault(Fault::EndAfter(2)),
        whole().fault(Fault::ErrorAfter(1)),
        whole().finish("abort"),
        whole().without_finish(),
    ];
    for (number, script) in broken.into_iter().enumerate() {
        let text = format!("q{number}");
        mesh.engine.once(script.clone());
        ask(&mut client, &text).await.unwrap_err();
        let again = ask(&mut client, &text).await.unwrap();
        assert!(!again.cached, "{script:?}");
    }
    // Complete answers that must not be cached.
    for (number, script) in
        [whole().finish("repetition"), Script::tokens([""; 0])].into_iter().enumerate()
    {
        let text = format!("odd{number}");
        mesh.engine.once(script.clone());
        ask(&mut client, &text).await.unwrap();
        assert!(!ask(&mut client, &text).await.unwrap().cached, "{script:?}");
    }
    mesh.engine.once(whole().finish("length"));
    ask(&mut client, "long").await.unwrap();
    let again = ask(&mut client, "long").await.unwrap();
    assert_eq!((again.cached, again.finish_reason.as_str()), (true, "length"));
    mesh.finish().await;
}

#[tokio::test]
async fn a_fresh_answer_takes_the_place_of_the_known_one() {
    let mesh = TestMesh::start_with(&[ON]).await;
    let mut client = mesh.client();
    mesh.engine.script(Script::text("old"));
    ask(&mut client, "q").await.unwrap();
    mesh.engine.script(Script::text("new"));
    assert_eq!(ask(&mut client, "q").await.unwrap().generated_code, "old");
    let read = stream(&mut client, fresh("q")).await;
    assert_eq!((read.explanation.as_str(), read.started.unwrap().cached), ("new", false));
    let known = ask(&mut client, "q").await.unwrap();
    assert_eq!((known.generated_code.as_str(), known.cached), ("new", true));
    assert_eq!(mesh.engine.counts().started, 2);
    mesh.finish().await;
}

#[tokio::test]
async fn an_answer_is_known_for_as_long_as_the_setting_says() {
    let mesh = TestMesh::start_with(&["--cache-ttl=0.3"]).await;
    let mut client = mesh.client();
    ask(&mut client, "q").await.unwrap();
    within("it to be forgotten", async { while ask(&mut client, "q").await.unwrap().cached {} })
        .await;
    let off = TestMesh::start().await;
    ask(&mut off.client(), "q").await.unwrap();
    assert!(!ask(&mut off.client(), "q").await.unwrap().cached);
    mesh.finish().await;
}

#[tokio::test]
async fn a_known_answer_costs_no_tokens_and_is_counted_as_cached() {
    let mesh = TestMesh::start_with(&[ON]).await;
    let budget = TokenBudget { per_day: 1_000_000, per_month: 0 };
    let request = CreateKeyRequest { token_budget: Some(budget), ..TestMesh::dev_key() };
    let mut client = mesh.client_with(&mesh.create_key(request).await.key_text);
    mesh.engine.script(Script::text(ANSWER).usage(100, 50));
    for _ in 0..4 {
        ask(&mut client, "q").await.unwrap();
    }
    let mut analytics = AnalyticsServiceClient::new(mesh.channel_as(Identity::Mesh));
    within("the sums", async {
        loop {
            let model = "prompt".to_owned();
            let request = GetUsageRequest { model, ..GetUsageRequest::default() };
            let total = analytics.get_usage(request).await.unwrap().into_inner().total;
            let total = total.unwrap_or_default();
            assert!(total.completion_tokens <= 50.0, "{total:?}");
            if total.requests >= 4.0 {
                assert_eq!((total.prompt_tokens, total.completion_tokens), (100.0, 50.0));
                return;
            }
        }
    })
    .await;
    let request = GetPerformanceRequest::default();
    let report = analytics.get_performance(request).await.unwrap().into_inner();
    assert!((report.cache_hit_rate - 0.75).abs() < 1e-9, "{}", report.cache_hit_rate);
    let metrics = mesh.metrics().await;
    assert!(metrics.sum("hapa_cache_hits_total", &["cache=\"code_generation\""]) >= 3.0);
    assert!(metrics.sum("hapa_cache_misses_total", &["cache=\"code_generation\""]) >= 1.0);
    mesh.finish().await;
}
