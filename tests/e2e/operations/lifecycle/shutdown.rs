//! Shutdown: a signal ends a process in every state, whatever its clients do.

use std::io;

use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use hapa_engine_sim::{Engine, Script};
use hapa_proto::codegen::v1::StreamGenerateCodeResponse;
use hapa_proto::codegen::v1::codegen_service_client::CodegenServiceClient;
use hapa_test_harness::{Certificates, Identity, RoleProcess, hapa, within};
use http_body_util::StreamBody;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::sleep;
use tokio_rustls::TlsConnector;
use tonic::body::Body;
use tonic::codegen::http::{Request, Uri};
use tonic::transport::{Channel, Endpoint};
use tonic::{Status, Streaming};
use tower::{ServiceExt as _, service_fn};

const POLL_INTERVAL: std::time::Duration = std::time::Duration::from_millis(10);
use crate::api::generate::question;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const STREAM: &str = "/hapa.codegen.v1.CodegenService/StreamGenerateCode";
const UNARY: &str = "/hapa.codegen.v1.CodegenService/GenerateCode";

/// A process with every role on embedded stores, and how to connect to it.
struct All {
    engine: Engine,
    process: RoleProcess,
    tls: Option<TlsConnector>,
    /// Kept on disk, because the process rereads the files.
    _certificates: Option<Certificates>,
}

trait Socket: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Socket for S {}

impl All {
    async fn start(certificates: Option<Certificates>) -> All {
        let engine = Engine::start();
        let mut settings = vec![
            ("MESH_TOKEN", hapa_test_harness::TOKEN.to_owned()),
            ("AI_MODEL_ENDPOINT", engine.url().to_owned()),
            ("CACHE_TTL", "0".to_owned()),
            ("DRAIN_TIMEOUT_SECONDS", "2".to_owned()),
        ];
        settings.extend(certificates.iter().flat_map(|made| made.settings("all")));
        let process = RoleProcess::start("all", &settings, &[]).await;
        let tls = certificates.as_ref().map(|made| made.connector("operator"));
        All { engine, process, tls, _certificates: certificates }
    }

    async fn open(&self) -> Box<dyn Socket> {
        open(self.process.mesh(), self.tls.clone()).await.expect("it listens")
    }

    /// A connection of an authorised client, with small HTTP/2 windows of its streams.
    async fn channel(&self) -> Channel {
        let (address, tls) = (self.process.mesh(), self.tls.clone());
        let connector = service_fn(move |_: Uri| {
            let opened = open(address, tls.clone());
            async move { opened.await.map(TokioIo::new) }
        });
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        let endpoint = Endpoint::from_shared(format!("{scheme}://{address}")).unwrap();
        let endpoint = endpoint.initial_stream_window_size(16 * 1024);
        endpoint.connect_with_connector(connector).await.expect("it listens")
    }

    /// A stream of which only the first frame is read, while the engine has more tokens to send.
    async fn unread(&self) -> Streaming<StreamGenerateCodeResponse> {
        let token = "t".repeat(8 * 1024);
        self.engine.once(Script::tokens(std::iter::repeat_n(token, 4_096)));
        let wire = Identity::Mesh.on(self.channel().await);
        let mut client = CodegenServiceClient::new(wire);
        let asked = within("a stream", client.stream_generate_code(question("q"))).await;
        let mut frames = asked.unwrap().into_inner();
        within("its begin", frames.message()).await.unwrap().expect("it is started");
        self.engine.wait_until(|counts| counts.tokens_sent > 4).await;
        frames
    }

    /// A call with a message that never ends.
    async fn half_sent(&self) -> JoinSet<()> {
        let begin = Bytes::from_static(b"\0\0\0\0\x64half of a question");
        let begin = stream::iter([Ok::<_, Status>(http_body::Frame::data(begin))]);
        let body = Body::new(StreamBody::new(begin.chain(stream::pending())));
        let request = Request::post(UNARY)
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(body)
            .unwrap();
        let wire = Identity::Mesh.on(self.channel().await);
        let mut call = JoinSet::new();
        call.spawn(async move { drop(wire.oneshot(request).await) });
        call
    }

    async fn is_in_flight(&self, rpc: &str) {
        let label = format!("rpc=\"{rpc}\"");
        within("a call to arrive", async {
            while self.process.metrics().await.sum("hapa_requests_in_flight", &[&label]) < 1.0 {
                sleep(POLL_INTERVAL).await;
            }
        })
        .await;
    }
}

async fn open(
    address: std::net::SocketAddr,
    tls: Option<TlsConnector>,
) -> io::Result<Box<dyn Socket>> {
    let stream = TcpStream::connect(address).await?;
    let Some(tls) = tls else { return Ok(Box::new(stream)) };
    let name = address.ip().into();
    Ok(Box::new(tls.connect(name, stream).await?))
}

/// Opens connections and calls in every state, sends SIGTERM, and waits for the end of the process.
async fn ends_by_itself(mut all: All) {
    let silent = TcpStream::connect(all.process.mesh()).await.unwrap();
    let unasked = TcpStream::connect(all.process.metrics_address()).await.unwrap();
    let mut greeted = all.open().await;
    greeted.write_all(PREFACE).await.unwrap();
    greeted.flush().await.unwrap();
    let unread = all.unread().await;
    let half_sent = all.half_sent().await;
    all.is_in_flight(STREAM).await;
    all.is_in_flight(UNARY).await;
    all.process.ask_to_stop().await;
    all.process.has_stopped().await;
    drop((silent, unasked, greeted, unread, half_sent));
}

#[tokio::test]
async fn sigterm_ends_a_process_in_every_state_of_its_clients() {
    ends_by_itself(All::start(None).await).await;
}

#[tokio::test]
async fn sigterm_ends_a_process_with_tls_in_every_state_of_its_clients() {
    ends_by_itself(All::start(Some(Certificates::make().await)).await).await;
}

#[tokio::test]
async fn a_second_signal_of_either_kind_ends_a_drain_at_once_and_is_no_success() {
    for by_terminal in [false, true] {
        let mut all = All::start(None).await;
        let frames = all.unread().await;
        all.process.ask_to_stop().await;
        within("the drain to begin", async {
            while all.process.page("/readyz").await != "draining\n" {
                sleep(POLL_INTERVAL).await;
            }
        })
        .await;
        if by_terminal {
            all.process.interrupt().await;
        } else {
            all.process.ask_to_stop().await;
        }
        assert_eq!(all.process.ended().await.code(), Some(1));
        drop(frames);
    }
}

#[tokio::test]
async fn a_signal_ends_a_process_that_still_waits_for_its_store() {
    let store = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("postgres://user@{}/hapa", store.local_addr().unwrap());
    let mut command = hapa();
    command.args(["auth", "--port=0", "--metrics-port=0"]).env("DATABASE_URL", url);
    let folder = tempfile::tempdir().unwrap();
    command.env("MESH_TOKEN", hapa_test_harness::TOKEN).env("DATA_DIR", folder.path());
    command.stderr(std::process::Stdio::null());
    let mut process = command.spawn().unwrap();
    let asked = within("a question to the store", store.accept()).await.unwrap();
    hapa_test_harness::signal(&process, "-TERM").await;
    let status = within("the process to end", process.wait()).await.unwrap();
    assert_eq!(status.code(), Some(0));
    drop(asked);
}
