//! A process that has few file descriptors: its probes answer, and callers get what is left.

use std::net::SocketAddr;
use std::process::Stdio;

use hapa_proto::codegen::v1::codegen_service_client::CodegenServiceClient;
use hapa_tests::engine::{Engine, Script};
use hapa_tests::{Client, Who, hapa, within};
use serde_json::Value;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio::task::JoinSet;
use tonic::transport::Endpoint;

use crate::generate::question;

/// The preface of HTTP/2 and settings with nothing in them: a connection that stays.
const GREETING: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

struct Process {
    engine: Engine,
    mesh: SocketAddr,
    metrics: SocketAddr,
    /// What was said until it served.
    said: Vec<Value>,
    client: Client,
    http: reqwest::Client,
    _rest: JoinSet<()>,
    _child: Child,
    _folder: TempDir,
}

impl Process {
    /// With so many descriptors.
    async fn start(descriptors: usize) -> Process {
        let (engine, folder) = (Engine::start(), tempfile::tempdir().unwrap());
        let mut command = Command::new("sh");
        command.args(["-c", &format!("ulimit -n {descriptors}; exec \"$0\" \"$@\"")]);
        command.arg(hapa().as_std().get_program()).args(["all", "--port=0", "--metrics-port=0"]);
        command.env_clear().kill_on_drop(true).env("STRUCTURED_LOGGING", "true");
        command.env("DATA_DIR", folder.path()).env("MESH_TOKEN", hapa_tests::TOKEN);
        command.env("AI_MODEL_ENDPOINT", engine.url()).env("CACHE_TTL", "0");
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut said: Vec<Value> = Vec::new();
        while said.last().is_none_or(|line| line["fields"]["message"] != "serving") {
            let line = within("a line", lines.next_line()).await.unwrap().expect("it serves");
            said.push(serde_json::from_str(&line).unwrap());
        }
        let mut rest = JoinSet::new();
        rest.spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        let serving = said.last().unwrap();
        let address = |name: &str| serving["fields"][name].as_str().unwrap().parse().unwrap();
        let (mesh, metrics): (SocketAddr, _) = (address("address"), address("metrics_address"));
        let channel = Endpoint::from_shared(format!("http://{mesh}")).unwrap().connect_lazy();
        let client = CodegenServiceClient::new(Who::Mesh.on(channel));
        let http = reqwest::Client::builder().no_proxy().build().unwrap();
        Process {
            engine,
            mesh,
            metrics,
            said,
            client,
            http,
            _rest: rest,
            _child: child,
            _folder: folder,
        }
    }

    async fn status(&self, path: &str) -> u16 {
        let url = format!("http://{}{path}", self.metrics);
        within(path, self.http.get(url).send()).await.unwrap().status().as_u16()
    }

    async fn probes_answer(&self) {
        for _ in 0..10 {
            assert_eq!((self.status("/livez").await, self.status("/readyz").await), (200, 200));
        }
        assert_eq!(self.status("/metrics").await, 200);
    }
}

#[tokio::test]
async fn probes_and_calls_answer_though_callers_take_every_connection_they_get() {
    let mut process = Process::start(128).await;
    let warned = process.said.iter().any(|line| {
        let message = line["fields"]["message"].as_str().unwrap_or_default();
        message.contains("MAX_CONNECTIONS does not fit into RLIMIT_NOFILE")
    });
    assert!(warned, "{:?}", process.said);
    within("a call", process.client.generate_code(question("q"))).await.unwrap();
    let mut greedy = Vec::new();
    for _ in 0..200 {
        let mut stream = within("a connection", TcpStream::connect(process.mesh)).await.unwrap();
        stream.write_all(GREETING).await.unwrap();
        greedy.push(stream);
    }
    // The first ones are taken, so the process has got to them.
    let mut greeted = [0; 9];
    within("an answer", greedy[0].read_exact(&mut greeted)).await.unwrap();
    process.probes_answer().await;
    within("a call", process.client.generate_code(question("q"))).await.unwrap();
}

#[tokio::test]
async fn probes_answer_when_no_descriptor_is_left() {
    let process = Process::start(128).await;
    process.engine.script(Script::tokens(["a", "b"]).hold(1));
    let mut streams = JoinSet::new();
    for _ in 0..150 {
        let mut client = process.client.clone();
        // One descriptor each, at the engine.
        streams.spawn(async move {
            let Ok(reply) = client.stream_generate_code(question("q")).await else { return false };
            let mut frames = reply.into_inner();
            while let Ok(Some(_)) = frames.message().await {}
            true
        });
    }
    within("a call that finds no descriptor", async {
        // It ends, while those that have one are held.
        streams.join_next().await
    })
    .await;
    process.probes_answer().await;
}
