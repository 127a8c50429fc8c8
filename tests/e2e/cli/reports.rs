//! The commands for errors, usage and current load.

use std::process::Stdio;
use std::time::{Duration, SystemTime};

use hapa_proto::analytics::v1::analytics_service_client::AnalyticsServiceClient;
use hapa_proto::analytics::v1::{RecordEventsRequest, UsageEvent};
use hapa_proto::errors::v1::error_tracking_service_client::ErrorTrackingServiceClient;
use hapa_proto::errors::v1::{Occurrence, ReportOccurrencesRequest};
use hapa_test_harness::{Identity, TestMesh, hapa, within};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::Command;
use tokio::time::sleep;

const POLL_INTERVAL: Duration = Duration::from_millis(200);
const SHOWN: &str = "INC-20260203-0123ABCD";

/// An operator's command.
fn command(mesh: &TestMesh, line: &str) -> Command {
    let mut command = hapa();
    command.args(line.split(' ')).stdin(Stdio::null());
    command.env("HAPA_ADDRESS", format!("http://{}", mesh.address));
    command.env("MESH_TOKEN", mesh.mesh_token());
    command
}

/// Exit status and output of a command.
async fn run(mesh: &TestMesh, line: &str) -> (bool, String, String) {
    let done = within(line, command(mesh, line).output()).await.unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (done.status.success(), text(done.stdout), text(done.stderr))
}

async fn fine(mesh: &TestMesh, line: &str) -> String {
    let (ok, out, notes) = run(mesh, line).await;
    assert!(ok, "{line}: {out}{notes}");
    out
}

async fn json(mesh: &TestMesh, line: &str) -> Vec<Value> {
    let out = fine(mesh, &format!("{line} --json")).await;
    out.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// A UUID of version 7 that no other has.
fn event_id() -> String {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_millis();
    let next = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("{:08x}-{:04x}-7000-8000-{next:012x}", now >> 16, now & 0xffff)
}

fn occurrence(code: &str, incident_id: &str) -> Occurrence {
    Occurrence {
        event_id: event_id(),
        incident_id: incident_id.to_owned(),
        time: Some(SystemTime::now().into()),
        error_code: code.to_owned(),
        method: "/hapa.test.v1.TestService/Report".to_owned(),
        message: "the test's engine is away".to_owned(),
        causes: vec!["connection refused".to_owned()],
        service: "test".to_owned(),
        version: "1.2.2".to_owned(),
        actor: "key:key_test".to_owned(),
        owner: "tester".to_owned(),
        ..Occurrence::default()
    }
}

async fn report(mesh: &TestMesh, occurrences: Vec<Occurrence>) {
    let mut client = ErrorTrackingServiceClient::new(mesh.channel_as(Identity::Mesh));
    let request = ReportOccurrencesRequest { occurrences };
    within("a report", client.report_occurrences(request)).await.unwrap();
}

async fn record(mesh: &TestMesh, events: Vec<UsageEvent>) {
    let mut client = AnalyticsServiceClient::new(mesh.channel_as(Identity::Mesh));
    within("events", client.record_events(RecordEventsRequest { events })).await.unwrap();
}

fn event(owner: &str, model: &str, tokens: u32) -> UsageEvent {
    UsageEvent {
        event_id: event_id(),
        time: Some(SystemTime::now().into()),
        method: "/hapa.test.v1.TestService/Use".to_owned(),
        grpc_status: "OK".to_owned(),
        owner: owner.to_owned(),
        model: model.to_owned(),
        prompt_tokens: tokens,
        completion_tokens: 1,
        duration_us: 250_000,
        service: "test".to_owned(),
        ..UsageEvent::default()
    }
}

#[tokio::test]
async fn flags_of_the_errors_role_and_of_its_client_do_not_mix() {
    let cases = [
        ("errors --port 0 dashboard", "dashboard"),
        ("errors dashboard --port 0", "--port"),
        ("errors patterns --period 2h", "24h"),
        ("errors incidents --status new", "acknowledged"),
        ("usage --group-by planet", "planet"),
        ("usage --csv - --json", "--csv"),
    ];
    for (line, word) in cases {
        let mut command = hapa();
        let done = within(line, command.args(line.split(' ')).output()).await.unwrap();
        let said = String::from_utf8(done.stderr).unwrap();
        assert!(!done.status.success() && said.contains(word), "{line}: {said}");
    }
}

#[tokio::test]
async fn an_operator_finds_what_a_user_was_shown_and_settles_it() {
    let mesh = TestMesh::start().await;
    // No test causes this code.
    report(&mesh, vec![occurrence("E5009", SHOWN), occurrence("E5009", "")]).await;
    let incidents = json(&mesh, "errors incidents --code E5009 --since 1h --status open").await;
    assert_eq!(incidents.len(), 1, "{incidents:?}");
    let id = incidents[0]["incident_id"].as_str().unwrap();
    assert_eq!(incidents[0]["count"], 2);
    let listed = fine(&mesh, "errors incidents --code E5009").await;
    assert!(listed.contains(id) && listed.contains("Report"), "{listed}");

    let shown = fine(&mesh, &format!("errors show {SHOWN}")).await;
    for word in ["E5009", "connection refused", "key:key_test", "the test's engine is away"] {
        assert!(shown.contains(word), "{word}: {shown}");
    }
    fine(&mesh, &format!("errors acknowledge {SHOWN} --note looking")).await;
    let (ok, _, notes) = run(&mesh, &format!("errors reopen {SHOWN} --expect open")).await;
    assert!(!ok && notes.contains("E4009"), "{notes}");
    let resolved = json(&mesh, &format!("errors resolve {SHOWN} --version 1.2.3")).await;
    assert_eq!(resolved[0]["status"], "resolved");
    assert_eq!(resolved[0]["resolved_in_version"], "1.2.3");
    let opened = json(&mesh, &format!("errors reopen {SHOWN}")).await;
    assert_eq!(opened[0]["status"], "open");
    let (ok, _, notes) = run(&mesh, "errors show INC-20200101-00000000").await;
    assert!(!ok && notes.contains("E4010"), "{notes}");
}

#[tokio::test]
async fn errors_are_summed_up_and_their_codes_explained() {
    let mesh = TestMesh::start().await;
    report(&mesh, vec![occurrence("E5009", SHOWN)]).await;
    let sums = json(&mesh, "errors dashboard").await;
    assert!(sums[0]["errors_last_24h"].as_u64().unwrap() >= 1, "{sums:?}");
    let shown = fine(&mesh, "errors dashboard").await;
    assert!(shown.contains("ERRORS STORED") && shown.contains("E5009"), "{shown}");
    let patterns = json(&mesh, "errors patterns --period 1h").await;
    let ours = patterns.iter().find(|pattern| pattern["error_code"] == "E5009").unwrap();
    assert_eq!(ours["trend"], "new");
    assert!(fine(&mesh, "errors patterns").await.contains("TREND"));
    assert_eq!(json(&mesh, "errors codes").await.len(), 26);
    assert!(fine(&mesh, "errors codes").await.contains("MODEL_UNREACHABLE"));
}

#[tokio::test]
async fn errors_are_watched_as_they_happen() {
    let mesh = TestMesh::start().await;
    let mut watch = command(&mesh, "errors watch --code E5009");
    let mut child = watch.stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    // The watch starts at an unknown time, because it prints nothing before the first event.
    let reports = async {
        loop {
            report(&mesh, vec![occurrence("E5009", SHOWN)]).await;
            sleep(POLL_INTERVAL).await;
        }
    };
    let line = tokio::select! {
        line = within("a line", lines.next_line()) => line.unwrap().unwrap(),
        () = reports => unreachable!(),
    };
    assert!(line.contains("E5009") && line.contains(SHOWN), "{line}");
}

#[tokio::test]
async fn usage_is_grouped_listed_and_exported_through_all_pages() {
    const OWNERS: usize = 1_200;
    let mesh = TestMesh::start().await;
    record(&mesh, vec![event("team,a", "big", 10), event("team,a", "small", 5)]).await;
    let line = "usage --since 1d --owner team,a --group-by owner,model";
    within("the usage", async {
        while json(&mesh, line).await.len() < 2 {
            sleep(POLL_INTERVAL).await;
        }
    })
    .await;
    let rows = json(&mesh, line).await;
    assert_eq!((rows[0]["model"].as_str(), &rows[0]["total_tokens"]), (Some("big"), &11.0.into()));
    let shown = fine(&mesh, line).await;
    assert!(
        shown.contains("PROMPT TOKENS")
            && !shown.contains("REASONING")
            && shown.contains("all")
            && shown.contains("17"),
        "{shown}"
    );

    for batch in 0..2 {
        let owner = |at: usize| format!("owner-{batch}-{at}");
        record(&mesh, (0..OWNERS / 2).map(|at| event(&owner(at), "big", 1)).collect()).await;
    }
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("usage.csv");
    let export = format!("usage --since 1d --csv {}", file.display());
    within("every owner", async {
        loop {
            fine(&mesh, &export).await;
            let csv = std::fs::read_to_string(&file).unwrap();
            if csv.lines().filter(|line| line.starts_with("owner-")).count() == OWNERS {
                return;
            }
            sleep(POLL_INTERVAL).await;
        }
    })
    .await;
    let csv = fine(&mesh, "usage --since 1d --csv - --owner team,a").await;
    let expected = "owner,requests,errors,prompt_tokens,completion_tokens,total_tokens,reasoning_tokens\r\n\"team,a\",2,0,15,2,17,0\r\n";
    assert_eq!(csv, expected);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left beside it");
}

#[tokio::test]
async fn top_is_a_snapshot_in_a_pipe_and_frames_as_json() {
    let mesh = TestMesh::start().await;
    record(&mesh, vec![event("team", "big", 10)]).await;
    let shown = fine(&mesh, "top").await;
    assert!(shown.contains("a minute") && shown.contains("P95"), "{shown}");
    assert!(!shown.contains('\u{1b}'), "{shown:?}");
    let mut frames = command(&mesh, "top --json --method Use");
    let mut child = frames.stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    for _ in 0..2 {
        let line = within("a frame", lines.next_line()).await.unwrap().unwrap();
        let frame: Value = serde_json::from_str(&line).unwrap();
        assert!(frame["performance"]["requests"].is_number(), "{frame}");
    }
}

#[tokio::test]
async fn top_draws_on_a_terminal_and_gives_it_back() {
    let mesh = TestMesh::start().await;
    let binary = hapa().as_std().get_program().to_str().unwrap().to_owned();
    // util-linux gives it a terminal of its own.
    let mut terminal = Command::new("script");
    terminal.args(["-qefc", &format!("stty rows 40 cols 120; {binary} top; stty -a"), "/dev/null"]);
    terminal.env("HAPA_ADDRESS", format!("http://{}", mesh.address)).kill_on_drop(true);
    terminal.env("MESH_TOKEN", mesh.mesh_token()).env("TERM", "xterm");
    let mut child = terminal.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let (mut keys, mut screen) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    let mut seen = String::new();
    let mut read = async |until: &str| {
        within(until, async {
            while !seen.contains(until) {
                let mut bytes = vec![0; 4_096];
                let length = screen.read(&mut bytes).await.unwrap();
                assert!(length > 0, "it ended: {seen}");
                seen += &String::from_utf8_lossy(&bytes[..length]);
            }
        })
        .await;
        seen.clone()
    };
    read("quits").await;
    keys.write_all(b"q").await.unwrap();
    let seen = read("extproc").await;
    let left = seen.find("\u{1b}[?1049l").expect("the screen is given back");
    assert!(seen[left..].contains(" icanon") && seen[left..].contains(" echo "), "{seen}");
    assert!(within("the end", child.wait()).await.unwrap().success());
}
