//! The commands of a user.

use std::path::Path;
use std::process::{Output, Stdio};

use hapa_engine_sim::{Engine, Script};
use hapa_proto::codegen::v1::GenerateCodeRequest;
use hapa_proto::codegen::v1::codegen_service_client::CodegenServiceClient;
use hapa_test_harness::{TestMesh, hapa, within};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};

use crate::api::generate::question;

async fn run(mesh: Option<&TestMesh>, arguments: &[&str], settings: &[(&str, &str)]) -> Output {
    let mut command = hapa();
    command.args(arguments).envs(settings.iter().copied());
    if let Some(mesh) = mesh {
        command.env("HAPA_ADDRESS", format!("http://{}", mesh.address));
        command.env("HAPA_API_KEY", &mesh.key);
    }
    within("the command", command.stdin(Stdio::null()).output()).await.unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// Arguments, settings, and the name that the error message must contain.
type UsageErrorCase<'a> = (&'a [&'a str], &'a [(&'a str, &'a str)], &'a str);

const LONG_TOKEN: (&str, &str) = ("MESH_TOKEN", "0123456789abcdefghijklmnopqrstuvwxyz");
const LONG_PEPPER: (&str, &str) = ("API_KEY_PEPPER", "0123456789abcdefghijklmnopqrstuvwxyz");
const PRODUCTION: (&str, &str) = ("ENVIRONMENT", "production");
const ONE_LETTER: &str = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
const EXAMPLE: &str = "changemechangemechangemechangeme";
const DEFAULT: (&str, &str) = ("SECRET_KEY", "your-secret-key-here-change-it-in-production");

/// Commands, their settings, and the one that is wrong.
const WRONG: &[UsageErrorCase<'_>] = &[
    (&["all"], &[("PORT", "abc")], "PORT"),
    (&["all"], &[("ENVIRONMENT", "moon")], "ENVIRONMENT"),
    (&["all"], &[("REQUEST_TIMEOUT", "0")], "REQUEST_TIMEOUT"),
    (&["all"], &[("MESH_TOKEN", "short")], "MESH_TOKEN"),
    (&["all"], &[("MESH_TOKEN_PREVIOUS", "short")], "MESH_TOKEN_PREVIOUS"),
    (&["all"], &[("ENVIRONMENT", "production")], "MESH_TOKEN"),
    (&["auth"], &[("ENVIRONMENT", "production"), LONG_TOKEN, LONG_PEPPER], "SECRET_KEY"),
    (&["auth"], &[("ENVIRONMENT", "production"), LONG_TOKEN, LONG_PEPPER, DEFAULT], "SECRET_KEY"),
    (&["codegen"], &[PRODUCTION, ("MESH_TOKEN", ONE_LETTER)], "MESH_TOKEN"),
    (&["codegen"], &[PRODUCTION, ("MESH_TOKEN", EXAMPLE)], "MESH_TOKEN"),
    (
        &["codegen"],
        &[PRODUCTION, LONG_TOKEN, ("MESH_TOKEN_PREVIOUS", EXAMPLE)],
        "MESH_TOKEN_PREVIOUS",
    ),
    (&["auth"], &[PRODUCTION, LONG_TOKEN, ("API_KEY_PEPPER", ONE_LETTER)], "API_KEY_PEPPER"),
    (&["auth"], &[PRODUCTION, LONG_TOKEN, ("API_KEY_PEPPER", EXAMPLE)], "API_KEY_PEPPER"),
    (
        &["auth"],
        &[PRODUCTION, LONG_TOKEN, LONG_PEPPER, ("API_KEY_PEPPER_PREVIOUS", ONE_LETTER)],
        "API_KEY_PEPPER_PREVIOUS",
    ),
    (&["auth"], &[PRODUCTION, LONG_TOKEN, LONG_PEPPER, ("SECRET_KEY", ONE_LETTER)], "SECRET_KEY"),
    (&["all"], &[("SECRET_KEY", "short")], "SECRET_KEY"),
    (&["all"], &[("SECRET_KEY_PREVIOUS", "short")], "SECRET_KEY_PREVIOUS"),
    (&["all"], &[("SESSION_KEY_FILE_PREVIOUS", "/nowhere")], "SESSION_KEY_FILE_PREVIOUS"),
    (&["all"], &[("API_KEY_PEPPER_PREVIOUS", "short")], "API_KEY_PEPPER_PREVIOUS"),
    (&["all"], &[("REDIS_URL", "http://x")], "REDIS_URL"),
    (&["all"], &[("OIDC_ISSUER", "https://login.example.com")], "OIDC_AUDIENCE"),
    (&["all"], &[("TRUSTED_PROXIES", "everyone")], "TRUSTED_PROXIES"),
    (&["all"], &[("LOG_LEVEL", "loud=very=")], "LOG_LEVEL"),
    (&["all"], &[("DATABASE_URL", "mysql://x")], "DATABASE_URL"),
    (&["all"], &[("REDIS_URL", "http://redis")], "REDIS_URL"),
    (&["all"], &[("REDIS_URL", "redis://redis/many")], "REDIS_URL"),
    (&["all"], &[("AI_MODEL_ENDPOINT", "nowhere")], "AI_MODEL_ENDPOINT"),
    (&["codegen"], &[], "AUTH_ADDRESS"),
    (&["gateway", "--out", "/nonexistent"], &[("CORS_ORIGINS", "*")], "CORS_ORIGINS"),
];

#[tokio::test]
async fn a_wrong_setting_is_named_and_the_exit_code_is_78() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().to_str().unwrap();
    for (arguments, settings, name) in WRONG {
        let free = [("DATA_DIR", data), ("METRICS_PORT", "0"), ("PORT", "0")];
        let settings: Vec<_> = free.iter().chain(*settings).copied().collect();
        let done = run(None, arguments, &settings).await;
        assert_eq!(done.status.code(), Some(78), "{name}: {}", text(&done.stderr));
        assert!(text(&done.stderr).contains(name), "{}", text(&done.stderr));
    }
}

#[tokio::test]
async fn a_taken_port_is_named() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let done = run(None, &["all"], &[("PORT", &port), ("METRICS_PORT", "0")]).await;
    assert_eq!(done.status.code(), Some(78));
    assert!(text(&done.stderr).contains(&format!("PORT: can't listen on 127.0.0.1:{port}")));
}

#[tokio::test]
async fn config_shows_every_setting_and_no_secret() {
    let secret = "a-secret-of-more-than-32-characters!";
    let settings = [("MESH_TOKEN", secret), ("AI_MODEL_API_KEY", secret), ("PORT", "50099")];
    let done = run(None, &["config"], &settings).await;
    let shown = text(&done.stdout);
    assert!(done.status.success() && !shown.contains(secret), "{shown}");
    let row = |name: &str| shown.lines().find(|line| line.trim_start().starts_with(name)).unwrap();
    assert!(row("PORT").contains("50099") && row("PORT").contains("environment"));
    assert!(row("MESH_TOKEN").contains("(redacted)"));
    assert!(row("AI_MODEL_ENDPOINT").contains("default"));
    let done = run(None, &["config", "--json"], &settings).await;
    let json: Value = serde_json::from_slice(&done.stdout).unwrap();
    assert_eq!(json["PORT"], "50099");
}

#[tokio::test]
async fn generate_gives_code_to_a_pipe_and_the_rest_to_standard_error() {
    let mesh = TestMesh::start().await;
    mesh.engine.script(Script::text("이렇게:\n```python\nx = 1\n```\n끝."));
    let done = run(Some(&mesh), &["generate", "q"], &[]).await;
    assert!(done.status.success(), "{}", text(&done.stderr));
    assert_eq!(text(&done.stdout), "x = 1\n");
    assert_eq!(text(&done.stderr), "이렇게:\n끝.");

    let done = run(Some(&mesh), &["generate", "--raw", "q"], &[]).await;
    assert_eq!(text(&done.stdout), "이렇게:\nx = 1\n끝.");

    let done = run(Some(&mesh), &["generate", "--json", "q"], &[]).await;
    let frames: Vec<Value> =
        text(&done.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(frames[0]["started"]["model"], "prompt");
    assert_eq!(frames.last().unwrap()["finished"]["finish_reason"], "stop");
}

#[tokio::test]
async fn models_lists_tasks_and_health_of_each_model() {
    let mesh = TestMesh::start().await;
    let done = run(Some(&mesh), &["models"], &[]).await;
    let rows: Vec<Vec<&str>> =
        text(&done.stdout).lines().map(|line| line.split_whitespace().collect()).collect();
    let fix = ["error-fix", "sim-coder", "fix", "healthy", "1", "of", "1"];
    assert_eq!(rows[3][..7], fix, "{}", text(&done.stdout));
    let base = ["sim-coder", "-", "all", "others", "healthy", "1", "of", "1", "1", "32768"];
    assert_eq!(rows[5], base);
    let done = run(Some(&mesh), &["models", "--json"], &[]).await;
    let first: Value = serde_json::from_str(text(&done.stdout).lines().next().unwrap()).unwrap();
    assert_eq!(
        (&first["name"], &first["tasks"]),
        (&"autocomplete".into(), &serde_json::json!(["complete"]))
    );
}

#[tokio::test]
async fn complete_shows_suggestions_as_a_table_and_as_json() {
    let mesh = TestMesh::start().await;
    let sure = Script::tokens(["a, b"]).logprob(-0.125);
    mesh.engine.script(Script::choices([Script::tokens(["x"]).logprob(-1.0), sure]));
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("a.py");
    std::fs::write(&file, "print(").unwrap();
    let file = file.to_str().unwrap();
    let asked = ["complete", "--prefix-file", file, "--suffix", ")", "-n", "2"];
    let done = run(Some(&mesh), &asked, &[]).await;
    assert!(done.status.success(), "{}", text(&done.stderr));
    let rows: Vec<Vec<&str>> =
        text(&done.stdout).lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(rows[1..], [vec!["0.88", "a,", "b"], vec!["0.37", "x"]]);
    assert!(text(&done.stderr).contains("the prefix alone"), "{}", text(&done.stderr));

    let done = run(Some(&mesh), &[&asked[..], &["--json"]].concat(), &[]).await;
    let reply: Value = serde_json::from_slice(&done.stdout).unwrap();
    assert_eq!(reply["suggestions"][0]["text"], "a, b");
    assert_eq!(reply["cached"], true, "asked for the second time");

    let done = run(Some(&mesh), &["complete"], &[]).await;
    assert!(text(&done.stderr).contains("E4002"), "{}", text(&done.stderr));
}

#[tokio::test]
async fn generate_reads_the_question_and_the_code_from_files_and_pipes() {
    let mesh = TestMesh::start().await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("a.py");
    std::fs::write(&file, "print('here')").unwrap();
    let mut command = hapa();
    command.args(["generate", "-", "--file"]).arg(&file);
    command.env("HAPA_ADDRESS", format!("http://{}", mesh.address)).env("HAPA_API_KEY", &mesh.key);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    child.stdin.take().unwrap().write_all("고쳐줘".as_bytes()).await.unwrap();
    assert!(within("the command", child.wait()).await.unwrap().success());
    let user = mesh.engine.requests()[0].body["messages"][1]["content"].to_string();
    assert!(
        user.contains("고쳐줘") && user.contains("print('here')") && user.contains("a.py"),
        "{user}"
    );
}

#[tokio::test]
async fn a_failed_generate_says_code_advice_and_incident() {
    let mesh = TestMesh::start().await;
    let done = run(Some(&mesh), &["generate", "q", "--temperature", "3"], &[]).await;
    assert_eq!(done.status.code(), Some(1));
    let said = text(&done.stderr);
    assert!(
        said.contains("E4001") && said.contains("temperature") && said.contains("INC-"),
        "{said}"
    );
}

#[tokio::test]
async fn keys_are_made_listed_and_revoked() {
    let mesh = TestMesh::start().await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("key");
    let out = file.to_str().unwrap();
    let create = [
        "key",
        "create",
        "--name",
        "ci",
        "--owner",
        "me",
        "--scope",
        "codegen:generate",
        "--out",
        out,
    ];
    let done = run(Some(&mesh), &create, &[]).await;
    assert!(done.status.success(), "{}", text(&done.stderr));
    assert_private(&file);
    let key = std::fs::read_to_string(&file).unwrap();
    assert!(!text(&done.stdout).contains(key.trim()));
    let check = run(Some(&mesh), &["key", "check", "--file", out], &[]).await;
    assert!(check.status.success(), "{}", text(&check.stderr));

    let done = run(Some(&mesh), &["key", "list", "--json", "--owner", "me"], &[]).await;
    let listed: Value = serde_json::from_slice(&done.stdout).unwrap();
    assert_eq!((listed["name"].as_str(), listed["revoke_time"].is_null()), (Some("ci"), true));
    let key_id = listed["key_id"].as_str().unwrap();
    let done = run(Some(&mesh), &["key", "revoke", key_id], &[]).await;
    assert!(done.status.success() && text(&done.stdout).contains(key_id));
}

fn assert_private(file: &Path) {
    use std::os::unix::fs::PermissionsExt as _;
    assert_eq!(std::fs::metadata(file).unwrap().permissions().mode() & 0o777, 0o600);
}

#[tokio::test]
async fn the_id_in_a_requests_body_stands_in_the_log() {
    let engine = Engine::start();
    let folder = tempfile::tempdir().unwrap();
    let mut command = hapa();
    command.args(["all", "--port=0", "--metrics-port=0", "--structured-logging=true"]);
    command.env("DATA_DIR", folder.path()).env("AI_MODEL_ENDPOINT", engine.url());
    let mut mesh = command.stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(mesh.stderr.take().unwrap()).lines();
    let serving = within("the first line", lines.next_line()).await.unwrap().unwrap();
    let serving: Value = serde_json::from_str(&serving).unwrap();
    let address = format!("http://{}", serving["fields"]["address"].as_str().unwrap());
    let token = std::fs::read_to_string(folder.path().join("mesh-token")).unwrap();
    let mut client = CodegenServiceClient::connect(address).await.unwrap();
    let request_id = "pasted-by-a-user".to_owned();
    let mut request = tonic::Request::new(GenerateCodeRequest { request_id, ..question("q") });
    request.metadata_mut().insert("x-mesh-token", token.parse().unwrap());
    client.generate_code(request).await.unwrap();
    within("the log line", async {
        while let Some(line) = lines.next_line().await.unwrap() {
            let line: Value = serde_json::from_str(&line).unwrap();
            if line["span"]["body_request_id"] == "pasted-by-a-user" {
                return;
            }
        }
        panic!("the log ended");
    })
    .await;
}

#[tokio::test]
async fn a_signal_ends_the_process_cleanly() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = hapa();
    command.args(["all", "--port=0", "--metrics-port=0", "--structured-logging=true"]);
    command.env("DATA_DIR", folder.path()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let serving = within("the first line", lines.next_line()).await.unwrap().unwrap();
    let line: Value = serde_json::from_str(&serving).unwrap();
    assert_eq!(line["fields"]["message"], "serving", "{serving}");
    let pid = child.id().unwrap().to_string();
    let kill = tokio::process::Command::new("kill").args(["-TERM", &pid]).status();
    assert!(kill.await.unwrap().success());
    assert!(within("the end", child.wait()).await.unwrap().success());
}
