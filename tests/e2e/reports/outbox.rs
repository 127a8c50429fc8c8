//! The usage and the failure of a call are stored before its answer ends. They are delivered once to the
//! services that store them, whatever happens to these in the meantime.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use hapa_engine_sim::{Fault, Script};
use hapa_proto::auth::v1::CreateKeyRequest;
use hapa_proto::codegen::v1::{GenerateCodeRequest, GetCodeHealthRequest};
use hapa_test_harness::{FakeAnalytics, TestMesh, incident, within};
use tonic::{Code, Request};

use crate::api::generate::{question, stream};

const GENERATE: &str = "/hapa.codegen.v1.CodegenService/GenerateCode";
const STREAM: &str = "/hapa.codegen.v1.CodegenService/StreamGenerateCode";
const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

async fn mesh(receiver: &FakeAnalytics) -> TestMesh {
    let flags = receiver.flags();
    TestMesh::start_with(&flags.each_ref().map(String::as_str)).await
}

#[tokio::test]
async fn what_calls_used_arrives() {
    let receiver = FakeAnalytics::start().await;
    let mesh = mesh(&receiver).await;
    mesh.engine.script(Script::tokens(["a", "b", "c"]).gap(Duration::from_millis(20)).usage(11, 7));
    mesh.client().generate_code(question("q")).await.unwrap();
    assert!(stream(&mut mesh.client(), question("q")).await.finished.is_some());
    let events = receiver.wait_for_usage("codegen", 2).await;
    for (event, method) in events.iter().zip([GENERATE, STREAM]) {
        assert_eq!((event.method.as_str(), event.grpc_status.as_str()), (method, "OK"));
        assert_eq!((event.error_code.as_str(), event.owner.as_str()), ("", "tester"));
        assert_eq!((event.model.as_str(), event.task.as_str()), ("prompt", "generate"));
        assert_eq!((event.prompt_tokens, event.completion_tokens), (11, 7));
        assert!(event.key_id.starts_with("key_") && event.event_id.len() == 36, "{event:?}");
        let (first, between) =
            (event.time_to_first_token_us.unwrap(), event.inter_token_us.unwrap());
        assert!(first > 0 && first + between * 6 <= event.duration_us, "{event:?}");
    }
    assert!(receiver.occurrences("codegen").is_empty());
}

#[tokio::test]
async fn how_calls_failed_arrives_under_the_incident_that_the_user_saw() {
    let receiver = FakeAnalytics::start().await;
    let mesh = mesh(&receiver).await;
    let mut wrong = Request::new(question(""));
    let parent = format!("00-{TRACE}-00f067aa0ba902b7-01");
    wrong.metadata_mut().insert("traceparent", parent.parse().unwrap());
    wrong.metadata_mut().insert("x-request-id", "mine-7".parse().unwrap());
    let status = mesh.client().generate_code(wrong).await.unwrap_err();
    mesh.engine.once(Script::tokens(["a", "b"]).fault(Fault::CutAfter(1)));
    let broken = stream(&mut mesh.client(), question("q")).await;
    let stranger = mesh.anonymous().generate_code(question("q")).await.unwrap_err();
    let usage = receiver.wait_for_usage("codegen", 3).await;
    let codes: Vec<_> = usage.iter().map(|event| event.error_code.as_str()).collect();
    assert_eq!(codes, ["E4002", "E5007", "E4003"]);
    assert!(usage[1].completion_tokens > 0 && usage[2].owner.is_empty());
    let arrived = async {
        while receiver.occurrences("codegen").len() < 3 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    within("occurrences", arrived).await;
    let seen = receiver.occurrences("codegen");
    let first = &seen[0];
    assert_eq!((first.error_code.clone(), first.incident_id.clone()), incident(&status));
    assert_eq!((first.request_id.as_str(), first.trace_id.as_str()), ("mine-7", TRACE));
    assert_eq!((first.method.as_str(), first.owner.as_str()), (GENERATE, "tester"));
    assert_eq!(first.message, status.message());
    assert!(first.actor.starts_with("key:key_") && !first.version.is_empty(), "{first:?}");
    let cut = &seen[1];
    assert_eq!(cut.incident_id, broken.failed.unwrap().incident_id);
    assert_eq!(cut.incident_id, incident(&broken.status.unwrap()).1);
    assert!(!cut.causes.is_empty(), "what lies behind it is known: {cut:?}");
    assert_eq!(
        (seen[2].actor.as_str(), &seen[2].incident_id),
        ("anonymous", &incident(&stranger).1)
    );
}

#[tokio::test]
async fn a_client_that_left_has_used_what_it_has_used() {
    let receiver = FakeAnalytics::start().await;
    let mesh = mesh(&receiver).await;
    mesh.engine.once(Script::tokens(["a", "b", "c"]).hold(2));
    let mut frames = mesh.client().stream_generate_code(question("q")).await.unwrap().into_inner();
    within("started", frames.message()).await.unwrap();
    within("a token", frames.message()).await.unwrap();
    drop(frames);
    mesh.engine.wait_for_aborted(1).await;
    let events = receiver.wait_for_usage("codegen", 1).await;
    assert_eq!(
        (events[0].error_code.as_str(), events[0].grpc_status.as_str()),
        ("E4011", "CANCELLED")
    );
    assert!(events[0].completion_tokens >= 1 && events[0].prompt_tokens > 0, "{events:?}");
    assert!(events[0].time_to_first_token_us.is_some());
}

#[tokio::test]
async fn while_the_receivers_are_away_calls_go_on_and_all_arrives_later_once() {
    let mut receiver = FakeAnalytics::away().await;
    let mesh = mesh(&receiver).await;
    for _ in 0..20 {
        mesh.client().get_code_health(GetCodeHealthRequest {}).await.unwrap();
        mesh.client().generate_code(question("")).await.unwrap_err();
    }
    assert_eq!(mesh.page("/readyz").await, (200, "ready\n".to_owned()));
    receiver.fail(3);
    receiver.come().await;
    receiver.wait_for_usage("codegen", 40).await;
    // What was not answered is sent again, under the same ids.
    let again = async {
        loop {
            let (usage, failures) = (receiver.usage("codegen"), receiver.occurrences("codegen"));
            if usage.len() + failures.len() > 40 + 20 {
                return (usage, failures);
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let (usage, failures) = within("repetitions", again).await;
    let ids = |ids: Vec<String>| ids.into_iter().collect::<HashSet<_>>().len();
    assert_eq!(ids(usage.into_iter().map(|event| event.event_id).collect()), 40);
    assert!(ids(failures.into_iter().map(|event| event.event_id).collect()) <= 20);
    let file = std::fs::read_dir(mesh.folder()).unwrap();
    let mut names = file.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert!(names.any(|name| name.starts_with("outbox-auth-codegen")));
}

#[tokio::test]
async fn a_receiver_that_hangs_makes_no_call_slower() {
    let receiver = FakeAnalytics::start().await;
    receiver.hang();
    let mesh = mesh(&receiver).await;
    mesh.client().generate_code(question("")).await.unwrap_err();
    let hanging = async {
        while receiver.waiting() < 2 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    within("both kinds to hang", hanging).await;
    let begin = Instant::now();
    for _ in 0..20 {
        mesh.client().get_code_health(GetCodeHealthRequest {}).await.unwrap();
        let status = mesh.client().generate_code(question("")).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
    }
    let taken = begin.elapsed();
    assert!(receiver.waiting() >= 1, "it hung all the time");
    assert!(taken < Duration::from_secs(3), "40 calls took {taken:?}");
}

#[tokio::test]
async fn what_waits_is_delivered_before_the_process_ends() {
    let receiver = FakeAnalytics::start().await;
    let mut mesh = mesh(&receiver).await;
    mesh.client().generate_code(question("q")).await.unwrap();
    mesh.client().generate_code(question("")).await.unwrap_err();
    mesh.begin_shutdown();
    mesh.wait_until_stopped().await;
    assert_eq!(receiver.usage("codegen").len(), 2);
    assert_eq!(receiver.occurrences("codegen").len(), 1);
}

#[tokio::test]
async fn a_guessed_key_is_one_occurrence_that_of_the_call_that_showed_it() {
    let receiver = FakeAnalytics::start().await;
    let mut mesh = mesh(&receiver).await;
    let request = CreateKeyRequest { name: "other".to_owned(), ..TestMesh::dev_key() };
    let unknown = TestMesh::start().await.create_key(request).await.key_text;
    let status = mesh.client_with(&unknown).generate_code(question("q")).await.unwrap_err();
    let (code, id) = incident(&status);
    mesh.begin_shutdown();
    mesh.wait_until_stopped().await;
    let of_auth = receiver.occurrences("auth");
    let doubled = of_auth.iter().filter(|one| one.error_code == "E4003").count();
    assert_eq!(doubled, 0, "{of_auth:?}");
    let shown = receiver.occurrences("codegen");
    assert_eq!(shown.len(), 1, "{shown:?}");
    assert_eq!((shown[0].error_code.as_str(), &shown[0].incident_id), ("E4003", &id));
    assert_eq!(code, "E4003");
}

#[tokio::test]
async fn a_refused_call_is_recorded_without_its_unknown_model() {
    let receiver = FakeAnalytics::start().await;
    let mut mesh = mesh(&receiver).await;
    let unknown = GenerateCodeRequest { model: "gpt".to_owned(), ..question("q") };
    let status = mesh.client().generate_code(unknown).await.unwrap_err();
    assert_eq!(incident(&status).0, "E4010");
    let named = GenerateCodeRequest { model: "prompt".to_owned(), ..question("q") };
    mesh.engine.once(Fault::status(500));
    assert_eq!(incident(&mesh.client().generate_code(named).await.unwrap_err()).0, "E5006");
    mesh.begin_shutdown();
    mesh.wait_until_stopped().await;
    let models = receiver.usage("codegen").into_iter().map(|event| event.model);
    assert_eq!(models.collect::<Vec<_>>(), ["", "prompt"]);
}

#[tokio::test]
async fn error_monitoring_can_be_turned_off() {
    let receiver = FakeAnalytics::start().await;
    let flags = receiver.flags();
    let flags = [&flags[0], &flags[1], "--error-monitoring-enabled=false"];
    let mut mesh = TestMesh::start_with(&flags).await;
    mesh.client().generate_code(question("")).await.unwrap_err();
    mesh.begin_shutdown();
    mesh.wait_until_stopped().await;
    assert_eq!(receiver.usage("codegen").len(), 1);
    assert!(receiver.occurrences("codegen").is_empty());
}
