//! A process with few file descriptors: its probes answer, and callers get the remaining ones.

use hapa_engine_sim::{Engine, Script};
use hapa_proto::codegen::v1::codegen_service_client::CodegenServiceClient;
use hapa_test_harness::{CodegenClient, Identity, ServerProcess, hapa, within};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::process::Command;
use tokio::task::JoinSet;
use tonic::transport::Endpoint;

use crate::api::generate::question;

/// The preface of HTTP/2 and settings with nothing in them: a connection that stays.
const GREETING: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

struct Process {
    engine: Engine,
    serving: ServerProcess,
    client: CodegenClient,
    _folder: TempDir,
}

impl Process {
    /// With so many descriptors.
    async fn start(descriptors: usize) -> Process {
        let (engine, folder) = (Engine::start(), tempfile::tempdir().unwrap());
        let mut command = Command::new("sh");
        command.args(["-c", &format!("ulimit -n {descriptors}; exec \"$0\" \"$@\"")]);
        command.arg(hapa().as_std().get_program()).args(["all", "--port=0", "--metrics-port=0"]);
        command
            .env_clear()
            .env("DATA_DIR", folder.path())
            .env("MESH_TOKEN", hapa_test_harness::TOKEN);
        command.env("AI_MODEL_ENDPOINT", engine.url()).env("CACHE_TTL", "0");
        let serving = ServerProcess::start(command).await;
        let endpoint = Endpoint::from_shared(format!("http://{}", serving.mesh)).unwrap();
        let client = CodegenServiceClient::new(Identity::Mesh.on(endpoint.connect_lazy()));
        Process { engine, serving, client, _folder: folder }
    }

    async fn probes_answer(&self) {
        for path in ["/livez", "/readyz", "/metrics"].iter().cycle().take(30) {
            assert_eq!(self.serving.page(path).await.0, 200, "{path}");
        }
    }
}

#[tokio::test]
async fn probes_and_calls_answer_though_callers_take_every_connection_they_get() {
    let mut process = Process::start(128).await;
    assert!(process.serving.has_said("MAX_CONNECTIONS does not fit into RLIMIT_NOFILE"));
    within("a call", process.client.generate_code(question("q"))).await.unwrap();
    let mut greedy = Vec::new();
    for _ in 0..200 {
        let mut stream =
            within("a connection", TcpStream::connect(process.serving.mesh)).await.unwrap();
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
