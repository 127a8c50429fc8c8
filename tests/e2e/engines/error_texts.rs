//! An engine's text may contain a prompt, a key or a host name. It reaches no caller, log, store, probe,
//! metric or span. The engine's retry delay is bounded.

use std::path::{Path, PathBuf};
use std::time::Duration;

use hapa_proto::codegen::v1::codegen_service_client::CodegenServiceClient;
use hapa_proto::codegen::v1::{
    CompleteCodeRequest, GenerateCodeRequest, GetCodeHealthRequest, ListModelsRequest,
};
use hapa_proto::errors::v1::GetIncidentRequest;
use hapa_proto::errors::v1::error_tracking_service_client::ErrorTrackingServiceClient;
use hapa_test_harness::{
    CodegenClient, ECHO_CASES, ECHOING_HOST, ECHOING_MODEL, EchoedModels, EchoingEngine, Identity,
    TestChannel, TestMesh, TraceCollector, files_with, hapa, incident, reqwest_client, within,
};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::process::Child;
use tokio::time::sleep;
use tonic::transport::Endpoint;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::api::generate::question;

const TOKEN: &str = hapa_test_harness::TOKEN;
/// A text that may appear in no output.
const PROMPT: &str = "CANARY-SALARIES";
const KEY: &str = "operator-engine-key-42";

/// A process that calls an echoing engine, and writes its log to a file.
struct Meshed {
    wire: TestChannel,
    metrics: String,
    folder: TempDir,
    engine: EchoingEngine,
    process: Child,
}

impl Meshed {
    async fn start(settings: &[(&str, &str)]) -> Meshed {
        let (engine, folder) =
            (EchoingEngine::start(EchoedModels::one()).await, tempfile::tempdir());
        let folder = folder.unwrap();
        let mut command = hapa();
        command.args(["all", "--port=0", "--metrics-port=0", "--cache-ttl=0"]);
        command.env("DATA_DIR", folder.path().join("data")).env("MESH_TOKEN", TOKEN);
        command.env("LOG_FILE", folder.path().join("hapa.log")).env("STRUCTURED_LOGGING", "true");
        command.env("AI_MODEL_ENDPOINT", engine.url()).env("AI_MODEL_API_KEY", KEY);
        let process = command.envs(settings.iter().copied()).spawn().unwrap();
        let log = folder.path().join("hapa.log");
        let serving = within("a process that serves", async {
            loop {
                let lines = lines(&log);
                let line = lines.into_iter().find(|line| line["fields"]["message"] == "serving");
                if let Some(line) = line {
                    return line["fields"].clone();
                }
                sleep(Duration::from_millis(20)).await;
            }
        });
        let serving = serving.await;
        let address = serving["address"].as_str().unwrap();
        let metrics = serving["metrics_address"].as_str().unwrap().to_owned();
        let channel = Endpoint::from_shared(format!("http://{address}")).unwrap().connect_lazy();
        Meshed { wire: Identity::Mesh.on(channel), metrics, folder, engine, process }
    }

    fn client(&self) -> CodegenClient {
        CodegenServiceClient::new(self.wire.clone())
    }

    async fn page(&self, path: &str) -> String {
        let url = format!("http://{}{path}", self.metrics);
        let http = reqwest_client();
        within(path, http.get(url).send()).await.unwrap().text().await.unwrap()
    }

    /// Waits until the failure is stored; returns its incident as an operator reads it.
    async fn stored(&self, status: &Status) -> String {
        let mut errors = ErrorTrackingServiceClient::new(self.wire.clone());
        let incident_id = incident(status).1;
        within("an incident", async {
            loop {
                let request = GetIncidentRequest { incident_id: incident_id.clone() };
                if let Ok(found) = errors.get_incident(request).await {
                    return format!("{:?}", found.into_inner());
                }
                sleep(Duration::from_millis(20)).await;
            }
        })
        .await
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("hapa.log")).unwrap()
    }

    /// The process's data files that contain `word`.
    fn files_with(&self, word: &str) -> Vec<PathBuf> {
        files_with(&self.folder.path().join("data"), word)
    }
}

fn lines(file: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

fn chat(way: &str) -> GenerateCodeRequest {
    question(&format!("way={way}; {PROMPT}"))
}

fn completion(way: &str) -> CompleteCodeRequest {
    let prefix = format!("# way={way}; {PROMPT}\nx = ");
    CompleteCodeRequest { prefix, model: ECHOING_MODEL.to_owned(), ..Default::default() }
}

/// All texts of a status.
fn told(status: &Status) -> String {
    let metadata = format!("{:?}", status.metadata());
    format!("{} {} {metadata}", status.message(), String::from_utf8_lossy(status.details()))
}

/// Repeats a call until it reaches the engine: after some failures the circuit breaker skips the engine for a
/// moment.
async fn fails(ask: impl AsyncFn() -> Option<Status>) -> Status {
    within("an engine that fails", async {
        loop {
            let status = ask().await.expect("it fails");
            if incident(&status).0 != "E5009" {
                return status;
            }
            sleep(Duration::from_millis(50)).await;
        }
    })
    .await
}

#[track_caller]
fn assert_clean(place: &str, text: &str) {
    for word in [PROMPT, KEY, ECHOING_HOST] {
        assert!(!text.contains(word), "{word} is in {place}: {text}");
    }
}

#[tokio::test]
async fn what_an_engine_repeats_of_prompt_key_and_host_is_nowhere() {
    let collector = TraceCollector::start().await;
    let settings = [("LOG_LEVEL", "trace"), ("OTEL_EXPORTER_OTLP_ENDPOINT", &*collector.url())];
    let mesh = Meshed::start(&settings).await;
    let (mut client, mut last) = (mesh.client(), None);
    for way in ECHO_CASES {
        let status = fails(async || client.clone().generate_code(chat(way)).await.err()).await;
        assert_clean(way, &told(&status));
        let of_completion =
            fails(async || client.clone().complete_code(completion(way)).await.err()).await;
        assert_clean(way, &told(&of_completion));
        assert_clean(way, &mesh.stored(&status).await);
        last = Some(of_completion);
        let shown = client.get_code_health(GetCodeHealthRequest {}).await.unwrap();
        assert_clean("GetCodeHealth", &format!("{shown:?}"));
        if let Err(status) = client.list_models(ListModelsRequest {}).await {
            assert_clean("ListModels", &told(&status));
        }
        assert_clean("/readyz", &mesh.page("/readyz").await);
    }
    // Complete answers with a model and a reason that are not names.
    let mut odd = client.generate_code(chat("whole")).await;
    while odd.is_err() {
        // The breaker may still be open.
        sleep(Duration::from_millis(100)).await;
        odd = within("an answer", client.generate_code(chat("whole"))).await;
    }
    let odd = odd.unwrap().into_inner();
    assert_eq!((odd.finish_reason.as_str(), odd.model.as_str()), ("other", ECHOING_MODEL));
    assert_clean("a reply", &format!("{odd:?}"));
    let odd = client.complete_code(completion("whole")).await.unwrap().into_inner();
    assert_eq!(odd.suggestions[0].finish_reason, "other");
    let whole = |one: &hapa_test_harness::CollectedSpan| {
        one.text("gen_ai.operation.name").as_deref() == Some("text_completion")
            && one.text("gen_ai.response.finish_reasons").is_some()
    };
    collector.wait_for("the last answer's span", whole).await;
    let spans: Vec<_> = collector.spans().into_iter().map(|one| one.span).collect();
    assert!(spans.iter().any(|span| span.name.starts_with("POST ")));
    assert_clean("a span", &format!("{spans:?}"));
    assert_clean("/metrics", &mesh.page("/metrics").await);
    mesh.stored(&last.unwrap()).await;
    assert_clean("the log", &mesh.log());
    for word in [PROMPT, KEY, ECHOING_HOST] {
        assert_eq!(mesh.files_with(word), Vec::<PathBuf>::new(), "{word}");
    }
}

#[tokio::test]
async fn the_engines_text_is_logged_on_request_and_without_the_key() {
    let settings = [("LOG_LEVEL", "debug"), ("LOG_ENGINE_ERRORS", "true")];
    let mesh = Meshed::start(&settings).await;
    let mut client = mesh.client();
    for way in ["status-422", "event", "shape"] {
        let status = client.generate_code(chat(way)).await.unwrap_err();
        assert_clean("the store", &mesh.stored(&status).await);
    }
    let log = mesh.log();
    assert!(log.contains(PROMPT) && log.contains(ECHOING_HOST), "{log}");
    assert!(!log.contains(KEY), "{log}");
    let logged = lines(&mesh.folder.path().join("hapa.log"));
    let texts = logged.iter().filter_map(|line| line["fields"]["text"].as_str());
    let texts: Vec<_> = texts.collect();
    // Quoted, so a text may be twice as long.
    assert!(texts.len() >= 3 && texts.iter().all(|text| text.chars().count() <= 4_100));
    for word in [PROMPT, KEY] {
        assert_eq!(mesh.files_with(word), Vec::<PathBuf>::new(), "{word}");
    }
}

#[tokio::test]
async fn without_debug_nothing_of_it_is_logged_even_where_it_is_asked_for() {
    let mesh = Meshed::start(&[("LOG_LEVEL", "info"), ("LOG_ENGINE_ERRORS", "true")]).await;
    let status = mesh.client().generate_code(chat("status-500")).await.unwrap_err();
    mesh.stored(&status).await;
    assert_clean("the log", &mesh.log());
}

/// A mesh with an engine that returns this list of models.
async fn told_models(models: EchoedModels) -> (TestMesh, EchoingEngine) {
    let engine = EchoingEngine::start(models).await;
    // Of two flags the last counts.
    let mesh = TestMesh::start_with(&[&format!("--ai-model-endpoint={}", engine.url())]).await;
    (mesh, engine)
}

#[tokio::test]
async fn an_engine_that_refuses_the_key_is_reported_in_published_words() {
    let engine = EchoingEngine::start(EchoedModels::Refused).await;
    let url = format!("--ai-model-endpoint={}", engine.url());
    let mesh = TestMesh::start_with(&[&url, &format!("--ai-model-api-key={KEY}")]).await;
    let narrow = hapa_proto::auth::v1::CreateKeyRequest {
        scopes: vec!["codegen:complete".to_owned()],
        ..TestMesh::dev_key()
    };
    let key = mesh.create_key(narrow).await.key_text;
    let mut client = mesh.client_with(&key);
    let status = client.list_models(ListModelsRequest {}).await.unwrap_err();
    assert_eq!((incident(&status).0.as_str(), status.code()), ("E5006", Code::Unavailable));
    assert_clean("ListModels", &told(&status));
    let health = client.get_code_health(GetCodeHealthRequest {}).await.unwrap().into_inner();
    assert_eq!(health.status, "unhealthy");
    assert_eq!(
        health.message,
        "the engine answered 401 Unauthorized: it rejects the credential of this server"
    );
    let (_, page) = mesh.page("/readyz").await;
    assert!(page.contains("the engine answered 401"), "{page}");
    assert_clean("/readyz", &page);
    assert_eq!(engine.last_key().as_deref(), Some(KEY));
    mesh.finish().await;
}

#[tokio::test]
async fn an_unreachable_endpoint_is_reported_without_its_url() {
    let endpoint = "--ai-model-endpoint=http://user:pass-word-9@no-such-host.invalid:7/v1";
    let mesh = TestMesh::start_with(&[endpoint]).await;
    let mut client = mesh.client();
    let health = client.get_code_health(GetCodeHealthRequest {}).await.unwrap().into_inner();
    assert_eq!(health.message, "the engine can't be reached: its name can't be looked up");
    let models = client.list_models(ListModelsRequest {}).await.unwrap_err();
    let named = GenerateCodeRequest { model: "m".to_owned(), ..question("q") };
    let asked = client.generate_code(named).await.unwrap_err();
    let (_, ready) = mesh.page("/readyz").await;
    for text in [told(&models), told(&asked), ready] {
        assert!(!text.contains("pass-word-9") && !text.contains("no-such-host"), "{text}");
    }
    assert!(!mesh.metrics().await.text().contains("pass-word-9"));
    mesh.finish().await;
}

#[tokio::test]
async fn models_with_odd_names_are_not_listed() {
    let long = "m".repeat(201);
    let listed = json!([
        { "id": "first-model", "parent": "a\nb" },
        { "id": "a b" }, { "id": "" }, { "id": long }, { "id": "a\u{1b}[31m" }, { "id": "a\u{200b}" },
        { "id": "adapter", "parent": "first-model" },
    ]);
    let (mesh, _parrot) = told_models(EchoedModels::Listed(listed)).await;
    let models = mesh.client().list_models(ListModelsRequest {}).await.unwrap().into_inner();
    let names: Vec<_> =
        models.models.iter().map(|one| (one.name.as_str(), one.parent.as_str())).collect();
    assert_eq!(names, [("adapter", "first-model"), ("first-model", "")]);
    mesh.finish().await;
}

#[tokio::test]
async fn a_list_of_models_that_can_not_be_read_is_not_repeated() {
    for text in [
        json!({ "data": format!("{PROMPT} {ECHOING_HOST}") }).to_string(),
        format!("{PROMPT} {ECHOING_HOST}"),
        json!({ "data": [{ "id": { PROMPT: ECHOING_HOST } }] }).to_string(),
    ] {
        let (mesh, _parrot) = told_models(EchoedModels::Text(text)).await;
        let health = mesh.client().get_code_health(GetCodeHealthRequest {}).await.unwrap();
        let message = health.into_inner().message;
        assert!(message.starts_with("the engine's reply can't be read: it"), "{message}");
        assert_clean("GetCodeHealth", &message);
        assert_clean("/readyz", &mesh.page("/readyz").await.1);
    }
}

#[tokio::test]
async fn an_engine_may_keep_callers_away_for_ten_minutes_at_most() {
    let (mesh, _parrot) = told_models(EchoedModels::one()).await;
    for (value, expected) in [
        ("7", 7),
        ("86400", 600),
        ("99999999999999999999999999", 600),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 600),
        ("Sun, 06 Nov 1994 08:49:37 GMT", 1),
        ("-5", 1),
        ("soon", 1),
    ] {
        let asked = question(&format!("retry-after={value}; q"));
        let status = mesh.client().generate_code(asked).await.unwrap_err();
        assert_eq!(incident(&status).0, "E5005", "{value}");
        let wait = status.get_details_retry_info().unwrap().retry_delay.unwrap();
        assert_eq!(wait, Duration::from_secs(expected), "{value}");
        assert_eq!(status.metadata().get("retry-after").unwrap(), &expected.to_string());
    }
    mesh.finish().await;
}

#[tokio::test]
async fn a_key_for_the_engine_from_a_file_is_trimmed_and_one_that_can_not_be_sent_ends_with_78() {
    let mut mesh = Meshed::start(&[("AI_MODEL_API_KEY", "engine-key-of-a-file\r\n")]).await;
    let shown = async {
        while mesh.engine.last_key().is_none() {
            sleep(Duration::from_millis(20)).await;
        }
    };
    within("the engine to be asked", shown).await;
    assert_eq!(mesh.engine.last_key().as_deref(), Some("engine-key-of-a-file"));
    mesh.process.kill().await.unwrap();
    for wrong in ["hush\nword", "hush\r\nword: x", "hush\u{1}word"] {
        let folder = tempfile::tempdir().unwrap();
        let mut command = hapa();
        command.args(["all", "--port=0", "--metrics-port=0"]).env("DATA_DIR", folder.path());
        command.env("AI_MODEL_API_KEY", wrong);
        let done = within("a refusal", command.output()).await.unwrap();
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        assert_eq!(done.status.code(), Some(78), "{said}");
        assert!(said.contains("AI_MODEL_API_KEY") && !said.contains("hush"), "{said}");
    }
}
