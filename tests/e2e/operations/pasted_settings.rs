//! Settings as people paste them: the block of the replaced backend's documentation, `.env` files, and errors that name
//! every invalid setting at once.

use std::fs;
use std::path::Path;
use std::process::Output;

use hapa_test_harness::{ServerProcess, hapa, within};
use serde_json::Value;
use tokio::process::Command;

/// Variables in the notation of the replaced backend.
const ENV_FILE: &str = "\
# Server
HOST=localhost          # the address
DEBUG=True
MAX_WORKERS=2
LOG_LEVEL=INFO
LOG_FILE_ROTATION=true
STRUCTURED_LOGGING=True

# Stores
DATABASE_URL=sqlite:///./data/hapa.db
CACHE_TTL=1800

# Model
VLLM_SERVER_URL=http://127.0.0.1:1
VLLM_TIMEOUT_SECONDS=60
VLLM_MAX_RETRIES=3
RATE_LIMIT_ENABLED=yes
";

fn in_folder(folder: &Path, arguments: &[&str]) -> Command {
    let mut command = hapa();
    command.args(arguments).current_dir(folder).env_remove("DATA_DIR");
    command
}

async fn run(mut command: Command) -> Output {
    within("the command", command.kill_on_drop(true).output()).await.unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[tokio::test]
async fn the_documented_variables_in_an_env_file_start_the_mesh_and_create_its_store() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join(".env"), ENV_FILE).unwrap();
    let command = in_folder(folder.path(), &["all", "--port=0", "--metrics-port=0"]);
    let serving = ServerProcess::start(command).await;
    assert!(serving.mesh.ip().is_loopback());
    assert!(folder.path().join("data/hapa.db").exists());
    for words in ["DEBUG has no effect: set LOG_LEVEL=debug", "VLLM_MAX_RETRIES", "VLLM_SERVER_URL"]
    {
        assert!(serving.has_said(words), "{words}");
    }
}

#[tokio::test]
async fn the_environment_wins_over_the_file_of_the_environment_and_that_over_the_general_one() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
    write(".env", "ENVIRONMENT=staging\nCACHE_TTL=1\nMAX_CACHE_SIZE=1\nLOG_LEVEL=error\n");
    write(".env.staging", "CACHE_TTL=2\nMAX_CACHE_SIZE=2\n");
    let mut command = in_folder(folder.path(), &["config", "--json"]);
    command.env("CACHE_TTL", "3").env_remove("LOG_LEVEL");
    let done = run(command).await;
    let settings: Value = serde_json::from_slice(&done.stdout).unwrap();
    let values = ["CACHE_TTL", "MAX_CACHE_SIZE", "LOG_LEVEL"].map(|name| settings[name].clone());
    assert_eq!(values, ["3", "2", "error"], "{}", text(&done.stderr));
    // Users of a mesh call it from folders of other projects.
    let done = run(in_folder(folder.path(), &["version", "--json"])).await;
    assert!(done.status.success());
}

#[tokio::test]
async fn an_unreadable_env_file_is_named_without_its_contents() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join(".env"), "SECRET_KEY=hunter2 and more\n").unwrap();
    let done = run(in_folder(folder.path(), &["config"])).await;
    let error = text(&done.stderr);
    assert_eq!(done.status.code(), Some(78), "{error}");
    assert!(error.contains(".env") && !error.contains("hunter2"), "{error}");
}

#[tokio::test]
async fn all_invalid_settings_are_named_at_once_in_words() {
    for arguments in [&["all", "--metrics-port=y"][..], &["config", "--metrics-port=y"]] {
        let folder = tempfile::tempdir().unwrap();
        let mut command = in_folder(folder.path(), arguments);
        command.env("PORT", "x").env("HOST", "nowhere").env("LOG_LEVEL", "loud");
        command.env("RATE_LIMIT_ENABLED", "maybe").env("REDIS_URL", "x").env("DATABASE_URL", "y");
        let done = run(command).await;
        let error = text(&done.stderr);
        assert_eq!(done.status.code(), Some(78), "{error}");
        for name in [
            "PORT: \"x\" must be a whole number",
            "METRICS_PORT: \"y\" must be a whole number",
            "HOST: \"nowhere\" must be an IP address",
            "LOG_LEVEL: \"loud\" must be error, warn",
            "RATE_LIMIT_ENABLED: \"maybe\" must be true or false",
            "REDIS_URL: ",
            "DATABASE_URL: ",
        ] {
            assert_eq!(error.matches(&format!(" {name}")).count(), 1, "{name} in {error}");
        }
        assert_eq!(error.lines().count(), 7, "{error}");
    }
}

#[tokio::test]
async fn the_example_is_an_env_file_that_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let example = run(in_folder(folder.path(), &["config", "--example"])).await;
    let plain = run(in_folder(folder.path(), &["config", "--json"])).await;
    let shown = text(&example.stdout);
    assert!(shown.contains("\n#PORT=50051\n"), "{shown}");
    let set = shown.replace("\n#PORT=50051\n", "\nPORT=50051\n");
    fs::write(folder.path().join(".env"), set).unwrap();
    let with_file = run(in_folder(folder.path(), &["config", "--json"])).await;
    assert!(with_file.status.success(), "{}", text(&with_file.stderr));
    assert_eq!(with_file.stdout, plain.stdout);
}

#[tokio::test]
async fn a_gateway_on_the_port_of_the_mesh_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = in_folder(folder.path(), &["gateway", "--out=gateway"]);
    command.env("PORT", "8000");
    let done = run(command).await;
    let error = text(&done.stderr);
    assert_eq!(done.status.code(), Some(78), "{error}");
    assert!(error.contains("GATEWAY_PORT: 8000 is PORT too"), "{error}");
    assert!(!folder.path().join("gateway/envoy.yaml").exists());
}

#[tokio::test]
async fn a_folder_with_the_name_of_an_env_file_is_ignored() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join(".env")).unwrap();
    let done = run(in_folder(folder.path(), &["config"])).await;
    assert!(done.status.success(), "{}", text(&done.stderr));
}
