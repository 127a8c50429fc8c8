//! Helpers of tests: a time limit for every wait, the binary, and details of errors.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;
use tokio::process::{Child, Command};
use tokio::time::{sleep, timeout};
use tonic::Status;

/// The time limit of every wait, for a busy machine.
const WAIT_TIMEOUT: Duration = Duration::from_mins(1);

/// Between two polls of something that takes a moment.
pub(crate) const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Waits, but not for ever.
pub async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    let done = timeout(WAIT_TIMEOUT, future).await;
    done.unwrap_or_else(|_| panic!("waited {} s for {what}", WAIT_TIMEOUT.as_secs()))
}

/// The folder of the workspace.
pub(crate) fn root() -> PathBuf {
    let harness = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    harness.ancestors().nth(2).expect("tests/harness of the workspace").to_owned()
}

/// The binary, without the settings that the surrounding shell may have.
pub fn hapa() -> Command {
    let test = std::env::current_exe().expect("a test is a file");
    let target = test.ancestors().nth(2).expect("target/PROFILE/deps/test");
    let hapa = target.join("hapa");
    assert!(hapa.exists(), "{} is missing: `cargo build` makes it", hapa.display());
    let mut command = Command::new(hapa);
    command.env_clear().kill_on_drop(true).current_dir(root());
    command
}

/// The same, where a file that may not grow fails a write and does not end the process.
pub(crate) fn hapa_with_file_limits() -> Command {
    let hapa = hapa();
    let mut command = Command::new("sh");
    command.args(["-c", "trap '' XFSZ; exec \"$0\" \"$@\""]).arg(hapa.as_std().get_program());
    command.env_clear().kill_on_drop(true).current_dir(root());
    command
}

/// Bounds the size of each file that a process writes, or ends the bound: as a full disk would.
pub(crate) async fn limit_files(process: &Child, bytes: Option<u64>) {
    let process = process.id().expect("it runs").to_string();
    let limit = bytes.map_or("unlimited".to_owned(), |bytes| bytes.to_string());
    let limit = format!("--fsize={limit}:unlimited");
    let status = Command::new("prlimit").args(["--pid", &process, &limit]).status().await;
    assert!(status.expect("prlimit runs").success());
}

/// Stops a process from running; its connections stay.
pub(crate) async fn freeze(process: &Child) {
    signal(process, "-STOP").await;
    let stat = format!("/proc/{}/stat", process.id().expect("it runs"));
    within("a process to freeze", async {
        while !std::fs::read_to_string(&stat).expect("it runs").contains(") T ") {
            sleep(POLL_INTERVAL).await;
        }
    })
    .await;
}

/// Lets it run again.
pub(crate) async fn thaw(process: &Child) {
    signal(process, "-CONT").await;
}

/// The memory that a process takes: <https://man7.org/linux/man-pages/man5/proc_pid_statm.5.html>.
pub(crate) fn resident_bytes(process: &Child) -> u64 {
    let statm = format!("/proc/{}/statm", process.id().expect("it runs"));
    let statm = std::fs::read_to_string(statm).expect("it runs");
    let pages: u64 = statm.split(' ').nth(1).and_then(|pages| pages.parse().ok()).expect("pages");
    pages * 4096
}

/// Sends a process a signal, such as "-TERM".
pub async fn signal(process: &Child, name: &str) {
    let process = process.id().expect("it runs").to_string();
    let status = Command::new("kill").args([name, &process]).status().await;
    assert!(status.expect("kill runs").success());
}

/// The published code and the incident id of a failed call.
#[track_caller]
pub fn incident(status: &Status) -> (String, String) {
    let (code, id) = hapa_core::rpc_error::published_code(status)
        .unwrap_or_else(|| panic!("no published code in {status:?}"));
    assert_incident_id(&id);
    (code, id)
}

/// The same of a refusal in JSON.
#[track_caller]
pub fn refusal(body: &Value) -> (String, String) {
    let info = body["details"].as_array().into_iter().flatten().find(|one| one["domain"] == "hapa");
    let info = info.unwrap_or_else(|| panic!("no ErrorInfo in {body}"));
    let text = |name: &str| info["metadata"][name].as_str().unwrap_or_default().to_owned();
    let (code, id) = (text("error_code"), text("incident_id"));
    assert_incident_id(&id);
    (code, id)
}

#[track_caller]
fn assert_incident_id(id: &str) {
    let parts: Vec<_> = id.split('-').collect();
    let hex = |text: &str| text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'A'..=b'F'));
    let well_formed =
        matches!(parts[..], ["INC", day, tail] if day.len() == 8 && tail.len() == 8 && hex(tail));
    assert!(well_formed, "{id} is no incident id");
}

/// The contents of /metrics.
#[derive(Debug)]
pub struct Metrics(pub(crate) String);

impl Metrics {
    /// The text of a page of metrics.
    pub fn of(page: String) -> Metrics {
        Metrics(page)
    }

    /// The sum of a metric's series that have all of these label texts, such as `code="OK"`.
    pub fn sum(&self, name: &str, labels: &[&str]) -> f64 {
        let series = self.0.lines().filter_map(|line| {
            let (series, value) = line.rsplit_once(' ')?;
            let (metric, rest) = series.split_once('{').unwrap_or((series, ""));
            (metric == name && labels.iter().all(|label| rest.contains(label)))
                .then(|| value.parse::<f64>().ok())?
        });
        series.sum()
    }

    /// The whole text.
    pub fn text(&self) -> &str {
        &self.0
    }
}

/// The files of a folder, and of the folders in it, that contain a text. A file that is removed meanwhile does not.
pub fn files_with(folder: &Path, text: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).expect("a folder");
    let paths = entries.map(|entry| entry.expect("an entry").path());
    let found = paths.flat_map(|path| {
        if path.is_dir() {
            return files_with(&path, text);
        }
        let bytes = std::fs::read(&path).unwrap_or_default();
        let holds = bytes.windows(text.len()).any(|window| window == text.as_bytes());
        if holds { vec![path] } else { Vec::new() }
    });
    found.collect()
}
