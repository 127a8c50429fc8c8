//! Answers of engines other than vLLM: refusals in many wordings, base URLs, and lists of models.

use hapa_engine_sim::{Engine, Fault, Script};
use hapa_proto::auth::v1::CreateKeyRequest;
use hapa_proto::codegen::v1::codegen_service_client::CodegenServiceClient;
use hapa_proto::codegen::v1::{
    CompleteCodeRequest, EngineFindings, GenerateCodeRequest, ListModelsRequest,
};
use hapa_test_harness::{EchoedModels, EchoingEngine, Identity, TestMesh, hapa, incident, within};
use serde_json::{Value, json};
use tonic::Code;
use tonic_types::StatusExt as _;

use super::pool::{ANSWER, gauge};
use crate::api::generate::question;

const MODEL: &str = "sim-coder";

async fn names(mesh: &TestMesh) -> Vec<String> {
    let models = mesh.client().list_models(ListModelsRequest {}).await.unwrap().into_inner();
    models.models.into_iter().map(|model| model.name).collect()
}

/// A request refused with this message and parameter.
fn refusal(code: u16, message: &str, param: Option<&str>) -> Script {
    let error = json!({ "error": { "message": message, "param": param, "code": code } });
    Fault::reply(code, &error).into()
}

/// The code of the error, its message, and the field that it names.
async fn fails(mesh: &TestMesh, script: impl Into<Script>) -> (String, String, String) {
    mesh.engine.script(script);
    let status = mesh.client().generate_code(question("q")).await.unwrap_err();
    let details = status.get_details_bad_request();
    let first = details.and_then(|details| details.field_violations.into_iter().next());
    let field = first.map(|violation| violation.field).unwrap_or_default();
    (incident(&status).0, status.message().to_owned(), field)
}

#[tokio::test]
async fn a_field_that_an_engine_does_not_support_is_left_out() {
    let mesh = TestMesh::start().await;
    mesh.engine.respond_with(|body| match body {
        body if !body["cache_salt"].is_null() => {
            refusal(400, "Unrecognized request argument supplied: cache_salt", None)
        }
        body if !body["max_tokens"].is_null() => refusal(
            400,
            "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.",
            Some("max_tokens"),
        ),
        _ => Script::text(ANSWER),
    });
    for _ in 0..6 {
        mesh.client().generate_code(question("q")).await.unwrap();
    }
    let requests = mesh.engine.requests();
    assert_eq!(requests.len(), 8, "the first call is sent three times");
    let last = &requests[7].body;
    assert!(last["cache_salt"].is_null() && last["max_completion_tokens"].is_u64(), "{last}");
    let first = &requests[0].body;
    assert_eq!(first["messages"], last["messages"]);
    mesh.finish().await;
}

#[tokio::test]
async fn a_refused_field_is_the_callers_only_if_the_caller_can_set_it() {
    let mesh = TestMesh::start().await;
    let always = refusal(400, "Unsupported field cache_salt in this context", Some("cache_salt"));
    let (code, message, _) = fails(&mesh, always).await;
    assert_eq!(code, "E5006");
    assert!(!message.contains("too long"), "{message}");
    let value = refusal(400, "must be at most 1", Some("temperature"));
    let (code, _, field) = fails(&mesh, value).await;
    assert_eq!((code.as_str(), field.as_str()), ("E4001", "temperature"));
    mesh.finish().await;
}

#[tokio::test]
async fn a_prompt_that_is_too_long_is_reported_in_every_wording() {
    let mesh = TestMesh::start().await;
    let tgi = json!({
        "error": "Input validation error: `inputs` must have less than 4095 tokens. Given: 5000",
        "error_type": "validation",
    });
    let sglang = json!({
        "object": "error", "type": "BadRequestError", "code": 400,
        "message": "The input (5000 tokens) is longer than the model's context length (4096 tokens).",
    });
    let llama = json!({ "error": {
        "code": 400, "type": "exceed_context_size_error", "message": "request too large",
    } });
    let openai = json!({ "error": { "message": "Too much.", "code": "context_length_exceeded" } });
    for (status, body) in [
        (422, tgi.to_string()),
        (400, sglang.to_string()),
        (400, llama.to_string()),
        (400, openai.to_string()),
        (413, "<html>413 Request Entity Too Large</html>".to_owned()),
    ] {
        let (code, message, field) = fails(&mesh, Fault::reply(status, &body)).await;
        assert_eq!((code.as_str(), field.as_str()), ("E4001", "code_context"), "{body}");
        assert!(message.contains("too long"), "{message}");
    }
    let other = refusal(400, "unknown field context", None);
    let (code, message, _) = fails(&mesh, other).await;
    assert_eq!(code, "E4001");
    assert!(!message.contains("too long"), "{message}");
    mesh.finish().await;
}

#[tokio::test]
async fn a_rejection_inside_a_stream_is_the_callers_and_does_not_open_the_circuit() {
    let mesh = TestMesh::with_engines(2, &[]).await;
    let error = json!({ "error": {
        "message": "This model's maximum context length is 4096 tokens. However, you requested 9000",
        "type": "BadRequestError",
        "code": 400,
    } });
    let rejects = Script::text(ANSWER).fault(Fault::EventAfter(0, error));
    mesh.engines().for_each(|engine| engine.script(rejects.clone()));
    for _ in 0..12 {
        let status = mesh.client().generate_code(question("q")).await.unwrap_err();
        assert_eq!((incident(&status).0.as_str(), status.code()), ("E4001", Code::InvalidArgument));
    }
    let started: u64 = mesh.engines().map(|engine| engine.counts().started).sum();
    assert_eq!(started, 12, "no other engine is asked");
    assert!(gauge(&mesh, "hapa_engine_breaker_state").await.abs() < f64::EPSILON);
    mesh.finish().await;
}

#[tokio::test]
async fn an_engine_without_an_operation_keeps_its_model() {
    let mesh = TestMesh::start().await;
    mesh.engine.respond_with(|body: &Value| match body["prompt"] {
        Value::String(_) => Fault::reply(404, &json!({ "detail": "Not Found" })).into(),
        _ => Script::text(ANSWER),
    });
    for _ in 0..6 {
        let asked = CompleteCodeRequest {
            prefix: "x = ".to_owned(),
            model: MODEL.to_owned(),
            ..CompleteCodeRequest::default()
        };
        let status = mesh.client().complete_code(asked).await.unwrap_err();
        assert_eq!(incident(&status).0, "E5006");
        assert!(status.message().contains("does not offer this operation"), "{status:?}");
    }
    assert!(names(&mesh).await.contains(&MODEL.to_owned()));
    let named = GenerateCodeRequest { model: MODEL.to_owned(), ..question("q") };
    mesh.client().generate_code(named).await.unwrap();
    mesh.finish().await;
}

#[tokio::test]
async fn a_request_on_a_reused_connection_that_closes_is_sent_once_more() {
    let mesh = TestMesh::start().await;
    mesh.client().generate_code(question("q")).await.unwrap();
    for _ in 0..6 {
        mesh.engine.once(Fault::CutBeforeHeaders);
        mesh.client().generate_code(question("q")).await.unwrap();
    }
    assert_eq!(mesh.engine.counts().started, 13);
    let label = format!("engine=\"{}\"", mesh.engine.address());
    let metrics = mesh.metrics().await;
    let failures = metrics.sum("hapa_engine_attempts_total", &[&label, "outcome=\"failure\""]);
    assert!(failures.abs() < f64::EPSILON, "{failures} failures");
    mesh.finish().await;
}

#[tokio::test]
async fn a_base_url_is_found_whether_or_not_the_setting_has_the_version() {
    for path in ["", "/", "/v1/", "/v1/chat/completions", "/chat/completions"] {
        let engine = Engine::start();
        engine.script(Script::text(ANSWER));
        let endpoint = format!("--ai-model-endpoint=http://{}{path}", engine.address());
        // Of two flags the last counts.
        let mesh = TestMesh::start_with(&[&endpoint]).await;
        mesh.client().generate_code(question("q")).await.unwrap();
        assert!(names(&mesh).await.contains(&MODEL.to_owned()), "{path}");
        mesh.finish().await;
    }
}

#[tokio::test]
async fn what_was_learned_of_an_engine_is_listed_for_operators_only() {
    let engine = Engine::start();
    engine.respond_with(|body| match body {
        body if !body["cache_salt"].is_null() => {
            refusal(400, "Unrecognized request argument supplied: cache_salt", None)
        }
        _ => Script::text(ANSWER),
    });
    let address = engine.address().to_string();
    let mesh = TestMesh::start_with(&[&format!("--ai-model-endpoint=http://{address}")]).await;
    let list = async |identity: Identity<'_>| {
        let mut client = CodegenServiceClient::new(mesh.channel_as(identity));
        client.list_models(ListModelsRequest {}).await.unwrap().into_inner()
    };
    let base_url = format!("http://{address}/v1");
    let mut expected =
        EngineFindings { name: address.clone(), base_url, unsupported_fields: Vec::new() };
    assert_eq!(list(Identity::Mesh).await.engine_findings, [expected.clone()]);
    mesh.client().generate_code(question("q")).await.unwrap();
    expected.unsupported_fields.push("cache_salt".to_owned());
    for admin in [Identity::Mesh, Identity::Key(&mesh.key)] {
        assert_eq!(list(admin).await.engine_findings, [expected.clone()]);
    }
    let user =
        CreateKeyRequest { scopes: vec!["codegen:generate".to_owned()], ..TestMesh::dev_key() };
    let user = mesh.create_key(user).await.key_text;
    let listed = list(Identity::Key(&user)).await;
    assert!(!listed.models.is_empty() && listed.engine_findings.is_empty(), "{listed:?}");

    for (key, is_shown) in [(&mesh.key, true), (&user, false)] {
        let mut command = hapa();
        command.arg("models").env("HAPA_ADDRESS", format!("http://{}", mesh.address));
        let output = within("the command", command.env("HAPA_API_KEY", key).output()).await;
        let shown = String::from_utf8(output.unwrap().stdout).unwrap();
        let row = [&*address, &*expected.base_url, "cache_salt"];
        let bottom: Vec<_> = shown.lines().last().unwrap().split_whitespace().collect();
        assert_eq!(bottom == row, is_shown, "{shown}");
        assert_eq!(shown.contains(&address), is_shown, "{shown}");
    }
    mesh.finish().await;
}

#[tokio::test]
async fn lists_of_models_of_every_shape_are_read() {
    for list in [
        json!([{ "id": "good" }]),
        json!(["good"]),
        json!({ "models": [{ "name": "good" }] }),
        json!({ "data": [{ "id": 7 }, null, { "id": "good", "max_model_len": -5 }, { "id": "good" }] }),
    ] {
        let engine = EchoingEngine::start(EchoedModels::Text(list.to_string())).await;
        let endpoint = format!("--ai-model-endpoint={}", engine.url());
        let mesh = TestMesh::start_with(&[&endpoint]).await;
        assert_eq!(names(&mesh).await, ["good"], "{list}");
        let listed = mesh.client().list_models(ListModelsRequest {}).await.unwrap().into_inner();
        assert_eq!(listed.models[0].replicas, 1, "{list}");
        mesh.finish().await;
    }
}
