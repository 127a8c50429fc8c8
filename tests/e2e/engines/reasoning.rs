//! Models that reason before they answer: reasoning counts as the begin of an answer, is billed, and is shown on request.

use hapa_engine_sim::{Engine, Script};
use hapa_proto::codegen::v1::stream_generate_code_response::{Event, Finished, Kind};
use hapa_proto::codegen::v1::{GenerateCodeRequest, StreamGenerateCodeResponse};
use hapa_test_harness::{TestMesh, incident, within};
use tonic::{Code, Status, Streaming};

use crate::api::generate::question;

/// Two tokens of reasoning and two of the answer.
fn reasoned() -> Script {
    Script::tokens(["let me ", "think", "x = ", "1\n"]).reasoning(2)
}

fn with_reasoning() -> GenerateCodeRequest {
    GenerateCodeRequest { include_reasoning: true, ..question("q") }
}

async fn open(
    mesh: &TestMesh,
    request: GenerateCodeRequest,
) -> Streaming<StreamGenerateCodeResponse> {
    mesh.client().stream_generate_code(request).await.unwrap().into_inner()
}

async fn next(frames: &mut Streaming<StreamGenerateCodeResponse>) -> Result<Option<Event>, Status> {
    Ok(within("an event", frames.message()).await?.and_then(|frame| frame.event))
}

/// The number of reasoning tokens in the next heartbeat.
async fn heartbeat(frames: &mut Streaming<StreamGenerateCodeResponse>) -> u32 {
    loop {
        if let Event::Heartbeat(heartbeat) = next(frames).await.unwrap().unwrap() {
            return heartbeat.reasoning_tokens;
        }
    }
}

/// The reasoning, all other text, and the end.
async fn read(mut frames: Streaming<StreamGenerateCodeResponse>) -> (String, String, Finished) {
    let (mut reasoning, mut answer) = (String::new(), String::new());
    loop {
        match next(&mut frames).await.unwrap().unwrap() {
            Event::Delta(delta) if delta.kind() == Kind::Reasoning => reasoning += &delta.text,
            Event::Delta(delta) => answer += &delta.text,
            Event::Finished(finished) => return (reasoning, answer, finished),
            _ => {}
        }
    }
}

#[tokio::test]
async fn an_engine_that_reasons_longer_than_every_timeout_of_the_first_token_is_asked_once() {
    let settings = ["--first-token-timeout-seconds=0.3", "--heartbeat-seconds=0.05"];
    let mesh = TestMesh::with_engines(2, &settings).await;
    mesh.engines().for_each(|engine| engine.script(reasoned().hold(2)));
    let mut frames = open(&mesh, question("q")).await;
    let mut beats = 0;
    // Longer than the timeout.
    while beats < 12 {
        beats += u32::from(heartbeat(&mut frames).await == 2);
    }
    mesh.engines().for_each(Engine::release);
    let (reasoning, answer, finished) = read(frames).await;
    assert_eq!((reasoning.as_str(), answer.as_str()), ("", "x = 1\n"));
    let usage = finished.usage.unwrap();
    assert_eq!((usage.completion_tokens, usage.reasoning_tokens), (4, 2));
    assert!(finished.time_to_first_answer_token_ms > finished.time_to_first_token_ms);
    assert_eq!(mesh.engines().map(|engine| engine.counts().started).sum::<u64>(), 1);
    let metrics = mesh.metrics().await;
    for engine in mesh.engines() {
        let labels = [&*format!("engine=\"{}\"", engine.address()), "outcome=\"failure\""];
        assert!(metrics.sum("hapa_engine_attempts_total", &labels) < 0.5);
    }
    mesh.finish().await;
}

#[tokio::test]
async fn reasoning_is_shown_to_callers_that_request_it() {
    let mesh = TestMesh::start_with(&["--cache-ttl=60"]).await;
    mesh.engine.script(reasoned());
    let (reasoning, answer, finished) = read(open(&mesh, with_reasoning()).await).await;
    assert_eq!((reasoning.as_str(), answer.as_str()), ("let me think", "x = 1\n"));
    assert_eq!(finished.warnings, Vec::<String>::new());
    // From the cache, for both kinds of callers.
    let shown = mesh.client().generate_code(with_reasoning()).await.unwrap().into_inner();
    assert_eq!((shown.reasoning.as_str(), shown.cached), ("let me think", true));
    assert_eq!(shown.generated_code, "x = 1\n");
    let hidden = mesh.client().generate_code(question("q")).await.unwrap().into_inner();
    assert_eq!((hidden.reasoning.as_str(), hidden.generated_code.as_str()), ("", "x = 1\n"));
    assert_eq!(mesh.engine.requests().len(), 1);
    mesh.finish().await;
}

#[tokio::test]
async fn inline_reasoning_is_separated_and_a_template_that_opens_it_is_learned() {
    let mesh = TestMesh::start().await;
    let draft = "<think>\n```python\nimport os\n```\n</think>\n```python\nx = 1\n```\n";
    mesh.engine.script(Script::text(draft));
    let reply = mesh.client().generate_code(with_reasoning()).await.unwrap().into_inner();
    assert_eq!(reply.generated_code, "x = 1\n");
    assert!(reply.reasoning.contains("import os") && reply.explanation.trim().is_empty());

    mesh.engine.script(Script::text("I think first.\n</think>\n```python\nx = 1\n```\n"));
    let request = GenerateCodeRequest { model: "comment".to_owned(), ..with_reasoning() };
    let first = mesh.client().generate_code(request.clone()).await.unwrap().into_inner();
    assert_eq!((first.generated_code.as_str(), first.explanation.as_str()), ("x = 1\n", ""));
    assert_eq!(first.reasoning, "I think first.\n");
    assert_eq!(first.warnings.len(), 1, "{:?}", first.warnings);
    let (reasoning, answer, finished) = read(open(&mesh, request).await).await;
    assert_eq!((reasoning.as_str(), answer.as_str()), ("I think first.\n", "x = 1\n"));
    assert_eq!(finished.warnings, Vec::<String>::new());
    mesh.finish().await;
}

#[tokio::test]
async fn reasoning_without_an_answer_is_bounded_and_reported() {
    let mesh = TestMesh::start_with(&["--cache-ttl=60", "--reasoning-timeout-seconds=0.2"]).await;
    mesh.engine.script(Script::tokens(["a", "b", "c"]).reasoning(3));
    let limited = GenerateCodeRequest { max_reasoning_tokens: Some(2), ..question("q") };
    let status = mesh.client().generate_code(limited).await.unwrap_err();
    assert_eq!((incident(&status).0.as_str(), status.code()), ("E5007", Code::Unavailable));
    // Never cached.
    for _ in 0..2 {
        let reply = mesh.client().generate_code(question("q")).await.unwrap().into_inner();
        assert!(!reply.cached && reply.generated_code.is_empty());
        assert!(reply.warnings[0].starts_with("the answer is empty"), "{:?}", reply.warnings);
    }
    mesh.engine.script(Script::tokens(["a", "b"]).reasoning(2).hold(1));
    let status = mesh.client().generate_code(question("longer")).await.unwrap_err();
    assert_eq!((incident(&status).0.as_str(), status.code()), ("E5001", Code::DeadlineExceeded));
    mesh.engine.wait_for_aborted(1).await;
    mesh.finish().await;
}
