//! A page in a real Chromium calls the mesh through the gateway, from an allowed and from another origin.

use std::process::Stdio;

use hapa_engine_sim::Script;
use hapa_test_harness::{TestMesh, within};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines};
use tokio::process::{ChildStdin, ChildStdout, Command};

/// The lines that the browser's driver prints, and the ones it waits for.
struct Browser {
    events: Lines<BufReader<ChildStdout>>,
    go: ChildStdin,
}

impl Browser {
    async fn event(&mut self, name: &str) -> Value {
        let line = within(name, self.events.next_line()).await.unwrap();
        let event: Value =
            serde_json::from_str(&line.expect("the browser's driver lives")).unwrap();
        assert_eq!(event["event"], name, "{event}");
        event
    }

    async fn go(&mut self, word: &str) {
        let line = format!("{}\n", json!({ "go": word }));
        self.go.write_all(line.as_bytes()).await.unwrap();
    }
}

#[tokio::test]
async fn a_page_of_an_allowed_origin_streams_cancels_and_others_are_refused() {
    let mesh = TestMesh::start().await;
    let [allowed, other] = free_ports();
    let origin = format!("http://127.0.0.1:{allowed}");
    let gateway = mesh.gateway(&[&origin]).await;
    let mut command = Command::new("node");
    command.arg("browser/run.mjs").kill_on_drop(true).stdin(Stdio::piped()).stdout(Stdio::piped());
    command.env("HAPA_GATEWAY", &gateway.url).env("HAPA_KEY", &mesh.key);
    command.env("HAPA_PAGE_PORT_ALLOWED", allowed.to_string());
    command.env("HAPA_PAGE_PORT_OTHER", other.to_string());
    let mut node = command.spawn().expect("node runs: Node 20 or newer is needed");
    let events = BufReader::new(node.stdout.take().unwrap()).lines();
    let mut browser = Browser { events, go: node.stdin.take().unwrap() };

    mesh.engine.once(Script::text("see:\n```python\nx = 1\n```\nend").hold(1));
    mesh.engine.once(Script::tokens(["a", "b"]).hold(1));
    browser.event("first-token-rendered").await;
    assert_eq!(mesh.engine.in_flight(), 1, "the engine has not finished");
    mesh.engine.release();
    browser.go("finish").await;
    let finished = browser.event("finished").await;
    assert_eq!(finished["finish_reason"], "stop");
    assert_eq!(finished["code"].as_str().unwrap().trim(), "x = 1");

    browser.event("cancelled").await;
    mesh.engine.wait_for_aborted(1).await;
    browser.go("next").await;
    browser.event("refused").await;
    let error = browser.event("error").await;
    assert_eq!(error["code"], "E4003");
    mesh.track_incident(error["incident_id"].as_str().unwrap());
    assert!(within("the driver to end", node.wait()).await.unwrap().success());
    assert_eq!(mesh.engine.counts().started, 2, "the refused page reached nothing");
    mesh.finish().await;
}

fn free_ports() -> [u16; 2] {
    let sockets = [0, 0].map(|port| std::net::TcpListener::bind(("127.0.0.1", port)).unwrap());
    sockets.map(|socket| socket.local_addr().unwrap().port())
}
