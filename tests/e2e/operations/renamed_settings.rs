//! Renamed settings: the environment variable of the old name counts while the new one is not set.

use std::process::{Output, Stdio};

use hapa_test_harness::{hapa, within};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, BufReader};

const OLD: &str = "MESH_TOKEN_ALSO";
const NEW: &str = "MESH_TOKEN_PREVIOUS";
const SECRET: &str = "a-secret-of-more-than-32-characters!";
const OTHER_SECRET: &str = "another-secret-of-more-than-32-letters";

const NEW_NAMES: [&str; 7] = [
    "API_KEY_PEPPER_PREVIOUS",
    "SECRET_KEY_PREVIOUS",
    "SESSION_KEY_FILE_PREVIOUS",
    "MESH_TOKEN_PREVIOUS",
    "PRIORITIZE_COMPLETIONS",
    "OUTBOX_MAX_EVENTS",
    "OUTBOX_MAX_AGE_HOURS",
];

async fn config(arguments: &[&str], settings: &[(&str, &str)]) -> Output {
    let mut command = hapa();
    command.arg("config").args(arguments).envs(settings.iter().copied());
    within("the command", command.stdin(Stdio::null()).output()).await.unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

fn row<'a>(table: &'a str, name: &str) -> &'a str {
    let mut lines = table.lines();
    lines.find(|line| line.trim_start().starts_with(&format!("{name} "))).unwrap()
}

#[tokio::test]
async fn every_new_name_is_a_setting() {
    let done = config(&["--json"], &[]).await;
    let settings: Value = serde_json::from_slice(&done.stdout).unwrap();
    for name in NEW_NAMES {
        assert!(settings[name].is_string(), "{name}");
    }
}

#[tokio::test]
async fn an_old_name_counts_with_one_warning_and_without_the_secret_in_any_output() {
    let done = config(&[], &[(OLD, SECRET)]).await;
    let (shown, warnings) = (text(&done.stdout), text(&done.stderr));
    assert!(done.status.success(), "{warnings}");
    assert!(row(shown, NEW).contains("(redacted)"), "{shown}");
    assert!(row(shown, NEW).contains(&format!("environment ({OLD})")), "{shown}");
    assert!(warnings.lines().count() == 1 && warnings.contains(OLD), "{warnings}");
    assert!(warnings.contains(NEW) && !format!("{shown}{warnings}").contains(SECRET), "{warnings}");

    let done = config(&["--mesh-token-previous", OTHER_SECRET], &[(OLD, SECRET)]).await;
    assert!(row(text(&done.stdout), NEW).contains("flag"), "a flag takes precedence");
}

#[tokio::test]
async fn equal_values_are_accepted_and_different_ones_are_refused_with_both_names() {
    let done = config(&[], &[(OLD, SECRET), (NEW, SECRET)]).await;
    assert!(done.status.success() && done.stderr.is_empty(), "{}", text(&done.stderr));
    let done = config(&[], &[(OLD, SECRET), (NEW, OTHER_SECRET)]).await;
    let error = text(&done.stderr);
    assert_eq!(done.status.code(), Some(78), "{error}");
    assert!(error.contains(OLD) && error.contains(NEW), "{error}");
    assert!(!error.contains(SECRET) && !error.contains(OTHER_SECRET), "{error}");
    // A command without the setting ignores both.
    let mut command = hapa();
    command.arg("version").env(OLD, SECRET).env(NEW, OTHER_SECRET);
    let done = within("the command", command.output()).await.unwrap();
    assert!(done.status.success() && done.stderr.is_empty(), "{}", text(&done.stderr));
}

#[tokio::test]
async fn a_role_logs_the_warning() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = hapa();
    command.args(["all", "--port=0", "--metrics-port=0"]).env("DATA_DIR", folder.path());
    command.env("SPOOL_MAX_EVENTS", "1000").stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let line = within("the first line", lines.next_line()).await.unwrap().unwrap();
    assert!(line.contains("SPOOL_MAX_EVENTS") && line.contains("OUTBOX_MAX_EVENTS"), "{line}");
}
