//! Code completion at a cursor: suggestions, their bounds, sharing, and cancellation.

use std::time::Instant;

use hapa_engine_sim::{Fault, Script, Setup};
use hapa_proto::auth::v1::{CreateKeyRequest, RevokeKeyRequest};
use hapa_proto::codegen::v1::stream_complete_code_response::{Event, Failed, Finished, Started};
use hapa_proto::codegen::v1::{CompleteCodeRequest, CompleteCodeResponse};
use hapa_test_harness::{CodegenClient, TestMesh, incident, within};
use serde_json::json;
use tonic::{Code, Status};

use crate::api::generate::to_its_end;

fn cursor(prefix: &str) -> CompleteCodeRequest {
    CompleteCodeRequest { prefix: prefix.to_owned(), ..CompleteCodeRequest::default() }
}

/// As above, in a session.
fn typing(prefix: &str) -> CompleteCodeRequest {
    CompleteCodeRequest { session_id: "editor".to_owned(), ..cursor(prefix) }
}

fn texts(reply: &CompleteCodeResponse) -> Vec<&str> {
    reply.suggestions.iter().map(|one| one.text.as_str()).collect()
}

async fn complete(client: &mut CodegenClient, asked: CompleteCodeRequest) -> CompleteCodeResponse {
    within("suggestions", client.complete_code(asked)).await.unwrap().into_inner()
}

/// A stream, read to its end.
#[derive(Debug, Default)]
struct Read {
    started: Option<Started>,
    said: Vec<String>,
    heartbeats: usize,
    finished: Option<Finished>,
    failed: Option<Failed>,
    status: Option<Status>,
}

async fn stream(client: &mut CodegenClient, asked: CompleteCodeRequest) -> Read {
    let mut sequence = 0..;
    let mut read = Read { said: vec![String::new(); 20], ..Read::default() };
    let end = to_its_end(client.stream_complete_code(asked), |frame| {
        assert_eq!(Some(frame.sequence), sequence.next());
        assert!(read.finished.is_none() && read.failed.is_none(), "nothing follows the last");
        match frame.event.expect("a frame says something") {
            Event::Started(started) => read.started = Some(started),
            Event::Delta(delta) => {
                read.said[usize::try_from(delta.suggestion).unwrap()] += &delta.text;
            }
            Event::Heartbeat(_) => read.heartbeats += 1,
            Event::Finished(finished) => read.finished = Some(finished),
            Event::Failed(failed) => read.failed = Some(failed),
        }
    });
    let status = end.await.err();
    Read { status, ..read }
}

fn three() -> Script {
    Script::choices([
        Script::tokens(["a", ", ", "b", ")"]).logprob(-0.5),
        Script::tokens(["이름", ")", "\n"]).logprob(-0.125),
        Script::tokens(["a, ", "b"]).logprob(-1.0),
    ])
}

#[tokio::test]
async fn suggestions_are_distinct_trimmed_and_the_surest_come_first() {
    let mesh = TestMesh::start().await;
    mesh.engine.script(three());
    let asked = CompleteCodeRequest {
        suffix: ")\n".to_owned(),
        request_id: "mine-1".to_owned(),
        max_suggestions: Some(3),
        ..cursor("print(")
    };
    let reply = complete(&mut mesh.client(), asked).await;
    assert_eq!(texts(&reply), ["이름", "a, b"], "{reply:?}");
    let sure: Vec<_> = reply.suggestions.iter().map(|one| one.confidence).collect();
    assert!(
        (sure[0] - (-0.125_f64).exp()).abs() < 1e-9 && (sure[1] - (-0.5_f64).exp()).abs() < 1e-9
    );
    assert!(reply.suggestions.iter().all(|one| one.completion_type == "inline"));
    assert_eq!((reply.model.as_str(), reply.request_id.as_str()), ("autocomplete", "mine-1"));
    assert!(!reply.cached);
    assert!(reply.usage.unwrap().completion_tokens >= 8, "{reply:?}");
    // The simulator's model belongs to no known family.
    assert_eq!(reply.warnings.len(), 1);
    let body = &mesh.engine.requests()[0].body;
    assert_eq!(body["prompt"], "print(");
    assert_eq!(
        (&body["n"], &body["max_tokens"], &body["logprobs"]),
        (&json!(3), &json!(128), &json!(1))
    );
    assert_eq!((&body["temperature"], &body["top_p"]), (&json!(0.3), &json!(0.9)));
    assert!(body.get("suffix").is_none());
    mesh.finish().await;
}

#[tokio::test]
async fn a_known_family_fills_in_the_middle_also_behind_an_adapters_name() {
    let setup =
        Setup { model: "deepseek-ai/deepseek-coder-6.7b-base".to_owned(), ..Setup::default() };
    let mesh = TestMesh::with_engine(setup).await;
    mesh.engine.script(Script::text("a"));
    let asked = CompleteCodeRequest {
        suffix: "\n# <｜fim▁end｜>".to_owned(),
        model: "autocomplete".to_owned(),
        ..cursor("x = ")
    };
    let reply = complete(&mut mesh.client(), asked).await;
    assert!(reply.warnings.is_empty(), "{:?}", reply.warnings);
    let body = &mesh.engine.requests()[0].body;
    let prompt = "<｜fim▁begin｜>x = <｜fim▁hole｜>\n# < ｜fim▁end｜><｜fim▁end｜>";
    assert_eq!((&body["prompt"], &body["model"]), (&json!(prompt), &json!("autocomplete")));
    assert!(body["stop"].as_array().unwrap().len() <= 4);
    mesh.finish().await;
}

#[tokio::test]
async fn a_stream_shows_suggestions_while_they_grow_and_ends_with_the_final_ones() {
    let mesh = TestMesh::start().await;
    mesh.engine.script(three());
    let asked = CompleteCodeRequest {
        suffix: ")\n".to_owned(),
        max_suggestions: Some(3),
        ..cursor("print(")
    };
    let read = stream(&mut mesh.client(), asked).await;
    assert_eq!(read.said[..3], ["a, b)", "이름)", "a, b"]);
    assert!(!read.started.unwrap().cached && read.status.is_none());
    let finished = read.finished.unwrap();
    assert!(finished.usage.is_some());
    for one in &finished.suggestions {
        assert!(read.said[usize::try_from(one.index).unwrap()].starts_with(&one.text));
    }
    assert_eq!(finished.suggestions.len(), 2);
    mesh.finish().await;
}

#[tokio::test]
async fn the_engine_is_left_once_every_suggestion_has_reached_its_end() {
    let mesh = TestMesh::start().await;
    let body = ["\n    return", " a\n", "\nprint(1)\n"];
    let more = std::iter::repeat_n("more\n", 3_000);
    mesh.engine.script(Script::tokens(body.into_iter().chain(more)).hold(8));
    let asked = CompleteCodeRequest {
        completion_type: "block".to_owned(),
        max_suggestions: Some(2),
        max_tokens: Some(4_096),
        ..cursor("def f(a):")
    };
    let reply = complete(&mut mesh.client(), asked).await;
    assert_eq!(texts(&reply), ["\n    return a"]);
    mesh.engine.wait_for_aborted(1).await;
    let usage = reply.usage.unwrap();
    assert!((6..=8).contains(&usage.completion_tokens), "{usage:?}");
    mesh.finish().await;
}

#[tokio::test]
async fn a_newer_request_of_the_session_ends_the_older_one_and_its_work() {
    let mesh = TestMesh::start().await;
    for (number, asked) in (1..).zip([typing("a"), typing("ab"), typing("abc")]) {
        mesh.engine.once(Script::tokens(["x", "y"]).hold(1));
        let mut client = mesh.client();
        let older = tokio::spawn(async move { stream(&mut client, asked).await });
        mesh.engine.wait_for_started(2 * number - 1).await;
        let at = Instant::now();
        mesh.engine.once(Script::tokens(["z"]));
        let newer = complete(&mut mesh.client(), typing(&format!("z{number}"))).await;
        assert_eq!(texts(&newer), ["z"]);
        let noticed = mesh.engine.wait_for_aborted(number).await;
        println!("superseded: aborted at the engine {:?} after the newer request", noticed - at);
        let older = within("the older one", older).await.unwrap();
        let (failed, status) = (older.failed, older.status.unwrap());
        assert_eq!((incident(&status).0.as_str(), status.code()), ("E4013", Code::Cancelled));
        assert!(status.message().contains("superseded"), "{}", status.message());
        assert!(failed.is_none_or(|failed| failed.error_code == "E4013"));
    }
    mesh.finish().await;
}

#[tokio::test]
async fn another_caller_another_session_and_none_supersede_nothing() {
    let mesh = TestMesh::start().await;
    let other = mesh.create_key(TestMesh::dev_key()).await.key_text;
    mesh.engine.script(Script::tokens(["x", "y"]).hold(1));
    let mut client = mesh.client();
    let older = tokio::spawn(async move { complete(&mut client, typing("a")).await });
    mesh.engine.wait_for_started(1).await;
    mesh.engine.script(Script::tokens(["z"]));
    complete(&mut mesh.client_with(&other), typing("b")).await;
    let elsewhere = CompleteCodeRequest { session_id: "other".to_owned(), ..cursor("c") };
    complete(&mut mesh.client(), elsewhere).await;
    complete(&mut mesh.client(), cursor("d")).await;
    mesh.engine.release();
    assert_eq!(texts(&within("the older one", older).await.unwrap()), ["xy"]);
    mesh.finish().await;
}

#[tokio::test]
async fn identical_requests_share_one_call_of_the_engine_until_the_last_of_them_leaves() {
    let mesh = TestMesh::start().await;
    let ask = |text: &str| {
        let (mut client, asked) = (mesh.client(), cursor(text));
        tokio::spawn(async move { stream(&mut client, asked).await })
    };
    let riding = |n: f64| {
        let mesh = &mesh;
        within("the requests to be in progress", async move {
            let of = [r#"StreamCompleteCode""#];
            while (mesh.metrics().await.sum("hapa_requests_in_flight", &of) - n).abs() > 0.1 {}
        })
    };
    mesh.engine.script(Script::tokens(["x", "y"]).hold(2));
    let riders = [ask("a"), ask("a"), ask("a")];
    mesh.engine.wait_for_started(1).await;
    riding(3.0).await;
    // The first subscriber disconnects, and the others are not affected.
    riders[0].abort();
    riding(2.0).await;
    mesh.engine.release();
    for rider in riders.into_iter().skip(1) {
        let read = within("a rider", rider).await.unwrap();
        let finished = read.finished.unwrap();
        assert_eq!(finished.suggestions[0].text, "xy");
        assert!(finished.usage.is_some());
    }
    assert_eq!((mesh.engine.counts().started, mesh.engine.counts().aborted), (1, 0));

    let leaving = [ask("b"), ask("b")];
    mesh.engine.wait_for_started(2).await;
    riding(2.0).await;
    leaving[0].abort();
    riding(1.0).await;
    assert_eq!(mesh.engine.counts().aborted, 0);
    leaving[1].abort();
    mesh.engine.wait_for_aborted(1).await;
    assert_eq!(mesh.engine.counts().started, 2);
    mesh.finish().await;
}

#[tokio::test]
async fn the_same_request_again_takes_the_older_ones_place_in_the_engines_call() {
    let mesh = TestMesh::start().await;
    mesh.engine.script(Script::tokens(["x", "y"]).hold(2));
    let ask = || {
        let mut client = mesh.client();
        tokio::spawn(async move { stream(&mut client, typing("a")).await })
    };
    let older = ask();
    mesh.engine.wait_for_started(1).await;
    let newer = ask();
    let status = within("the older one", older).await.unwrap().status.unwrap();
    assert_eq!(incident(&status).0, "E4013");
    mesh.engine.release();
    let newer = within("the newer one", newer).await.unwrap();
    assert_eq!(newer.finished.unwrap().suggestions[0].text, "xy");
    assert_eq!((mesh.engine.counts().started, mesh.engine.counts().aborted), (1, 0));
    mesh.finish().await;
}

#[tokio::test]
async fn a_server_that_stops_says_so() {
    let mut mesh = TestMesh::start_with(&["--drain-timeout-seconds=5"]).await;
    mesh.engine.script(Script::tokens(["x", "y"]).hold(1));
    let mut client = mesh.client();
    let call = tokio::spawn(async move { stream(&mut client, cursor("a")).await });
    mesh.engine.wait_for_started(1).await;
    mesh.begin_shutdown();
    let status = within("the end", call).await.unwrap().status.unwrap();
    assert_eq!((incident(&status).0.as_str(), status.code()), ("E5008", Code::Unavailable));
    mesh.engine.wait_for_aborted(1).await;
    mesh.wait_until_stopped().await;
}

#[tokio::test]
async fn typing_a_suggestion_shows_its_rest_without_the_engine() {
    let mesh = TestMesh::start().await;
    mesh.engine.script(Script::text("이름, x"));
    let with = |prefix: &str| CompleteCodeRequest { suffix: "\n".to_owned(), ..typing(prefix) };
    complete(&mut mesh.client(), with("f(")).await;
    let reply = complete(&mut mesh.client(), with("f(이름")).await;
    assert_eq!((texts(&reply), reply.cached), (vec![", x"], true));
    assert_eq!(reply.usage.unwrap().total_tokens, 0);
    let read = stream(&mut mesh.client(), with("f(이름,")).await;
    assert!(read.started.unwrap().cached);
    assert_eq!((read.said[0].as_str(), read.finished.unwrap().suggestions.len()), (" x", 1));
    assert_eq!(mesh.engine.counts().started, 1);
    let hits = mesh.metrics().await.sum("hapa_cache_hits_total", &[r#"cache="completion""#]);
    assert!(hits >= 2.0, "{hits}");

    let fresh = CompleteCodeRequest { no_cache: true, ..with("f(이") };
    assert!(!complete(&mut mesh.client(), fresh).await.cached);
    let other = mesh.create_key(TestMesh::dev_key()).await.key_text;
    assert!(!complete(&mut mesh.client_with(&other), with("f(이름")).await.cached);
    assert_eq!(mesh.engine.counts().started, 3);
    mesh.finish().await;
}

#[tokio::test]
async fn wrong_fields_are_all_named_and_cost_nothing() {
    let mesh = TestMesh::start().await;
    let asked = CompleteCodeRequest {
        max_suggestions: Some(21),
        completion_type: "novel".to_owned(),
        suffix: "x".repeat(4_001),
        ..cursor("a")
    };
    let status = mesh.client().complete_code(asked).await.unwrap_err();
    assert_eq!((incident(&status).0.as_str(), status.code()), ("E4001", Code::InvalidArgument));
    for field in ["suffix", "max_suggestions", "completion_type"] {
        assert!(status.message().contains(field), "{}", status.message());
    }
    let status = stream(&mut mesh.client(), cursor(" \n")).await.status.unwrap();
    assert_eq!(incident(&status).0, "E4002");
    let unknown = CompleteCodeRequest { model: "nobody".to_owned(), ..cursor("a") };
    let status = mesh.client().complete_code(unknown).await.unwrap_err();
    assert_eq!(incident(&status).0, "E4010");
    assert_eq!(mesh.engine.counts().tokens_sent, 0);
    mesh.finish().await;
}

#[tokio::test]
async fn a_broken_or_silent_engine_has_the_same_errors_as_in_a_generation() {
    let short = ["--first-token-timeout-seconds=0.2", "--token-gap-timeout-seconds=0.2"];
    let mesh = TestMesh::start_with(&short).await;
    for (script, code) in [
        // First, because a request is sent once more after a connection that was used before.
        (Script::from(Fault::CutBeforeHeaders), "E5006"),
        (Script::from(Fault::HangBeforeHeaders), "E5001"),
        (Script::tokens(["a", "b"]).fault(Fault::StallAfter(1)), "E5007"),
        (Script::tokens(["a", "b"]).fault(Fault::CutAfter(1)), "E5007"),
        (Script::tokens(["a", "b"]).fault(Fault::ErrorAfter(1)), "E5007"),
        (Script::tokens(["a"]).without_finish(), "E5007"),
        (Script::from(Fault::status(503)), "E5005"),
    ] {
        let one = || CompleteCodeRequest { max_suggestions: Some(1), ..cursor("a") };
        mesh.engine.once(script.clone());
        let status = mesh.client().complete_code(one()).await.unwrap_err();
        assert_eq!(incident(&status).0, code, "{script:?}");
        mesh.engine.once(script.clone());
        let read = stream(&mut mesh.client(), one()).await;
        let status = read.status.unwrap();
        assert_eq!(incident(&status).0, code);
        if let Some(failed) = read.failed {
            assert_eq!(
                (failed.error_code.as_str(), failed.incident_id),
                (code, incident(&status).1)
            );
        }
    }
    // Engines that return one choice without log-probabilities are supported.
    let plain = Script::tokens(["a"]).without_logprobs().without_usage();
    mesh.engine.once(plain);
    let reply = complete(&mut mesh.client(), cursor("a = ")).await;
    assert_eq!((texts(&reply), reply.suggestions[0].confidence.to_bits()), (vec!["a"], 0));
    mesh.finish().await;
}

#[tokio::test]
async fn heartbeats_fill_the_silence() {
    let mesh = TestMesh::start_with(&["--heartbeat-seconds=0.05"]).await;
    mesh.engine.once(Script::tokens(["a", "b"]).hold(1));
    let asked = CompleteCodeRequest { max_suggestions: Some(1), ..cursor("x") };
    let mut frames = mesh.client().stream_complete_code(asked).await.unwrap().into_inner();
    let mut beats = 0;
    while beats < 2 {
        let event = within("a frame", frames.message()).await.unwrap().unwrap().event;
        beats += usize::from(matches!(event, Some(Event::Heartbeat(_))));
    }
    mesh.engine.release();
    let mut last = None;
    while let Some(frame) = within("a frame", frames.message()).await.unwrap() {
        last = frame.event;
    }
    assert!(matches!(last, Some(Event::Finished(_))));
    mesh.finish().await;
}

#[tokio::test]
async fn a_revoked_key_ends_what_it_began() {
    let mesh = TestMesh::start().await;
    let made = mesh.create_key(TestMesh::dev_key()).await;
    mesh.engine.once(Script::tokens(["a", "b"]).hold(1));
    let mut client = mesh.client_with(&made.key_text);
    let call = tokio::spawn(async move { stream(&mut client, cursor("x")).await });
    mesh.engine.wait_for_started(1).await;
    let revoke = RevokeKeyRequest { key_id: made.key.unwrap().key_id };
    mesh.keys().revoke_key(revoke).await.unwrap();
    let status = within("the end", call).await.unwrap().status.unwrap();
    assert_eq!((incident(&status).0.as_str(), status.code()), ("E4007", Code::Unauthenticated));
    mesh.engine.wait_for_aborted(1).await;
    mesh.finish().await;
}

#[tokio::test]
async fn a_key_may_be_limited_to_some_models() {
    let mesh = TestMesh::start().await;
    let limited =
        CreateKeyRequest { allowed_models: vec!["comment".to_owned()], ..TestMesh::dev_key() };
    let mut client = mesh.client_with(&mesh.create_key(limited).await.key_text);
    let status = client.complete_code(cursor("a")).await.unwrap_err();
    assert_eq!(incident(&status).0, "E4005");
    let asked = CompleteCodeRequest { model: "comment".to_owned(), ..cursor("a") };
    assert_eq!(complete(&mut client, asked).await.model, "comment");
    mesh.finish().await;
}
