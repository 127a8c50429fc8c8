//! Traces: the spans of a call that a collector receives, from the gateway to the engine and back.

use hapa_engine_sim::{Fault, Script};
use hapa_proto::codegen::v1::{CompleteCodeRequest, GenerateCodeRequest};
use hapa_test_harness::{Certificates, CollectedSpan, TestMesh, TraceCollector, hapa, within};
use serde_json::{Value, json};
use tonic::Request;

const GENERATE: &str = "/api/v1/generate-code";
const SPAN: &str = "hapa.codegen.v1.CodegenService/GenerateCode";
const SECRET: &str = "the-collectors-password";
/// What no span may hold.
const QUESTION: &str = "what-was-asked-4711";
const ANSWER: &str = "what_was_answered_4712";

async fn traced(collector: &TraceCollector, engines: usize) -> TestMesh {
    let endpoint = format!("--otel-exporter-otlp-endpoint={}", collector.url());
    let headers = format!("--otel-exporter-otlp-headers=authorization=Bearer%20{SECRET}");
    let usual = ["--otel-service-name=hapa-test", &endpoint, &headers];
    TestMesh::with_engines(engines, &usual).await
}

fn question() -> GenerateCodeRequest {
    let (user_question, model) = (QUESTION.to_owned(), "sim-coder".to_owned());
    GenerateCodeRequest { user_question, model, ..Default::default() }
}

fn assert_says(span: &CollectedSpan, expected: &[(&str, &str)]) {
    for (name, value) in expected {
        assert_eq!(span.text(name).as_deref(), Some(*value), "{name} of {span:#?}");
    }
}

#[tokio::test]
async fn a_generation_is_one_trace_from_the_gateway_to_the_engine() {
    let collector = TraceCollector::start().await;
    let mesh = traced(&collector, 1).await;
    let gateway =
        mesh.gateway_with(&[("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url().as_str())]).await;
    mesh.engine.script(Script::tokens([ANSWER, " = 1"]));
    let asked = json!({ "user_question": QUESTION, "model": "sim-coder", "max_tokens": 77, "temperature": 0.5 });
    let reply = gateway.post(GENERATE, Some(&mesh.key), &asked).await;
    assert_eq!(reply.status(), 200);

    let named = |name: &'static str| move |one: &CollectedSpan| one.span.name == name;
    let engine = collector.wait_for("the engine's", named("POST chat/completions")).await;
    let is_ours = |one: &CollectedSpan| one.span.trace_id == engine.span.trace_id;
    let edge = |one: &CollectedSpan| one.service == "hapa-gateway" && is_ours(one);
    let edge = collector.wait_for("the gateway's", edge).await;
    let server = collector.wait_for("the call's", named(SPAN)).await;
    let answer = collector.wait_for("the answer's", named("chat sim-coder")).await;
    let authenticate = "hapa.auth.v1.AuthService/Authenticate";
    let kind = |kind: i32| {
        move |one: &CollectedSpan| {
            one.span.name == authenticate && one.span.kind == kind && is_ours(one)
        }
    };
    let asking = collector.wait_for("the question to auth", kind(3)).await;
    let auth = collector.wait_for("auth's", kind(2)).await;

    assert!(server.is_under(&edge), "{server:#?} {edge:#?}");
    assert!(asking.is_under(&server) && auth.is_under(&asking));
    assert!(answer.is_under(&server) && engine.is_under(&answer));
    assert_eq!((server.service.as_str(), server.span.kind), ("hapa-test", 2));
    let usage: Value = serde_json::from_str(&reply.text().await.unwrap()).unwrap();
    assert_attributes([&server, &asking, &answer, &engine], &usage["usage"], &mesh);

    let sent = &mesh.engine.requests()[0];
    let carried = sent.header("traceparent").expect("the engine is told of the trace");
    assert!(carried.contains(&engine.trace_id()), "{carried}");
    assert!(carried.contains(&engine.span_id()), "the engine's parent is the span that asked it");
    let all = format!("{:?}", collector.spans().iter().map(|one| &one.span).collect::<Vec<_>>());
    for word in [QUESTION, ANSWER, SECRET, mesh.key.as_str()] {
        assert!(!all.contains(word), "{word} is in a span");
    }
    assert_eq!(server.credential, format!("Bearer {SECRET}"));
}

/// Checks the attributes of each span, under the names of the semantic conventions.
fn assert_attributes(spans: [&CollectedSpan; 4], usage: &Value, mesh: &TestMesh) {
    let [server, asking, answer, engine] = spans;
    let (host, port) = ("127.0.0.1", mesh.engine.address().port().to_string());
    assert_says(
        server,
        &[
            ("rpc.system", "grpc"),
            ("rpc.service", "hapa.codegen.v1.CodegenService"),
            ("rpc.method", "GenerateCode"),
            ("rpc.grpc.status_code", "0"),
        ],
    );
    assert_says(asking, &[("rpc.method", "Authenticate"), ("rpc.grpc.status_code", "0")]);
    let count = |name: &str| usage[name].to_string();
    assert_says(
        answer,
        &[
            ("gen_ai.operation.name", "chat"),
            ("gen_ai.request.model", "sim-coder"),
            ("gen_ai.response.model", "sim-coder"),
            ("gen_ai.request.max_tokens", "77"),
            ("gen_ai.request.temperature", "0.5"),
            ("gen_ai.usage.input_tokens", &count("prompt_tokens")),
            ("gen_ai.usage.output_tokens", &count("completion_tokens")),
            ("gen_ai.response.finish_reasons", "stop"),
            ("server.address", host),
            ("server.port", &port),
        ],
    );
    assert_eq!(answer.span.events[0].name, "gen_ai.first_token");
    assert_says(engine, &[("http.response.status_code", "200"), ("server.port", &port)]);
}

#[tokio::test]
async fn a_completion_s_span_says_what_came_of_it() {
    let collector = TraceCollector::start().await;
    let mesh = traced(&collector, 1).await;
    // One is cut by the engine, the other where its line ends.
    let cut = Script::tokens([ANSWER]).finish("length");
    mesh.engine.script(Script::choices([cut, Script::tokens([ANSWER, " + 1", "\n", "more"])]));
    let asked = CompleteCodeRequest {
        prefix: format!("{QUESTION} = "),
        model: "sim-coder".to_owned(),
        max_suggestions: Some(2),
        ..CompleteCodeRequest::default()
    };
    let reply = mesh.client().complete_code(asked).await.unwrap().into_inner();
    let named = "text_completion sim-coder";
    let answer = collector.wait_for("the answer's", |one| one.span.name == named).await;
    let used = reply.usage.unwrap();
    assert_says(
        &answer,
        &[
            ("gen_ai.operation.name", "text_completion"),
            ("gen_ai.response.model", "sim-coder"),
            ("gen_ai.response.finish_reasons", "length,stop"),
            ("gen_ai.usage.output_tokens", &used.completion_tokens.to_string()),
        ],
    );
    let events: Vec<_> = answer.span.events.iter().map(|event| event.name.as_str()).collect();
    assert_eq!(events, ["gen_ai.first_token"]);
    let engine = "POST completions";
    let engine = collector.wait_for("the engine's", |one| one.span.name == engine).await;
    let call = "hapa.codegen.v1.CodegenService/CompleteCode";
    let call = collector.wait_for("the call's", |one| one.span.name == call).await;
    assert!(engine.is_under(&answer) && answer.is_under(&call));
    let all = format!("{:?}", collector.spans().iter().map(|one| &one.span).collect::<Vec<_>>());
    assert!(!all.contains(QUESTION) && !all.contains(ANSWER), "{all}");
    mesh.finish().await;
}

#[tokio::test]
async fn a_retry_is_a_span_of_its_own_and_says_what_failed() {
    let collector = TraceCollector::start().await;
    let mesh = traced(&collector, 2).await;
    for engine in mesh.engines() {
        engine.once(Script::from(Fault::status(500)));
    }
    // Both engines fail once, so the call fails, and no third attempt follows.
    let status = mesh.client().generate_code(question()).await.unwrap_err();
    let (code, incident) = hapa_test_harness::incident(&status);
    let server = collector.wait_for("the call's", |one| one.span.name == SPAN).await;
    let answer = collector.wait_for("the answer's", |one| one.span.name == "chat sim-coder").await;
    let tried = collector.spans().into_iter().filter(|one| one.span.name.starts_with("POST "));
    let tried: Vec<_> = tried.collect();
    assert_eq!(tried.len(), 2, "{tried:#?}");
    let error = |one: &CollectedSpan| one.span.status.as_ref().map(|status| status.code);
    for one in &tried {
        assert!(one.is_under(&answer));
        assert_eq!(error(one), Some(2), "an error");
        assert_says(one, &[("http.response.status_code", "500"), ("error.type", "500")]);
    }
    assert_ne!(tried[0].text("server.port"), tried[1].text("server.port"));
    assert_eq!((error(&answer), error(&server)), (Some(2), Some(2)));
    assert_says(&server, &[("error.type", &code), ("hapa.incident_id", &incident)]);
    mesh.finish().await;
}

#[tokio::test]
async fn a_failure_is_kept_with_the_trace_that_it_happened_in() {
    let collector = TraceCollector::start().await;
    let mesh = traced(&collector, 1).await;
    mesh.engine.script(Script::tokens(["a", "b"]).fault(Fault::CutAfter(1)));
    let mut asked = Request::new(question());
    let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
    let parent = format!("00-{trace}-00f067aa0ba902b7-01");
    asked.metadata_mut().insert("traceparent", parent.parse().unwrap());
    let mut frames = mesh.client().stream_generate_code(asked).await.unwrap().into_inner();
    let status = loop {
        match within("a frame", frames.message()).await {
            Ok(frame) => assert!(frame.is_some(), "the stream says that it broke"),
            Err(status) => break status,
        }
    };
    let (code, incident) = hapa_test_harness::incident(&status);
    let name = "hapa.codegen.v1.CodegenService/StreamGenerateCode";
    let server = collector.wait_for("the call's", |one| one.span.name == name).await;
    let answer = collector.wait_for("the answer's", |one| one.span.name == "chat sim-coder").await;
    assert_eq!(server.trace_id(), trace);
    assert_says(&answer, &[("error.type", &code), ("hapa.incident_id", &incident)]);

    let show = async {
        loop {
            let mut command = hapa();
            command.args(["errors", "show", &incident]);
            command.env("HAPA_ADDRESS", format!("http://{}", mesh.address));
            command.env("MESH_TOKEN", mesh.mesh_token());
            let done = command.output().await.unwrap();
            if done.status.success() {
                return String::from_utf8(done.stdout).unwrap();
            }
        }
    };
    let shown = within("the occurrence", show).await;
    assert!(shown.contains(trace), "{shown}");
    mesh.finish().await;
}

#[tokio::test]
async fn a_call_without_a_caller_s_trace_is_kept_under_its_own() {
    let collector = TraceCollector::start().await;
    let mut mesh = traced(&collector, 1).await;
    mesh.client().generate_code(GenerateCodeRequest::default()).await.unwrap_err();
    mesh.begin_shutdown();
    // What has not been sent yet is sent before the process ends.
    mesh.wait_until_stopped().await;
    let spans = collector.spans();
    let server = spans.iter().find(|one| one.span.name == SPAN).expect("it was sent");
    assert!(server.span.parent_span_id.is_empty());
    // An error of the caller does not set the error status of the server's span.
    assert_eq!(server.span.status.as_ref().map_or(0, |status| status.code), 0);
    assert_says(server, &[("rpc.grpc.status_code", "3"), ("error.type", "E4002")]);
}

#[tokio::test]
async fn a_collector_behind_tls_is_trusted_by_its_authority_alone() {
    let (collector, certificates) = (TraceCollector::start().await, Certificates::make().await);
    let (address, _serving) = certificates.in_front_of(collector.address, "errors").await;
    let (at, authority) =
        (format!("https://localhost:{}", address.port()), certificates.authority());
    let authority = authority.to_str().unwrap();
    let flags = [
        &format!("--otel-exporter-otlp-endpoint={at}"),
        &format!("--otel-exporter-otlp-certificate={authority}"),
    ];
    let mut mesh = TestMesh::start_with(&flags.map(String::as_str)).await;
    let settings =
        [("OTEL_EXPORTER_OTLP_ENDPOINT", &*at), ("OTEL_EXPORTER_OTLP_CERTIFICATE", authority)];
    let gateway = mesh.gateway_with(&settings).await;
    let body = json!({"user_question": QUESTION});
    assert_eq!(gateway.post(GENERATE, Some(&mesh.key), &body).await.status(), 200);
    collector.wait_for("the call's", |one| one.span.name == SPAN).await;
    collector.wait_for("the gateway's", |one| one.service == "hapa-gateway").await;
    mesh.begin_shutdown();
    mesh.wait_until_stopped().await;

    // With another authority's certificate nothing is exported, not even at the end.
    let told = || collector.spans().iter().filter(|one| one.span.name == SPAN).count();
    let (before, other) = (told(), Certificates::make().await);
    let other = format!("--otel-exporter-otlp-certificate={}", other.authority().display());
    let mut mesh = TestMesh::start_with(&[flags[0].as_str(), &other]).await;
    mesh.client().generate_code(question()).await.unwrap();
    mesh.begin_shutdown();
    mesh.wait_until_stopped().await;
    assert_eq!(told(), before);
}

#[tokio::test]
async fn a_collector_that_is_away_costs_spans_and_no_call() {
    let endpoint = "--otel-exporter-otlp-endpoint=http://127.0.0.1:1";
    let mut mesh = TestMesh::start_with(&[endpoint]).await;
    mesh.client().generate_code(question()).await.unwrap();
    let lost = async {
        let reason = &["reason=\"collector\""];
        while mesh.metrics().await.sum("hapa_spans_dropped_total", reason) < 1.0 {
            tokio::task::yield_now().await;
        }
    };
    within("a span to be counted as lost", lost).await;
    mesh.client().generate_code(question()).await.unwrap();
    mesh.begin_shutdown();
    mesh.wait_until_stopped().await;
}
