//! The log writer: the process continues whatever happens to the reader of the log.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use base64::Engine as _;
use hapa_engine_sim::{Engine, Script};
use hapa_proto::auth::v1::create_session_request::{Password, Proof};
use hapa_proto::auth::v1::session_service_client::SessionServiceClient;
use hapa_proto::auth::v1::user_service_client::UserServiceClient;
use hapa_proto::auth::v1::{CreateSessionRequest, CreateUserRequest};
use hapa_proto::codegen::v1::codegen_service_client::CodegenServiceClient;
use hapa_proto::codegen::v1::stream_generate_code_response::Event;
use hapa_test_harness::{
    CodegenClient, Identity, Metrics, PASSWORD, TestChannel, hapa, reqwest_client, signal, within,
};
use serde_json::Value;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStderr};
use tokio::time::sleep;
use tonic::transport::{Channel, Endpoint};

use super::{TOKEN, asked, lines, message};
use crate::api::generate::question;

const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// A process with a log that the test controls.
struct Process {
    engine: Engine,
    child: Child,
    channel: Channel,
    client: CodegenClient,
    http: reqwest::Client,
    metrics: String,
    folder: TempDir,
    /// Lines of standard error. Only the test reads them.
    said: Lines<BufReader<ChildStderr>>,
}

impl Process {
    async fn start(settings: &[(&str, &str)]) -> Process {
        let (engine, folder) = (Engine::start(), tempfile::tempdir().unwrap());
        let ports = [free_port(), free_port()];
        let mut command = hapa();
        command.args(["all", "--structured-logging=true", "--cache-ttl=0"]);
        command.args([format!("--port={}", ports[0]), format!("--metrics-port={}", ports[1])]);
        command.env("DATA_DIR", folder.path()).env("MESH_TOKEN", TOKEN);
        command.env("AI_MODEL_ENDPOINT", engine.url()).envs(settings.iter().copied());
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let said = BufReader::new(child.stderr.take().unwrap()).lines();
        let channel = Endpoint::from_shared(format!("http://127.0.0.1:{}", ports[0])).unwrap();
        let channel = channel.connect_lazy();
        let client = CodegenServiceClient::new(Identity::Mesh.on(channel.clone()));
        let http = reqwest_client();
        let metrics = format!("http://127.0.0.1:{}", ports[1]);
        let process = Process { engine, child, channel, client, http, metrics, folder, said };
        within("the process to be ready", async {
            while process.page("/readyz").await.is_none() {
                sleep(POLL_INTERVAL).await;
            }
        })
        .await;
        process
    }

    /// A page of the metrics port; `None` if the reply is no success.
    async fn page(&self, path: &str) -> Option<String> {
        let reply = self.http.get(format!("{}{path}", self.metrics)).send().await;
        reply.ok()?.error_for_status().ok()?.text().await.ok()
    }

    async fn dropped(&self) -> f64 {
        let page = within("the metrics", self.page("/metrics")).await.expect("they are there");
        Metrics::of(page).sum("hapa_log_lines_dropped_total", &[])
    }

    async fn calls(&mut self, begin: &str) {
        let asked = asked("a question", begin);
        within("a call", self.client.generate_code(asked)).await.unwrap();
    }

    async fn stop(&mut self) {
        signal(&self.child, "-TERM").await;
        let status = within("the process to end", self.child.wait()).await.unwrap();
        assert!(status.success(), "{status}");
    }
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn has_line(file: &Path, says: &str) -> bool {
    lines(file).iter().any(|line| message(line) == says)
}

#[tokio::test]
async fn an_unread_standard_error_blocks_no_call_and_lost_lines_are_counted_and_logged() {
    let mut process = Process::start(&[("LOG_LEVEL", "trace,h2=trace,hyper=trace")]).await;
    let mut calls = 0;
    while process.dropped().await == 0.0 {
        process.calls(&format!("call-{calls}")).await;
        assert_eq!(within("/livez", process.page("/livez")).await.as_deref(), Some("alive\n"));
        calls += 1;
    }
    // Reading resumes: first come the queued lines, and then the number of dropped lines.
    within("the report", async {
        loop {
            let line = process.said.next_line().await.unwrap().expect("it goes on");
            let line: Value = serde_json::from_str(&line).unwrap();
            if message(&line) == "log lines were dropped" {
                assert!(line["fields"]["lines"].as_u64().unwrap() > 0);
                break;
            }
        }
    })
    .await;
}

#[tokio::test]
async fn a_process_with_an_unread_log_ends_in_order_and_at_once() {
    let mut process = Process::start(&[("LOG_LEVEL", "trace,h2=trace,hyper=trace")]).await;
    // More than a pipe holds.
    for call in 0..10 {
        process.calls(&format!("call-{call}")).await;
    }
    process.stop().await;
    // The same for a process that ends with an error message.
    let (folder, file) = (process.folder.path(), process.folder.path().join("none/such/key"));
    let mut command = hapa();
    command.args(["all", "--port=0", "--metrics-port=0"]).env("LOG_LEVEL", "off");
    command.env("DATA_DIR", folder).env("SESSION_KEY_FILE", file);
    let (reader, writer) = std::io::pipe().unwrap();
    fill(&writer);
    let mut child = command.stderr(writer).spawn().unwrap();
    let status = within("a process with a wrong setting to end", child.wait()).await.unwrap();
    assert_eq!(status.code(), Some(78));
    drop(reader);
}

/// Writes into a pipe until it takes no more.
fn fill(writer: &std::io::PipeWriter) {
    use std::io::Write as _;
    let mut writer = writer.try_clone().unwrap();
    // The default capacity of a pipe is 64 KiB.
    writer.write_all(&vec![b' '; 64 * 1024]).unwrap();
}

#[tokio::test]
async fn a_disk_that_is_full_stops_no_call() {
    let mut process = Process::start(&[("LOG_FILE", "/dev/full")]).await;
    for call in 0..3 {
        process.calls(&format!("call-{call}")).await;
    }
    within("lines to be counted as lost", async {
        while process.dropped().await < 3.0 {
            sleep(POLL_INTERVAL).await;
        }
    })
    .await;
    assert_eq!(process.page("/livez").await.as_deref(), Some("alive\n"));
    process.stop().await;
}

#[tokio::test]
async fn a_hangup_opens_the_log_anew_and_breaks_no_stream() {
    let folder = tempfile::tempdir().unwrap();
    let (file, old) = (folder.path().join("hapa.log"), folder.path().join("hapa.log.old"));
    let mut process = Process::start(&[("LOG_FILE", file.to_str().unwrap())]).await;
    process.engine.once(Script::tokens(["a", "b"]).hold(1));
    let frames = within("a stream", process.client.stream_generate_code(question("q"))).await;
    let mut frames = frames.unwrap().into_inner();
    within("its begin", frames.message()).await.unwrap();
    std::fs::rename(&file, &old).unwrap();
    // Sent twice, because a second SIGHUP must not end the process.
    for _ in 0..2 {
        signal(&process.child, "-HUP").await;
    }
    within("the new file", async {
        while !has_line(&file, "LOG_FILE is reopened") {
            sleep(POLL_INTERVAL).await;
        }
    })
    .await;
    process.engine.release();
    let mut last = None;
    while let Some(frame) = within("a frame", frames.message()).await.unwrap() {
        last = frame.event;
    }
    assert!(matches!(last, Some(Event::Finished(_))), "{last:?}");
    process.stop().await;
    assert!(has_line(&old, "serving"), "what was said before is where it was");
    assert_eq!(lines(&file).last().map(message), Some("stopped"), "the last line is written");
}

/// As `openssl genpkey -algorithm ed25519` writes it: RFC 8410, 10.3.
fn signing_key(seed: u8) -> String {
    let begin = b"\x30\x2e\x02\x01\x00\x30\x05\x06\x03\x2b\x65\x70\x04\x22\x04\x20";
    let text = base64::prelude::BASE64_STANDARD.encode([&begin[..], &[seed; 32]].concat());
    format!("-----BEGIN PRIVATE KEY-----\n{text}\n-----END PRIVATE KEY-----\n")
}

/// Logs in; the name of the key that signed the access token.
async fn signed_by(sessions: &mut SessionServiceClient<TestChannel>) -> String {
    let password = Password { email: "ann@example.com".to_owned(), password: PASSWORD.to_owned() };
    let request = CreateSessionRequest { proof: Some(Proof::Password(password)), http_body: None };
    let session = within("a session", sessions.create_session(request)).await.unwrap();
    let token = session.into_inner().access_token;
    let header = token.split('.').next().unwrap();
    let header = base64::prelude::BASE64_URL_SAFE_NO_PAD.decode(header).unwrap();
    let header: Value = serde_json::from_slice(&header).unwrap();
    header["kid"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn a_hangup_reads_signing_keys_again_and_keeps_those_from_before_where_it_can_not() {
    let folder = tempfile::tempdir().unwrap();
    let (log, key) = (folder.path().join("hapa.log"), folder.path().join("key.pem"));
    std::fs::write(&key, signing_key(7)).unwrap();
    let settings =
        [("LOG_FILE", log.to_str().unwrap()), ("SESSION_KEY_FILE", key.to_str().unwrap())];
    let process = Process::start(&settings).await;
    let request = CreateUserRequest {
        email: "ann@example.com".to_owned(),
        password: PASSWORD.to_owned(),
        ..CreateUserRequest::default()
    };
    let mut users = UserServiceClient::new(Identity::Mesh.on(process.channel.clone()));
    within("a user", users.create_user(request)).await.unwrap();
    let mut sessions = SessionServiceClient::new(Identity::Anonymous.on(process.channel.clone()));
    let first = signed_by(&mut sessions).await;
    let after_hangup = async |text: &str, says: &str| {
        std::fs::write(&key, text).unwrap();
        signal(&process.child, "-HUP").await;
        within(says, async {
            while !has_line(&log, says) {
                sleep(POLL_INTERVAL).await;
            }
        })
        .await;
    };
    let kept = "cannot reload the signing keys of access tokens; the current keys stay in use";
    after_hangup("no key", kept).await;
    assert_eq!(signed_by(&mut sessions).await, first);
    let read = "reloaded the signing keys of access tokens";
    after_hangup(&signing_key(8), read).await;
    assert_ne!(signed_by(&mut sessions).await, first);
}

#[tokio::test]
async fn an_unhandled_signal_ends_a_process_as_usual() {
    let mut process = Process::start(&[]).await;
    signal(&process.child, "-USR1").await;
    let status = within("the process to end", process.child.wait()).await.unwrap();
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(10));
}
