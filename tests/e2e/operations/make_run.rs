//! `hapa dev`, which `make run` starts: a real small model streams through a real gateway, and Ctrl-C stops every
//! process.

use std::net::TcpListener;
use std::path::Path;
use std::process::Stdio;

use hapa_test_harness::{hapa, within};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader};
use tokio::process::{Child, Command};

const PORTS: [&str; 5] = ["GATEWAY_PORT", "PORT", "METRICS_PORT", "ENVOY_ADMIN_PORT", "MODEL_PORT"];

/// `hapa dev` on ports of its own, with the environment of the shell.
fn hapa_dev(data: &Path, ports: &[(&str, String)]) -> Command {
    let mut command = Command::new(hapa().as_std().get_program());
    command.args(["dev", "--repository", "../.."]);
    command.env("DATA_DIR", data).env_remove("AI_MODEL_ENDPOINT").kill_on_drop(true);
    command.envs(ports.iter().map(|(name, port)| (*name, port)));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn free_ports() -> Vec<(&'static str, String)> {
    // All sockets are open at once, so that no two ports are equal.
    let sockets = PORTS.map(|name| (name, TcpListener::bind("127.0.0.1:0").unwrap()));
    let port = |socket: &TcpListener| socket.local_addr().unwrap().port().to_string();
    sockets.iter().map(|(name, socket)| (*name, port(socket))).collect()
}

async fn interrupt(child: &Child) {
    let pid = child.id().unwrap().to_string();
    assert!(Command::new("kill").args(["-INT", &pid]).status().await.unwrap().success());
}

#[tokio::test]
async fn a_real_model_streams_code_through_a_real_gateway_and_ctrl_c_stops_every_process() {
    let folder = tempfile::tempdir().unwrap();
    let ports = free_ports();
    let port = |name: &str| &ports.iter().find(|(known, _)| *known == name).unwrap().1;
    let mut child = hapa_dev(folder.path(), &ports).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let ready = within("the ready line", async {
        while let Some(line) = lines.next_line().await.unwrap() {
            if line.contains("HAPA is ready") {
                return line;
            }
        }
        let mut errors = String::new();
        child.stderr.take().unwrap().read_to_string(&mut errors).await.unwrap();
        panic!("it exited before it was ready: {errors}")
    });
    let ready = ready.await;
    let key = std::fs::read_to_string(folder.path().join("dev-key")).unwrap();
    assert!(ready.contains(key.trim()) && ready.contains(port("GATEWAY_PORT")), "{ready}");

    // Different requests: an answer from the cache would arrive in one piece.
    for (port_setting, max_tokens) in
        [("PORT", "--max-tokens=24"), ("GATEWAY_PORT", "--max-tokens=23")]
    {
        let mut generate = hapa();
        generate.args(["generate", "--json", max_tokens, "리스트에서 중복 제거하는 함수 만들어줘"]);
        generate.env("HAPA_ADDRESS", format!("http://127.0.0.1:{}", port(port_setting)));
        generate.env("DATA_DIR", folder.path());
        let done = within("an answer", generate.output()).await.unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        let output = String::from_utf8(done.stdout).unwrap();
        let frames: Vec<Value> =
            output.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(frames[0]["started"]["model"], "smollm2-135m-instruct");
        assert!(
            frames.iter().filter(|frame| frame["delta"]["text"].is_string()).count() > 3,
            "{output}"
        );
        let tokens = &frames.last().unwrap()["finished"]["usage"]["completion_tokens"];
        assert!((1..=24).contains(&tokens.as_u64().unwrap()), "{output}");
    }

    interrupt(&child).await;
    assert!(within("the end", child.wait()).await.unwrap().success());
    for (name, port) in &ports {
        let free = TcpListener::bind(format!("127.0.0.1:{port}"));
        assert!(free.is_ok(), "{name} {port} is still in use");
    }
}

#[tokio::test]
async fn a_port_in_use_is_named_with_the_setting_that_changes_it() {
    let folder = tempfile::tempdir().unwrap();
    let ports = free_ports();
    let taken = TcpListener::bind(format!("127.0.0.1:{}", ports[0].1)).unwrap();
    let done = within("a refusal", hapa_dev(folder.path(), &ports).output()).await.unwrap();
    assert_eq!(done.status.code(), Some(1));
    let errors = String::from_utf8(done.stderr).unwrap();
    assert!(errors.contains(&ports[0].1) && errors.contains("GATEWAY_PORT"), "{errors}");
    drop(taken);
}
