//! A process of the mesh that a test starts with its own command, with its log until it serves, and its
//! addresses.

use std::net::SocketAddr;
use std::process::Stdio;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};
use tokio::task::JoinSet;

use crate::test_mesh::reqwest_client;
use crate::tools::within;

/// A process of the mesh. Dropping it kills the process.
#[derive(Debug)]
pub struct ServerProcess {
    /// The process.
    pub child: Child,
    /// The address of its gRPC port.
    pub mesh: SocketAddr,
    /// The lines of its log until it served.
    pub said: Vec<Value>,
    metrics: SocketAddr,
    http: reqwest::Client,
    /// Reads the rest of the log, so that the process is not blocked.
    _rest: JoinSet<()>,
}

impl ServerProcess {
    /// Starts a process, and waits until it serves.
    pub async fn start(mut command: Command) -> ServerProcess {
        command.env("STRUCTURED_LOGGING", "true").kill_on_drop(true);
        let mut child = command.stderr(Stdio::piped()).spawn().expect("the binary runs");
        let mut lines = BufReader::new(child.stderr.take().expect("a pipe")).lines();
        let mut said: Vec<Value> = Vec::new();
        while said.last().is_none_or(|line| line["fields"]["message"] != "serving") {
            let line = within("a line", lines.next_line()).await.expect("text");
            let line = line.unwrap_or_else(|| panic!("it did not serve: {said:?}"));
            said.push(serde_json::from_str(&line).unwrap_or(Value::String(line)));
        }
        let mut rest = JoinSet::new();
        rest.spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        let serving = said.last().expect("it serves");
        let address = |name: &str| serving["fields"][name].as_str().and_then(|at| at.parse().ok());
        let (mesh, metrics) = (address("address"), address("metrics_address"));
        let (mesh, metrics) = (mesh.expect("an address"), metrics.expect("an address"));
        ServerProcess { child, mesh, said, metrics, http: reqwest_client(), _rest: rest }
    }

    /// Whether a message with this text was logged before it served.
    pub fn has_said(&self, words: &str) -> bool {
        let mut messages = self.said.iter().filter_map(|line| line["fields"]["message"].as_str());
        messages.any(|message| message.contains(words))
    }

    /// Status and text of a page of the metrics port.
    pub async fn page(&self, path: &str) -> (u16, String) {
        let url = format!("http://{}{path}", self.metrics);
        let reply = within(path, self.http.get(url).send()).await.expect("the port listens");
        let status = reply.status().as_u16();
        (status, within(path, reply.text()).await.expect("text"))
    }
}
