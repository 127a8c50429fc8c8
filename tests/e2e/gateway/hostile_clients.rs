//! Hostile clients without a credential at the mesh port and at the gateway. Streams of other clients stay
//! complete, a valid key is served, and neither process grows beyond its bounds.

use std::net::SocketAddr;
use std::time::Duration;

use futures_util::future::join_all;
use hapa_engine_sim::{Engine, Script};
use hapa_proto::codegen::v1::ListModelsRequest;
use hapa_proto::codegen::v1::codegen_service_client::CodegenServiceClient;
use hapa_test_harness::hostile_client::{FrameKind, HostileClient, headers, literal, prefix};
use hapa_test_harness::{
    CodegenClient, Gateway, Identity, RoleProcess, TOKEN, TestMesh, incident, within,
};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout_at};
use tonic::Code;

use crate::api::generate::{Read, question, stream};

const LIST_MODELS: &str = "/hapa.codegen.v1.CodegenService/ListModels";
const CHECK: &str = "/grpc.health.v1.Health/Check";
const WATCH: &str = "/grpc.health.v1.Health/Watch";
const LOGIN: &str = "/hapa.auth.v1.SessionService/CreateSession";
/// Maximum memory of a mesh process. The smallest memory limit in k8s/ is 512 MiB.
const MAX_MESH_BYTES: u64 = 320 << 20;
/// Maximum memory of the gateway. Its memory limit in k8s/ and compose is 512 MiB.
const MAX_GATEWAY_BYTES: u64 = 448 << 20;
/// Duration of an attack, and its number of clients.
const ATTACK_PERIOD: Duration = Duration::from_secs(3);
const ATTACKERS: u8 = 4;

/// A process with every role, and a gateway in front of it.
struct Target {
    engine: Engine,
    mesh: RoleProcess,
    gateway: Gateway,
    key: String,
}

/// The port that the hostile clients and the others use.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Port {
    Gateway,
    Direct,
}

impl Target {
    async fn open() -> Target {
        let engine = Engine::start();
        let settings = [
            ("MESH_TOKEN", TOKEN.to_owned()),
            ("AI_MODEL_ENDPOINT", engine.url().to_owned()),
            ("CACHE_TTL", "0".to_owned()),
            ("LOG_LEVEL", "warn,hapa_server::server=info".to_owned()),
            // For streams that a test holds, on a machine that is slow.
            ("TOKEN_GAP_TIMEOUT_SECONDS", "300".to_owned()),
            // Hostile clients use addresses from 127.0.0.2 on.
            ("TRUSTED_PROXIES", "127.0.0.1/32".to_owned()),
        ];
        let mesh = RoleProcess::start("all", &settings, &[]).await;
        let port = mesh.mesh().port().to_string();
        let gateway = Gateway::with(&[("PORT", &port)]).await;
        let key = mesh.keys().create_key(TestMesh::dev_key()).await.unwrap().into_inner().key_text;
        Target { engine, mesh, gateway, key }
    }

    fn address(&self, port: Port) -> SocketAddr {
        match port {
            Port::Gateway => self.gateway.url.trim_start_matches("http://").parse().unwrap(),
            Port::Direct => self.mesh.mesh(),
        }
    }

    fn client(&self, port: Port) -> CodegenClient {
        match port {
            Port::Gateway => {
                CodegenServiceClient::new(self.gateway.channel_as(Identity::Key(&self.key)))
            }
            Port::Direct => self.mesh.client(&self.key),
        }
    }

    /// A stream that has reached the engine. An attack that has just ended may leave the gateway overloaded for a
    /// moment: a refusal with UNAVAILABLE is retried, as clients do.
    async fn start(&self, port: Port, client: &CodegenClient, number: usize) -> JoinHandle<Read> {
        let before = self.engine.counts().started;
        loop {
            let mut client = client.clone();
            let mut stream = tokio::spawn(async move {
                stream(&mut client, question(&format!("question {number}"))).await
            });
            let read = tokio::select! {
                _ = self.engine.wait_for_started(before + 1) => return stream,
                read = &mut stream => read.unwrap(),
            };
            let is_refused =
                read.status.as_ref().is_some_and(|status| status.code() == Code::Unavailable);
            assert!(is_refused, "{port:?}: a stream ended before it reached the engine: {read:?}");
        }
    }

    /// Repeats an attack while eight streams and calls with a valid key are in progress. Checks that
    /// these are complete, and that the memory of both processes stays within its bounds.
    async fn withstand<F: Future<Output = std::io::Result<()>>>(
        &self,
        port: Port,
        attack: impl Fn(u8, SocketAddr) -> F,
    ) {
        let texts: Vec<_> =
            (0..8).map(|one| format!("stream {one} says this. ").repeat(20)).collect();
        let mut client = self.client(port);
        let mut streams = Vec::new();
        for (number, text) in texts.iter().enumerate() {
            let script = Script::text(text).gap(Duration::from_millis(10));
            let last = script.token_count() - 1;
            self.engine.once(script.hold(last));
            streams.push(within("a stream to start", self.start(port, &client, number)).await);
        }
        let end = Instant::now() + ATTACK_PERIOD;
        let address = self.address(port);
        let attackers = join_all((0..ATTACKERS).map(|number| {
            let attack = &attack;
            async move {
                while Instant::now() < end {
                    // The outcome for the hostile client is not checked: a refusal, a disconnect or no reply.
                    let _ = timeout_at(end, attack(2 + number % 2, address)).await;
                }
            }
        }));
        let mut largest = (0, 0);
        let others = async {
            let mut answered = 0;
            while Instant::now() < end || answered < 5 {
                let models = within("a good key's call", client.list_models(ListModelsRequest {}));
                models.await.unwrap_or_else(|status| panic!("{port:?}: {status:?}"));
                answered += 1;
                largest.0 = largest.0.max(self.mesh.resident_bytes());
                largest.1 = largest.1.max(self.gateway.resident_bytes());
            }
        };
        tokio::join!(attackers, others);
        for _ in &texts {
            self.engine.release();
        }
        for (text, read) in texts.iter().zip(join_all(streams).await) {
            let read = read.unwrap();
            assert!(read.finished.is_some(), "{port:?}: a stream broke: {read:?}");
            assert!(read.explanation == *text, "{port:?}: a stream lost text: {read:?}");
        }
        let (mesh, gateway) = (largest.0 >> 20, largest.1 >> 20);
        assert!(largest.0 < MAX_MESH_BYTES, "{port:?}: the mesh took {mesh} MiB");
        assert!(largest.1 < MAX_GATEWAY_BYTES, "{port:?}: the gateway took {gateway} MiB");
    }
}

/// Calls that are cancelled in the packet that begins them.
async fn rapid_resets(path: &str, from: u8, to: SocketAddr) -> std::io::Result<()> {
    let mut hostile = HostileClient::connect(from, to).await?;
    for _ in 0..10 {
        for _ in 0..60 {
            let stream = hostile.call(path);
            hostile.reset(stream);
        }
        hostile.flush().await?;
    }
    hostile.read_to_end().await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_cancelled_as_they_begin_end_no_other_call() {
    let target = Target::open().await;
    for port in [Port::Gateway, Port::Direct] {
        for path in [LIST_MODELS, CHECK, "/nothing.Here/AtAll"] {
            target.withstand(port, |from, to| rapid_resets(path, from, to)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_cancelled_after_their_headers_end_no_other_call() {
    let target = Target::open().await;
    for port in [Port::Gateway, Port::Direct] {
        let attack = async |from, to| {
            let mut hostile = HostileClient::connect(from, to).await?;
            for _ in 0..20 {
                let calls: Vec<_> = (0..25).map(|_| hostile.call(WATCH)).collect();
                for call in &calls {
                    hostile.data(*call, &prefix(0), true);
                }
                hostile.flush().await?;
                hostile.read_some().await;
                for call in calls {
                    hostile.reset(call);
                }
                hostile.flush().await?;
            }
            Ok(())
        };
        target.withstand(port, attack).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bodies_in_frames_of_one_byte_end_no_other_call() {
    let target = Target::open().await;
    for port in [Port::Gateway, Port::Direct] {
        for path in [LIST_MODELS, LOGIN] {
            let attack = async |from, to| {
                let mut hostile = HostileClient::connect(from, to).await?;
                let call = hostile.call(path);
                for byte in [&prefix(60_000)[..], &[0; 3_000]].concat() {
                    hostile.data(call, &[byte], false);
                }
                hostile.flush().await?;
                hostile.read_to_end().await;
                Ok(())
            };
            target.withstand(port, attack).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn floods_of_control_frames_end_no_other_call() {
    let target = Target::open().await;
    for port in [Port::Gateway, Port::Direct] {
        let flood: [(FrameKind, u32, &[u8]); 4] = [
            (FrameKind::Ping, 0, &[0; 8]),
            (FrameKind::Settings, 0, &[]),
            (FrameKind::WindowUpdate, 0, &[0, 0, 0, 1]),
            (FrameKind::Continuation, 1, &[0; 64]),
        ];
        for (kind, stream, payload) in flood {
            let attack = async |from, to| {
                let mut hostile = HostileClient::connect(from, to).await?;
                if matches!(kind, FrameKind::Continuation) {
                    // Headers that never end.
                    hostile.frame(FrameKind::Headers, 0, 1, &headers(CHECK, &[]));
                }
                for _ in 0..20 {
                    for _ in 0..1_000 {
                        hostile.frame(kind, 0, stream, payload);
                    }
                    hostile.flush().await?;
                }
                Ok(())
            };
            target.withstand(port, attack).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn headers_that_grow_when_they_are_read_end_no_other_call() {
    let target = Target::open().await;
    for port in [Port::Gateway, Port::Direct] {
        let attack = async |from, to| {
            let mut hostile = HostileClient::connect(from, to).await?;
            // A header of 3,900 bytes, remembered (RFC 7541, 6.2.1), and then named by one byte each: index 62 (6.1).
            let mut block = headers(CHECK, &[]);
            let mut remembered = literal("x-bomb", &"b".repeat(3_900));
            remembered[0] = 0x40;
            block.extend(remembered);
            block.extend(std::iter::repeat_n(0xBE, 4_000));
            for _ in 0..50 {
                let stream = hostile.next_stream();
                hostile.frame(FrameKind::Headers, 4, stream, &block);
                hostile.data(stream, &prefix(0), true);
            }
            hostile.flush().await?;
            hostile.read_to_end().await;
            Ok(())
        };
        target.withstand(port, attack).await;
        let attack = async |from, to| {
            let mut hostile = HostileClient::connect(from, to).await?;
            let stream = hostile.next_stream();
            hostile.frame(FrameKind::Headers, 0, stream, &headers(CHECK, &[]));
            for number in 0..40 {
                let large = literal(&format!("x-large-{number}"), &"l".repeat(8_000));
                hostile.frame(FrameKind::Continuation, 0, stream, &large);
            }
            hostile.flush().await?;
            hostile.read_to_end().await;
            Ok(())
        };
        target.withstand(port, attack).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_bodies_of_hostile_clients_take_no_memory() {
    let target = Target::open().await;
    for port in [Port::Gateway, Port::Direct] {
        for path in [CHECK, LOGIN, LIST_MODELS] {
            let attack = async |from, to| {
                let mut hostile = HostileClient::connect(from, to).await?;
                for _ in 0..48 {
                    let call = hostile.call(path);
                    hostile.data(call, &prefix(4 << 20), false);
                    for _ in 0..4 {
                        hostile.data(call, &[0; 16_000], false);
                    }
                }
                hostile.flush().await?;
                hostile.read_to_end().await;
                Ok(())
            };
            target.withstand(port, attack).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn open_health_watches_take_no_place_of_a_generation() {
    let target = Target::open().await;
    for port in [Port::Gateway, Port::Direct] {
        let attack = async |from, to| {
            let mut hostile = HostileClient::connect(from, to).await?;
            for _ in 0..255 {
                let call = hostile.call(WATCH);
                hostile.data(call, &prefix(0), true);
            }
            hostile.flush().await?;
            // Held open until the attack's time is up.
            hostile.read_to_end().await;
            Ok(())
        };
        target.withstand(port, attack).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn silent_sockets_of_one_address_keep_no_other_address_out() {
    let target = Target::open().await;
    for port in [Port::Gateway, Port::Direct] {
        let mut silent = Vec::new();
        for _ in 0..2_000 {
            let Ok(socket) = HostileClient::silent(2, target.address(port)).await else { break };
            silent.push(socket);
        }
        // A new connection from another address.
        let fresh = match port {
            Port::Gateway => target.gateway.channel_as(Identity::Key(&target.key)),
            Port::Direct => target.mesh.new_channel_as(Identity::Key(&target.key)),
        };
        let models = CodegenServiceClient::new(fresh).list_models(ListModelsRequest {}).await;
        assert!(models.is_ok(), "{port:?}: {models:?}");
        drop(silent);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_socket_that_says_nothing_and_one_that_never_ends_its_headers_are_closed() {
    let target = Target::open().await;
    for port in [Port::Gateway, Port::Direct] {
        let to = target.address(port);
        let mut begun = HostileClient::connect(2, to).await.unwrap();
        begun.frame(FrameKind::Headers, 0, 1, &headers(CHECK, &[])).flush().await.unwrap();
        let silent = HostileClient::silent(2, to).await.unwrap();
        within("a silent socket to be closed", async {
            let mut byte = [0];
            loop {
                silent.readable().await.unwrap();
                match silent.try_read(&mut byte) {
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                    _ => return,
                }
            }
        })
        .await;
        if port == Port::Gateway {
            within("unfinished headers to be given up", begun.read_to_end()).await;
        }
    }
}

#[tokio::test]
async fn a_message_over_its_methods_limit_is_refused() {
    let mesh = TestMesh::start().await;
    let login = async |len: usize| {
        let refused = mesh.log_in("kim@example.com", &"p".repeat(len)).await.unwrap_err();
        incident(&refused).0
    };
    assert_eq!(login(65 * 1024).await, "E4006", "64 KiB without a credential");
    assert_ne!(login(60 * 1024).await, "E4006");
    let generate = async |len: usize| {
        let long = question(&"q".repeat(len));
        incident(&mesh.client().generate_code(long).await.unwrap_err()).0
    };
    assert_eq!(generate(1024 * 1024).await, "E4006", "1 MiB with one");
    assert_eq!(generate(1000 * 1024).await, "E4001", "what fits is read, and found too long");
    mesh.finish().await;
}
