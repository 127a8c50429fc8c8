//! Models of tasks: which model serves which task, and the report if another one had to.

use hapa_engine_sim::Setup;
use hapa_proto::codegen::v1::{GenerateCodeRequest, GenerateCodeResponse, ListModelsRequest};
use hapa_test_harness::TestMesh;
use serde_json::Value;

use crate::api::generate::{question, stream};

async fn ask(mesh: &TestMesh, request: GenerateCodeRequest) -> (GenerateCodeResponse, Value) {
    let reply = mesh.client().generate_code(request).await.unwrap().into_inner();
    (reply, mesh.engine.requests().pop().unwrap().body)
}

async fn with_adapters(adapters: &[&str]) -> TestMesh {
    let adapters = adapters.iter().map(|&name| name.to_owned()).collect();
    TestMesh::with_engine(Setup { adapters, ..Setup::default() }).await
}

#[tokio::test]
async fn a_question_goes_to_the_specialist_for_what_it_asks_with_its_sampling() {
    let mesh = TestMesh::start().await;
    let expected = [
        ("a web server", "generate", "prompt", 2_028, 0.6),
        ("Traceback (most recent call last):\n  ...", "fix", "error-fix", 1_024, 0.5),
        ("이 코드를 설명해주세요", "explain", "comment", 512, 0.4),
        ("def fibonacci(n):", "complete", "autocomplete", 128, 0.3),
    ];
    for (text, task, model, max_tokens, temperature) in expected {
        let (reply, asked) = ask(&mesh, question(text)).await;
        assert_eq!((reply.task.as_str(), reply.model.as_str()), (task, model));
        assert_eq!(reply.warnings, Vec::<String>::new());
        assert_eq!(asked["model"], model);
        assert_eq!(asked["max_tokens"], max_tokens);
        assert_eq!(asked["temperature"], temperature);
    }
    let named = GenerateCodeRequest {
        task: "explain".to_owned(),
        model: "sim-coder".to_owned(),
        max_tokens: Some(9),
        ..question("def fibonacci(n):")
    };
    let (reply, asked) = ask(&mesh, named).await;
    assert_eq!((reply.task.as_str(), reply.model.as_str()), ("explain", "sim-coder"));
    assert_eq!((&asked["max_tokens"], &asked["temperature"]), (&9.into(), &0.4.into()));
    mesh.finish().await;
}

#[tokio::test]
async fn a_specialist_that_is_away_is_replaced_and_the_answer_says_so() {
    let mesh = with_adapters(&["prompt"]).await;
    let fix = GenerateCodeRequest { task: "fix".to_owned(), ..question("q") };
    let words = ["no engine serves error_fix, the model for the task fix: sim-coder answered"];
    let (reply, _) = ask(&mesh, fix.clone()).await;
    assert_eq!(
        (reply.model.as_str(), reply.warnings.as_slice()),
        ("sim-coder", &words.map(str::to_owned)[..])
    );
    let read = stream(&mut mesh.client(), fix).await;
    assert_eq!(read.finished.unwrap().warnings, words);

    let mesh = with_adapters(&[]).await;
    let (reply, _) = ask(&mesh, question("q")).await;
    assert_eq!((reply.model.as_str(), reply.warnings.len()), ("sim-coder", 0));
}

#[tokio::test]
async fn a_key_that_may_use_some_models_gets_a_specialist_only_among_them() {
    let mesh = TestMesh::start().await;
    let mut limited = TestMesh::dev_key();
    limited.allowed_models = vec!["sim-coder".to_owned(), "prompt".to_owned()];
    let mut client = mesh.client_with(&mesh.create_key(limited).await.key_text);
    let reply = client.generate_code(question("q")).await.unwrap().into_inner();
    assert_eq!((reply.model.as_str(), reply.warnings.len()), ("prompt", 0));
    let fix = GenerateCodeRequest { task: "fix".to_owned(), ..question("q") };
    let reply = client.generate_code(fix).await.unwrap().into_inner();
    assert_eq!(reply.model, "sim-coder");
    assert!(reply.warnings[0].starts_with("this key may not use error_fix"), "{reply:?}");
    mesh.finish().await;
}

#[tokio::test]
async fn settings_assign_tasks_to_other_models_and_the_list_shows_them() {
    let flags = ["--task-models=fix=sim-coder,test=comment", "--fallback-model=comment"];
    let mesh = TestMesh::start_with(&flags).await;
    let listed = mesh.client().list_models(ListModelsRequest {}).await.unwrap().into_inner();
    let tasks: Vec<_> =
        listed.models.iter().map(|model| (model.name.as_str(), model.tasks.join(" "))).collect();
    let expected = [
        ("autocomplete", "complete"),
        ("comment", "comment explain review test"),
        ("error-fix", ""),
        ("prompt", "generate optimize"),
        ("sim-coder", "fix"),
    ];
    assert_eq!(tasks, expected.map(|(name, tasks)| (name, tasks.to_owned())));
    let fix = GenerateCodeRequest { task: "fix".to_owned(), ..question("q") };
    assert_eq!(ask(&mesh, fix).await.0.model, "sim-coder");
    mesh.finish().await;
}
