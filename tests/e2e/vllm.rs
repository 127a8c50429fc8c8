//! The simulator's behaviour, checked with a real vLLM. `make test-vllm` starts one with adapters and one with a
//! reasoning parser, and sets HAPA_TEST_ENGINE and HAPA_TEST_REASONING_ENGINE; the tests are ignored otherwise.

use hapa_proto::codegen::v1::{CompleteCodeRequest, GenerateCodeRequest, ListModelsRequest};
use hapa_test_harness::{TestMesh, incident, reqwest_client, within};
use serde_json::json;
use tonic::Code;

use crate::api::generate::{question, stream};

const WHY: &str = "HAPA_TEST_ENGINE names a vLLM; see `make test-vllm`";
/// A CPU generates only a few tokens per second.
const FEW: Option<i32> = Some(8);
const RUNNING: &str = "vllm:num_requests_running{";
const MADE: &str = "vllm:generation_tokens_total{";

fn url() -> String {
    std::env::var("HAPA_TEST_ENGINE").expect(WHY)
}

async fn mesh() -> TestMesh {
    mesh_with(&url()).await
}

async fn mesh_with(engine: &str) -> TestMesh {
    let engine = format!("--ai-model-endpoint={engine}");
    TestMesh::start_with(&[
        &engine,
        "--first-token-timeout-seconds=240",
        "--token-gap-timeout-seconds=120",
    ])
    .await
}

fn asked(task: &str) -> GenerateCodeRequest {
    let task = task.to_owned();
    GenerateCodeRequest { task, max_tokens: FEW, ..question("a function that adds two numbers") }
}

/// A metric of vLLM, summed over its labels.
async fn counter(name: &str) -> f64 {
    let url = format!("{}/metrics", url().trim_end_matches("/v1"));
    let page = reqwest::get(url).await.unwrap().text().await.unwrap();
    let lines = page.lines().filter(|line| line.starts_with(name));
    lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}

#[tokio::test]
#[ignore = "needs a vLLM: make test-vllm"]
async fn each_task_goes_to_its_adapter_and_the_tokens_are_those_that_vllm_counted() {
    let mesh = mesh().await;
    for (task, model) in [
        ("generate", "prompt"),
        ("fix", "error-fix"),
        ("explain", "comment"),
        ("complete", "autocomplete"),
    ] {
        let before = counter(MADE).await;
        let reply = mesh.client().generate_code(asked(task)).await.unwrap().into_inner();
        assert_eq!((reply.model.as_str(), reply.task.as_str()), (model, task));
        let usage = reply.usage.unwrap();
        assert_eq!(usage.total_tokens, usage.prompt_tokens + usage.completion_tokens);
        assert!(
            usage.prompt_tokens > 20 && (1..=8).contains(&usage.completion_tokens),
            "{usage:?}"
        );
        let made = counter(MADE).await - before;
        assert!((made - f64::from(usage.completion_tokens)).abs() < 0.5, "{made} {usage:?}");
    }
    let listed = mesh.client().list_models(ListModelsRequest {}).await.unwrap().into_inner();
    let prompt = listed.models.iter().find(|model| model.name == "prompt").unwrap();
    assert_eq!((prompt.parent.as_str(), prompt.replicas_healthy), ("smollm2-135m-instruct", 1));
    let base = listed.models.iter().find(|model| model.default).unwrap();
    assert_eq!((base.name.as_str(), base.max_model_len), ("smollm2-135m-instruct", 4_096));
    mesh.finish().await;
}

#[tokio::test]
#[ignore = "needs a vLLM: make test-vllm"]
async fn a_stream_ends_whole_and_one_that_is_left_is_aborted_in_vllm() {
    let mesh = mesh().await;
    let read = stream(&mut mesh.client(), asked("generate")).await;
    let finished = read.finished.unwrap();
    assert!(matches!(finished.finish_reason.as_str(), "stop" | "length"), "{finished:?}");
    assert!(!(read.code + &read.explanation).is_empty());

    let long = GenerateCodeRequest { max_tokens: Some(2_000), ..asked("generate") };
    let mut frames = mesh.client().stream_generate_code(long).await.unwrap().into_inner();
    for _ in 0..2 {
        frames.message().await.unwrap().expect("it goes on");
    }
    assert!(counter(RUNNING).await > 0.5);
    let made = counter(MADE).await;
    drop(frames);
    // vLLM does not count aborted requests, but 2,000 tokens would take it minutes.
    within("vLLM to notice", async { while counter(RUNNING).await > 0.5 {} }).await;
    assert!(counter(MADE).await - made < 500.0);
    mesh.finish().await;
}

#[tokio::test]
#[ignore = "needs a vLLM: make test-vllm"]
async fn what_the_reasoning_parser_of_vllm_separates_is_shown_on_request_and_counted() {
    let mesh = mesh_with(&std::env::var("HAPA_TEST_REASONING_ENGINE").expect(WHY)).await;
    for include_reasoning in [true, false] {
        let temperature = Some(0.0);
        let request = GenerateCodeRequest { include_reasoning, temperature, ..asked("generate") };
        let reply = mesh.client().generate_code(request).await.unwrap().into_inner();
        assert_eq!(!reply.reasoning.is_empty(), include_reasoning, "{reply:?}");
        // This model never ends its reasoning.
        assert_eq!((reply.generated_code.as_str(), reply.explanation.as_str()), ("", ""));
        let is_reported = reply.warnings.iter().any(|text| text.starts_with("the answer is empty"));
        assert!(is_reported, "{:?}", reply.warnings);
        let usage = reply.usage.unwrap();
        assert!((1..=8).contains(&usage.completion_tokens), "{usage:?}");
        assert!((1..=usage.completion_tokens).contains(&usage.reasoning_tokens), "{usage:?}");
    }
    mesh.finish().await;
}

#[tokio::test]
#[ignore = "needs a vLLM: make test-vllm"]
async fn refusals_of_vllm_become_published_errors() {
    let mesh = mesh().await;
    let long = GenerateCodeRequest { code_context: "word ".repeat(9_000), ..asked("generate") };
    let status = mesh.client().generate_code(long).await.unwrap_err();
    assert_eq!((incident(&status).0.as_str(), status.code()), ("E4001", Code::InvalidArgument));
    let unknown = GenerateCodeRequest { model: "nobody".to_owned(), ..asked("generate") };
    let status = mesh.client().generate_code(unknown).await.unwrap_err();
    assert_eq!((incident(&status).0.as_str(), status.code()), ("E4010", Code::NotFound));
    mesh.finish().await;
}

#[tokio::test]
#[ignore = "needs a vLLM: make test-vllm"]
async fn a_completion_of_a_model_without_a_middle_sees_the_prefix_alone_and_says_so() {
    let mesh = mesh().await;
    let request = CompleteCodeRequest {
        prefix: "def add(a, b):\n    return ".to_owned(),
        suffix: "\n\nprint(add(1, 2))\n".to_owned(),
        max_suggestions: Some(3),
        max_tokens: FEW,
        ..CompleteCodeRequest::default()
    };
    let reply = mesh.client().complete_code(request).await.unwrap().into_inner();
    assert_eq!(reply.model, "autocomplete");
    assert_eq!(reply.warnings.len(), 1, "{:?}", reply.warnings);
    assert!(reply.suggestions.len() <= 3);
    for suggestion in &reply.suggestions {
        assert!(suggestion.confidence > 0.0 && suggestion.confidence <= 1.0, "{suggestion:?}");
    }
    // HAPA never sends `suffix`, because vLLM supports it for few models.
    let body =
        json!({"model": "smollm2-135m-instruct", "prompt": "a", "suffix": "b", "max_tokens": 1});
    let refused = reqwest_client()
        .post(format!("{}/completions", url()))
        .header("content-type", "application/json")
        .body(body.to_string());
    assert_eq!(refused.send().await.unwrap().status(), 400);
    mesh.finish().await;
}
