//! The log: the contents of its lines, and the size limit of its file.

mod writer;

use std::path::Path;
use std::time::Duration;

use hapa_engine_sim::{Engine, Script};
use hapa_proto::codegen::v1::GenerateCodeRequest;
use hapa_proto::codegen::v1::codegen_service_client::CodegenServiceClient;
use hapa_test_harness::{CodegenClient, Identity, hapa, incident, within};
use serde_json::Value;
use tempfile::TempDir;
use tokio::process::Child;
use tokio::time::sleep;
use tonic::Request;
use tonic::transport::Endpoint;

const TOKEN: &str = "the-mesh-token-of-a-test-which-is-long";
const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
/// What no line may hold.
const QUESTION: &str = "what-was-asked-4713";
const ANSWER: &str = "what_was_answered_4714";

/// A process that logs to a file, and the engine that it asks.
struct Logging {
    engine: Engine,
    client: CodegenClient,
    folder: TempDir,
    _process: Child,
}

impl Logging {
    async fn start(settings: &[(&str, &str)]) -> Logging {
        let (engine, folder) = (Engine::start(), tempfile::tempdir().unwrap());
        let file = folder.path().join("logs/hapa.log");
        let mut command = hapa();
        command.args(["all", "--port=0", "--metrics-port=0", "--cache-ttl=0"]);
        command.env("DATA_DIR", folder.path()).env("MESH_TOKEN", TOKEN).env("LOG_FILE", &file);
        command.env("AI_MODEL_ENDPOINT", engine.url()).env("STRUCTURED_LOGGING", "true");
        let process = command.envs(settings.iter().copied()).spawn().unwrap();
        let address = loop {
            let serving = lines(&file).into_iter().find(|line| message(line) == "serving");
            if let Some(line) = serving {
                break line["fields"]["address"].as_str().unwrap().to_owned();
            }
            sleep(Duration::from_millis(20)).await;
        };
        let channel = Endpoint::from_shared(format!("http://{address}")).unwrap().connect_lazy();
        let client = CodegenServiceClient::new(Identity::Mesh.on(channel));
        Logging { engine, client, folder, _process: process }
    }

    fn file(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join("logs").join(name)
    }

    /// Whether exactly these files exist, with complete lines. Checks the size limit of each file.
    fn has_whole(&self, expected: &[&str]) -> bool {
        let mut names: Vec<_> = std::fs::read_dir(self.folder.path().join("logs"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        let files = names.iter().map(|name| self.file(name));
        for size in files.clone().filter_map(|file| Some(file.metadata().ok()?.len())) {
            assert!(size <= 2048, "{size}");
        }
        names == expected && files.into_iter().all(|file| !lines(&file).is_empty())
    }

    /// The line of a call, once it is there.
    async fn line(&self, says: &str, request_id: &str) -> Value {
        loop {
            let lines = lines(&self.file("hapa.log"));
            let is_it =
                |line: &Value| message(line) == says && line["span"]["request_id"] == request_id;
            if let Some(line) = lines.into_iter().find(is_it) {
                return line;
            }
            sleep(Duration::from_millis(20)).await;
        }
    }
}

fn lines(file: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let whole = text.lines().filter(|_| text.ends_with('\n'));
    whole.map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn message(line: &Value) -> &str {
    line["fields"]["message"].as_str().unwrap_or_default()
}

fn asked(question: &str, id: &str) -> Request<GenerateCodeRequest> {
    let question = GenerateCodeRequest { user_question: question.to_owned(), ..Default::default() };
    let mut request = Request::new(question);
    request.metadata_mut().insert("x-request-id", id.parse().unwrap());
    let parent = format!("00-{TRACE}-00f067aa0ba902b7-01");
    request.metadata_mut().insert("traceparent", parent.parse().unwrap());
    request
}

#[tokio::test]
async fn a_slow_call_says_where_its_time_went_and_every_line_has_its_ids() {
    // The level of the rest leaves no line of information: the ids are there all the same.
    let settings =
        [("SLOW_REQUEST_SECONDS", "0.000001"), ("LOG_LEVEL", "warn,hapa_server::server=info")];
    let mut mesh = within("a mesh that logs", Logging::start(&settings)).await;
    mesh.engine.script(Script::tokens([ANSWER, " = 1"]));
    mesh.client.generate_code(asked(QUESTION, "slow-1")).await.unwrap();
    let slow = within("the slow call", mesh.line("slow call", "slow-1")).await;
    assert_eq!(slow["level"], "WARN");
    assert_eq!(slow["span"]["trace_id"], TRACE);
    let part =
        |name: &str| slow["fields"][name].as_u64().unwrap_or_else(|| panic!("{name}: {slow}"));
    assert!(part("engine_ms") + part("queued_ms") + part("overhead_ms") <= part("duration_ms"));
    assert!(part("first_token_ms") <= part("duration_ms"));
}

#[tokio::test]
async fn a_failure_is_found_in_the_log_by_what_the_caller_was_shown() {
    let mut mesh = within("a mesh that logs", Logging::start(&[("LOG_LEVEL", "info")])).await;
    mesh.engine.script(Script::tokens([ANSWER, " = 1"]));
    mesh.client.generate_code(asked(QUESTION, "well-1")).await.unwrap();
    let well = within("the call", mesh.line("call ended", "well-1")).await;
    assert_eq!((&well["span"]["trace_id"], &well["fields"]["code"]), (&TRACE.into(), &"OK".into()));
    let status = mesh.client.generate_code(asked("", "fails-1")).await.unwrap_err();
    let (code, incident) = incident(&status);
    let failed = within("the failure", mesh.line("call failed", "fails-1")).await;
    assert_eq!(failed["fields"]["error_code"], code.as_str());
    assert_eq!(failed["span"]["incident_id"], incident.as_str());
    let text = std::fs::read_to_string(mesh.file("hapa.log")).unwrap();
    for word in [QUESTION, ANSWER, TOKEN] {
        assert!(!text.contains(word), "{word} is in the log");
    }
}

#[tokio::test]
async fn a_full_log_is_begun_anew_and_only_so_many_are_kept() {
    let settings = [("LOG_MAX_SIZE", "2KB"), ("LOG_FILE_ROTATION", "2"), ("LOG_LEVEL", "info")];
    let mut mesh = within("a mesh that logs", Logging::start(&settings)).await;
    for number in 0..40 {
        mesh.client.generate_code(asked("", &format!("call-{number}"))).await.unwrap_err();
    }
    // The relay still writes lines about the calls: a read may come between two renames.
    let kept = async {
        while !mesh.has_whole(&["hapa.log", "hapa.log.1", "hapa.log.2"]) {
            sleep(Duration::from_millis(20)).await;
        }
    };
    within("three files", kept).await;
}
