//! The fair queue: more requests than the engines can serve. It covers the order, refusals, and that no tenant
//! delays the others.

use hapa_engine_sim::Script;
use hapa_proto::codegen::v1::{GenerateCodeRequest, GenerateCodeResponse};
use hapa_test_harness::{CodegenClient, TestMesh, incident, within};
use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tonic::{Code, Response, Status};

use crate::api::generate::question;

type Reply = Result<Response<GenerateCodeResponse>, Status>;

/// The gauge of waiting generations is the sum over all meshes of the process: tests that read it run one
/// after the other.
static QUEUE: Mutex<()> = Mutex::const_new(());

async fn tenant(mesh: &TestMesh, owner: &str) -> CodegenClient {
    let mut key = TestMesh::dev_key();
    owner.clone_into(&mut key.owner);
    mesh.client_with(&mesh.create_key(key).await.key_text)
}

fn ask(calls: &mut JoinSet<Reply>, client: &CodegenClient, text: &str) {
    let mut client = client.clone();
    // `no_cache`: each is to be a generation of its own.
    let request = GenerateCodeRequest { no_cache: true, ..question(text) };
    calls.spawn(async move { client.generate_code(request).await });
}

async fn waiting(mesh: &TestMesh, wanted: f64) {
    let metrics = async {
        while (mesh.metrics().await.sum("hapa_generations_waiting", &[]) - wanted).abs() > 0.1 {}
    };
    within("the queue", metrics).await;
}

#[tokio::test]
async fn requests_beyond_the_queue_are_refused_at_once_with_a_retry_delay() {
    let _alone = QUEUE.lock().await;
    let flags = ["--max-generations=1", "--max-waiting=1", "--waiting-timeout-seconds=60"];
    let mesh = TestMesh::start_with(&flags).await;
    mesh.engine.script(Script::text("answer").hold(0));
    let client = tenant(&mesh, "ours").await;
    let (mut first, mut second) = (JoinSet::new(), JoinSet::new());
    ask(&mut first, &client, "first");
    mesh.engine.wait_for_started(1).await;
    ask(&mut second, &client, "second");
    waiting(&mesh, 1.0).await;

    let refused = client.clone().generate_code(question("third")).await.unwrap_err();
    assert_eq!((incident(&refused).0.as_str(), refused.code()), ("E5005", Code::Unavailable));
    assert!(refused.metadata().contains_key("retry-after"), "{refused:?}");

    mesh.engine.release();
    mesh.engine.release();
    for calls in [first, second] {
        for reply in calls.join_all().await {
            assert_eq!(reply.unwrap().into_inner().generated_code, "answer");
        }
    }
    assert_eq!(mesh.engine.counts().started, 2);
    mesh.finish().await;
}

#[tokio::test]
async fn a_request_that_leaves_the_queue_never_reaches_the_engine() {
    let _alone = QUEUE.lock().await;
    let flags = ["--max-generations=1", "--waiting-timeout-seconds=60"];
    let mesh = TestMesh::start_with(&flags).await;
    mesh.engine.script(Script::text("answer").hold(0));
    let client = tenant(&mesh, "ours").await;
    let mut calls = JoinSet::new();
    ask(&mut calls, &client, "first");
    mesh.engine.wait_for_started(1).await;
    let mut left = JoinSet::new();
    ask(&mut left, &client, "second");
    waiting(&mesh, 1.0).await;
    left.shutdown().await;
    waiting(&mesh, 0.0).await;
    mesh.engine.release();
    assert!(calls.join_next().await.unwrap().unwrap().is_ok());
    assert_eq!(mesh.engine.counts().started, 1);
    mesh.finish().await;
}

#[tokio::test]
async fn a_busy_tenant_delays_only_itself() {
    let _alone = QUEUE.lock().await;
    let flags = ["--max-generations=4", "--max-waiting=100", "--waiting-timeout-seconds=60"];
    let mesh = TestMesh::start_with(&flags).await;
    mesh.engine.script(Script::text("answer").hold(0));
    let (greedy, modest) = (tenant(&mesh, "greedy").await, tenant(&mesh, "modest").await);
    let mut much = JoinSet::new();
    for _ in 0..60 {
        ask(&mut much, &greedy, "much");
    }
    waiting(&mesh, 56.0).await;
    let mut little = JoinSet::new();
    for _ in 0..4 {
        ask(&mut little, &modest, "little");
    }
    waiting(&mesh, 60.0).await;
    // Every free slot goes to the tenant with fewer slots, until both have half.
    for _ in 0..64 {
        mesh.engine.release();
    }
    for reply in little.join_all().await {
        reply.unwrap();
    }
    for reply in much.join_all().await {
        reply.unwrap();
    }
    let asked: Vec<_> = mesh
        .engine
        .requests()
        .iter()
        .map(|request| request.body["messages"][1]["content"].as_str().unwrap().to_owned())
        .collect();
    let last = asked.iter().rposition(|text| text == "little").unwrap();
    assert!(last < 12, "the modest one's last call was number {last} of {}", asked.len());
    mesh.finish().await;
}

#[tokio::test]
async fn engines_receive_only_a_pseudonym_of_each_tenant() {
    let mesh = TestMesh::start_with(&["--prioritize-completions=true"]).await;
    let (one, other) = (tenant(&mesh, "one").await, tenant(&mesh, "other").await);
    for client in [&one, &one, &other] {
        let request = GenerateCodeRequest { no_cache: true, ..question("q") };
        client.clone().generate_code(request).await.unwrap();
    }
    let requests = mesh.engine.requests();
    let salts: Vec<_> =
        requests.iter().map(|request| request.body["cache_salt"].as_str().unwrap()).collect();
    assert_eq!(salts[0], salts[1]);
    assert_ne!(salts[0], salts[2]);
    assert!(requests.iter().all(|request| request.body["priority"] == 1));
    mesh.finish().await;
}
