//! Streamed generation: frames, kinds, profile, deadlines, and the errors of broken streams.

use std::time::Duration;

use hapa_engine_sim::{Fault, LineEnd, Script};
use hapa_proto::codegen::v1::stream_generate_code_response::{
    Event, Failed, Finished, Kind, Started,
};
use hapa_proto::codegen::v1::{GenerateCodeRequest, UserProfile};
use hapa_test_harness::{CodegenClient, TestMesh, incident, within};
use tonic::{Code, Request, Response, Status, Streaming};

pub(crate) fn question(text: &str) -> GenerateCodeRequest {
    GenerateCodeRequest { user_question: text.to_owned(), ..GenerateCodeRequest::default() }
}

/// A stream, read to its end.
#[derive(Debug, Default)]
pub(crate) struct Read {
    pub(crate) started: Option<Started>,
    pub(crate) code: String,
    pub(crate) explanation: String,
    pub(crate) heartbeats: usize,
    pub(crate) finished: Option<Finished>,
    pub(crate) failed: Option<Failed>,
    pub(crate) status: Option<Status>,
}

pub(crate) async fn stream(
    client: &mut CodegenClient,
    request: impl tonic::IntoRequest<GenerateCodeRequest>,
) -> Read {
    let (mut read, mut sequence) = (Read::default(), 0..);
    let end = to_its_end(client.stream_generate_code(request), |frame| {
        assert_eq!(Some(frame.sequence), sequence.next());
        assert!(read.finished.is_none() && read.failed.is_none(), "nothing follows the last frame");
        match frame.event.expect("a frame says something") {
            Event::Started(started) => read.started = Some(started),
            Event::Delta(delta) if delta.kind() == Kind::Code => read.code += &delta.text,
            Event::Delta(delta) => read.explanation += &delta.text,
            Event::Heartbeat(_) => read.heartbeats += 1,
            Event::Finished(finished) => read.finished = Some(finished),
            Event::Failed(failed) => read.failed = Some(failed),
        }
    });
    let status = end.await.err();
    Read { status, ..read }
}

/// Reads a stream to its end; the error is the status of a failed stream.
pub(crate) async fn to_its_end<T>(
    called: impl Future<Output = Result<Response<Streaming<T>>, Status>>,
    mut read: impl FnMut(T),
) -> Result<(), Status> {
    within("a stream to end", async {
        let mut frames = called.await?.into_inner();
        while let Some(frame) = frames.message().await? {
            read(frame);
        }
        Ok(())
    })
    .await
}

const ANSWER: &str = "먼저 보기입니다.\n```python\nprint('안녕')\n```\n끝.";

#[tokio::test]
async fn a_stream_is_started_then_text_by_kind_then_finished() {
    let mesh = TestMesh::start().await;
    mesh.engine.script(Script::text(ANSWER).usage(11, 7));
    let request = GenerateCodeRequest { request_id: "mine-1".to_owned(), ..question("인사") };
    let read = stream(&mut mesh.client(), request).await;
    let started = read.started.unwrap();
    assert_eq!((started.request_id.as_str(), started.model.as_str()), ("mine-1", "prompt"));
    assert_eq!((started.task.as_str(), started.cached), ("generate", false));
    assert_eq!(read.code, "print('안녕')\n");
    assert_eq!(read.explanation, "먼저 보기입니다.\n끝.");
    let finished = read.finished.unwrap();
    assert_eq!(finished.finish_reason, "stop");
    let usage = finished.usage.unwrap();
    assert_eq!((usage.prompt_tokens, usage.completion_tokens, usage.total_tokens), (11, 7, 18));
    assert!(read.status.is_none());
    mesh.finish().await;
}

#[tokio::test]
async fn one_reply_holds_what_the_stream_would() {
    let mesh = TestMesh::start().await;
    mesh.engine.script(Script::text(ANSWER));
    let reply = mesh.client().generate_code(question("인사")).await.unwrap().into_inner();
    assert_eq!(reply.generated_code, "print('안녕')\n");
    assert_eq!(reply.explanation, "먼저 보기입니다.\n끝.");
    assert_eq!((reply.status.as_str(), reply.finish_reason.as_str()), ("success", "stop"));
    assert!(!reply.request_id.is_empty());
    mesh.engine.script(Script::text("x = 1"));
    let reply = mesh.client().generate_code(question("plain")).await.unwrap().into_inner();
    assert_eq!((reply.generated_code.as_str(), reply.explanation.as_str()), ("x = 1", ""));
    mesh.finish().await;
}

#[tokio::test]
async fn the_text_is_the_same_however_the_engine_cuts_its_bytes() {
    let mesh = TestMesh::start().await;
    let scripts = [
        Script::text(ANSWER).pieces(1),
        Script::text(ANSWER).pieces(7).line_end(LineEnd::CrLf).comments(),
        Script::text(ANSWER).batch(100),
        Script::tokens(ANSWER.split_inclusive(|_| true)).comments(),
    ];
    for script in scripts {
        mesh.engine.once(script);
        let read = stream(&mut mesh.client(), question("q")).await;
        assert_eq!(read.code, "print('안녕')\n");
        assert_eq!(read.explanation, "먼저 보기입니다.\n끝.");
    }
    mesh.finish().await;
}

#[tokio::test]
async fn the_profile_and_the_language_of_the_question_shape_the_prompt() {
    let mesh = TestMesh::start().await;
    let profile =
        UserProfile { python_skill_level: "beginner".to_owned(), ..UserProfile::default() };
    let request = GenerateCodeRequest {
        user_profile: Some(profile),
        code_context: "a = [1, 1]".to_owned(),
        ..question("리스트에서 중복 제거하는 함수")
    };
    mesh.client().generate_code(request).await.unwrap();
    let body = &mesh.engine.requests()[0].body;
    let system = body["messages"][0]["content"].as_str().unwrap();
    assert!(system.contains("beginner") && system.contains("Explain in Korean"), "{system}");
    let user = body["messages"][1]["content"].as_str().unwrap();
    assert!(user.contains("리스트에서") && user.contains("a = [1, 1]"), "{user}");
    assert_eq!(body["stream_options"]["include_usage"], true);
    mesh.finish().await;
}

#[tokio::test]
async fn heartbeats_fill_the_silence_before_and_between_tokens() {
    let mesh = TestMesh::start_with(&["--heartbeat-seconds=0.05"]).await;
    mesh.engine.once(Fault::HangBeforeHeaders);
    let mut frames = mesh.client().stream_generate_code(question("q")).await.unwrap().into_inner();
    let mut seen = Vec::new();
    while seen.len() < 3 {
        seen.push(within("a frame", frames.message()).await.unwrap().unwrap().event.unwrap());
    }
    assert!(matches!(seen[..], [Event::Started(_), Event::Heartbeat(_), Event::Heartbeat(_)]));
    drop(frames);

    mesh.engine.once(Script::tokens(["a", "b"]).hold(1));
    let mut frames = mesh.client().stream_generate_code(question("q")).await.unwrap().into_inner();
    let mut beats = 0;
    while beats < 2 {
        let event = within("a frame", frames.message()).await.unwrap().unwrap().event;
        beats += usize::from(matches!(event, Some(Event::Heartbeat(_))));
    }
    mesh.engine.release();
    let rest = within("the end", async {
        let mut last = None;
        while let Some(frame) = frames.message().await.unwrap() {
            last = frame.event;
        }
        last
    });
    assert!(matches!(rest.await, Some(Event::Finished(_))));
    mesh.finish().await;
}

#[tokio::test]
async fn a_client_that_leaves_at_any_moment_ends_the_engines_work() {
    let mesh = TestMesh::start().await;
    let silent = [
        Script::from(Fault::HangBeforeHeaders),
        Script::from(Fault::HangAfterHeaders),
        Script::tokens(["a", "b", "c"]).fault(Fault::StallAfter(2)),
    ];
    for (index, script) in (1..).zip(silent) {
        mesh.engine.once(script);
        let mut client = mesh.client();
        let call = tokio::spawn(async move {
            let mut frames = client.stream_generate_code(question("q")).await?.into_inner();
            while frames.message().await?.is_some() {}
            Ok::<_, Status>(())
        });
        mesh.engine.wait_for_started(index).await;
        call.abort();
        mesh.engine.wait_for_aborted(index).await;
    }
    // The same holds for a unary call.
    mesh.engine.once(Fault::HangAfterHeaders);
    let mut client = mesh.client();
    let call = tokio::spawn(async move { client.generate_code(question("q")).await });
    mesh.engine.wait_for_started(4).await;
    call.abort();
    mesh.engine.wait_for_aborted(4).await;
    // The same if the client drops a stream that the engine sends at full speed.
    let token = "t".repeat(16 * 1024);
    mesh.engine.once(Script::tokens(std::iter::repeat_n(token.as_str(), 4_000)));
    let request = GenerateCodeRequest { max_tokens: Some(4_096), ..question("q") };
    let mut frames = mesh.client().stream_generate_code(request).await.unwrap().into_inner();
    within("a frame", frames.message()).await.unwrap();
    drop(frames);
    mesh.engine.wait_for_aborted(5).await;
    assert_eq!(mesh.engine.in_flight(), 0);
    mesh.finish().await;
}

#[tokio::test]
async fn an_unread_stream_slows_the_engine_instead_of_filling_memory() {
    let mesh = TestMesh::start().await;
    // Far more than the sockets on the way can hold.
    let token = "t".repeat(16 * 1024);
    mesh.engine.once(Script::tokens(std::iter::repeat_n(token.as_str(), 4_000)));
    let request = GenerateCodeRequest { max_tokens: Some(4_096), ..question("q") };
    let _unread = mesh.client().stream_generate_code(request).await.unwrap();
    // Other calls on the same connection are not affected.
    for _ in 0..20 {
        let read = stream(&mut mesh.client(), question("q")).await;
        assert!(read.finished.is_some(), "{read:?}");
    }
    let counts = mesh.engine.counts();
    assert_eq!(counts.in_flight(), 1, "{counts:?}");
    mesh.finish().await;
}

#[tokio::test]
async fn the_callers_deadline_ends_a_stream_in_its_middle_and_says_so() {
    let mesh = TestMesh::start().await;
    mesh.engine.once(Script::tokens(["a", "b"]).fault(Fault::StallAfter(1)));
    let mut request = Request::new(question("q"));
    // Set by hand: `set_timeout` would also end the call on this side, before the answer is read.
    request.metadata_mut().insert("grpc-timeout", "300m".parse().unwrap());
    let read = stream(&mut mesh.client(), request).await;
    assert_eq!(read.explanation, "a");
    let (failed, status) = (read.failed.unwrap(), read.status.unwrap());
    assert_eq!(status.code(), Code::DeadlineExceeded);
    assert_eq!((failed.error_code.as_str(), failed.partial), ("E5001", true));
    assert_eq!(incident(&status), ("E5001".to_owned(), failed.incident_id));
    mesh.engine.wait_for_aborted(1).await;
    mesh.finish().await;
}

#[tokio::test]
async fn first_token_gap_and_whole_answer_have_bounds_of_their_own() {
    let short = [
        "--first-token-timeout-seconds=0.2",
        "--token-gap-timeout-seconds=0.2",
        "--vllm-timeout-seconds=0.6",
    ];
    let mesh = TestMesh::start_with(&short).await;
    let cases = [
        (Script::from(Fault::HangBeforeHeaders), "E5001", Code::DeadlineExceeded),
        (Script::from(Fault::HangAfterHeaders), "E5001", Code::DeadlineExceeded),
        (Script::tokens(["a", "b"]).fault(Fault::StallAfter(1)), "E5007", Code::Unavailable),
        (
            Script::tokens(std::iter::repeat_n("a", 1_000)).gap(Duration::from_millis(20)),
            "E5001",
            Code::DeadlineExceeded,
        ),
    ];
    for (script, code, grpc) in cases {
        mesh.engine.once(script.clone());
        let status = stream(&mut mesh.client(), question("q")).await.status.unwrap();
        assert_eq!((incident(&status).0.as_str(), status.code()), (code, grpc), "{script:?}");
        mesh.engine.once(script);
        let status = mesh.client().generate_code(question("q")).await.unwrap_err();
        assert_eq!((incident(&status).0.as_str(), status.code()), (code, grpc));
    }
    mesh.engine.wait_for_aborted(8).await;
    mesh.finish().await;
}

#[tokio::test]
async fn an_engine_that_never_pauses_is_held_to_the_deadline_too() {
    // 64 MiB in 50 ms: no reader is that fast.
    let mesh = TestMesh::start_with(&["--vllm-timeout-seconds=0.05"]).await;
    let token = "t".repeat(16 * 1024);
    mesh.engine.once(Script::tokens(std::iter::repeat_n(token.as_str(), 4_096)));
    let request = GenerateCodeRequest { max_tokens: Some(4_096), ..question("q") };
    let read = stream(&mut mesh.client(), request).await;
    assert!(read.finished.is_none());
    assert_eq!(incident(&read.status.unwrap()).0, "E5001");
    mesh.finish().await;
}

#[tokio::test]
async fn models_are_listed_and_a_key_may_be_limited_to_some() {
    let mesh = TestMesh::start().await;
    let models = mesh.client().list_models(hapa_proto::codegen::v1::ListModelsRequest {}).await;
    let models = models.unwrap().into_inner().models;
    let names: Vec<_> = models.iter().map(|model| model.name.as_str()).collect();
    assert_eq!(names, ["autocomplete", "comment", "error-fix", "prompt", "sim-coder"]);
    let default = models.iter().find(|model| model.default).unwrap();
    assert_eq!((default.name.as_str(), default.max_model_len), ("sim-coder", 32_768));

    let mut limited = TestMesh::dev_key();
    limited.allowed_models = vec!["comment".to_owned()];
    let mut client = mesh.client_with(&mesh.create_key(limited).await.key_text);
    let refused = client.generate_code(question("q")).await.unwrap_err();
    assert_eq!((incident(&refused).0.as_str(), refused.code()), ("E4005", Code::PermissionDenied));
    let request = GenerateCodeRequest { model: "comment".to_owned(), ..question("q") };
    assert_eq!(client.generate_code(request).await.unwrap().into_inner().model, "comment");
    mesh.finish().await;
}

#[tokio::test]
async fn health_says_what_the_engine_does() {
    let mesh = TestMesh::start().await;
    let health = async || {
        let request = hapa_proto::codegen::v1::GetCodeHealthRequest {};
        mesh.client().get_code_health(request).await.unwrap().into_inner()
    };
    let healthy = health().await;
    assert_eq!(
        (healthy.status.as_str(), healthy.model.as_str(), healthy.models),
        ("healthy", "sim-coder", 5)
    );
    mesh.engine.stop().await;
    let sick = health().await;
    assert_eq!((sick.status.as_str(), sick.models), ("unhealthy", 0));
    assert!(!sick.message.is_empty());
    mesh.engine.resume();
    assert_eq!(health().await.status, "healthy");
    mesh.finish().await;
}
