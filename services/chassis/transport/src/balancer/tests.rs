//! Tests of the balancer with local servers and a fake name resolution.

use std::convert::Infallible;
use std::sync::atomic::AtomicU32;

use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::task::{AbortHandle, JoinSet};

use super::*;

/// The addresses of the host name.
type Names = Arc<Mutex<Vec<SocketAddr>>>;

/// A server that counts its calls.
struct Server {
    address: SocketAddr,
    calls: Arc<AtomicU32>,
    accepting: AbortHandle,
}

impl Server {
    async fn start(tasks: &mut JoinSet<()>) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, calls) = (listener.local_addr().unwrap(), Arc::<AtomicU32>::default());
        let counted = Arc::clone(&calls);
        let accepting = tasks.spawn(async move {
            let mut open = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let counted = Arc::clone(&counted);
                let service = tower::service_fn(move |_: Request<Incoming>| {
                    counted.fetch_add(1, Ordering::Relaxed);
                    async { Ok::<_, Infallible>(Response::new(Body::empty())) }
                });
                let builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                let service = TowerToHyperService::new(service);
                open.spawn(builder.serve_connection(TokioIo::new(stream), service));
            }
        });
        Server { address, calls, accepting }
    }

    fn calls(&self) -> u32 {
        self.calls.load(Ordering::Relaxed)
    }
}

fn balanced(names: &Names) -> BalancedChannel {
    balanced_within(names, Duration::from_secs(5))
}

fn balanced_within(names: &Names, connect_timeout: Duration) -> BalancedChannel {
    let host = parse_address("http://replicas:1").unwrap();
    let connector =
        Connector::new("replicas", false, TransportSecurity::Plaintext, connect_timeout).unwrap();
    let names = Arc::clone(names);
    let resolve = move || {
        let addresses = names.lock().unwrap().clone();
        Box::pin(async move { Ok(addresses) }) as Resolution
    };
    BalancedChannel::from_parts(host, connector, Box::new(resolve))
}

async fn call(balanced: &BalancedChannel) -> Result<(), Status> {
    let request = Request::builder().uri("/a.B/C").body(Body::empty()).unwrap();
    balanced.clone().send(request).await.map(drop)
}

#[tokio::test]
async fn calls_are_spread_over_the_current_addresses_of_the_name() {
    let mut tasks = JoinSet::new();
    let servers = [
        Server::start(&mut tasks).await,
        Server::start(&mut tasks).await,
        Server::start(&mut tasks).await,
    ];
    let names: Names = Arc::new(Mutex::new(vec![servers[0].address, servers[1].address]));
    let balanced = balanced(&names);
    for _ in 0..40 {
        call(&balanced).await.unwrap();
    }
    assert_eq!(
        (servers[0].calls(), servers[1].calls()),
        (20, 20),
        "equally busy replicas take turns"
    );
    *names.lock().unwrap() = vec![servers[1].address, servers[2].address];
    balanced.0.refresh().await.unwrap();
    for _ in 0..40 {
        call(&balanced).await.unwrap();
    }
    assert_eq!([servers[0].calls(), servers[1].calls(), servers[2].calls()], [20, 40, 20]);
    *names.lock().unwrap() = Vec::new();
    balanced.0.refresh().await.unwrap();
    call(&balanced).await.expect("an empty reply of a name server removes no replica");
}

#[tokio::test]
async fn a_replica_that_dies_fails_no_call_that_it_has_not_received() {
    let mut tasks = JoinSet::new();
    let servers = [Server::start(&mut tasks).await, Server::start(&mut tasks).await];
    let names: Names = Arc::new(Mutex::new(servers.iter().map(|one| one.address).collect()));
    let balanced = balanced(&names);
    for _ in 0..10 {
        call(&balanced).await.unwrap();
    }
    servers[0].accepting.abort();
    while !servers[0].accepting.is_finished() {
        tokio::task::yield_now().await;
    }
    let (mut failed, before) = (0, servers[1].calls());
    for _ in 0..50 {
        failed += u32::from(call(&balanced).await.is_err());
    }
    // One call may have been in flight; later calls go to the other replica.
    assert!(failed <= 1, "{failed} calls failed");
    assert!(servers[1].calls() - before >= 49);
}

/// A server that replies to each call with a GOAWAY with this last stream id and reason.
async fn goaway_server(
    listener: TcpListener,
    received: Arc<AtomicU32>,
    last_stream: u8,
    reason: h2::Reason,
) {
    const SETTINGS: [u8; 9] = [0, 0, 0, 4, 0, 0, 0, 0, 0];
    let [.., reason] = u32::from(reason).to_be_bytes();
    let goaway = [0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, last_stream, 0, 0, 0, reason];
    let mut open = Vec::new();
    loop {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(&SETTINGS).await.unwrap();
        stream.read_exact(&mut [0; 24]).await.unwrap();
        loop {
            let mut head = [0; 9];
            stream.read_exact(&mut head).await.unwrap();
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
            stream.read_exact(&mut vec![0; length as usize]).await.unwrap();
            // A HEADERS frame.
            if head[3] == 1 {
                break;
            }
        }
        received.fetch_add(1, Ordering::Relaxed);
        stream.write_all(&goaway).await.unwrap();
        stream.shutdown().await.unwrap();
        open.push(stream);
    }
}

#[tokio::test]
async fn a_call_that_a_leaving_replica_has_not_processed_goes_to_another() {
    let mut tasks = JoinSet::new();
    let server = Server::start(&mut tasks).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, received) = (listener.local_addr().unwrap(), Arc::<AtomicU32>::default());
    // Stream 0: no stream was processed.
    tasks.spawn(goaway_server(listener, Arc::clone(&received), 0, h2::Reason::NO_ERROR));
    let names: Names = Arc::new(Mutex::new(vec![address, server.address]));
    let balanced = balanced(&names);
    for _ in 0..10 {
        call(&balanced).await.unwrap();
    }
    assert_eq!(server.calls(), 10);
    assert!(received.load(Ordering::Relaxed) >= 1, "no call went to the leaving replica");
}

#[tokio::test]
async fn a_call_that_a_failing_replica_has_started_is_not_retried() {
    let mut tasks = JoinSet::new();
    let server = Server::start(&mut tasks).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, received) = (listener.local_addr().unwrap(), Arc::<AtomicU32>::default());
    tasks.spawn(goaway_server(listener, Arc::clone(&received), 1, h2::Reason::INTERNAL_ERROR));
    let names: Names = Arc::new(Mutex::new(vec![address, server.address]));
    let balanced = balanced(&names);
    let mut failed = 0;
    for _ in 0..10 {
        failed += u32::from(call(&balanced).await.is_err());
    }
    let received = received.load(Ordering::Relaxed);
    assert!(received >= 1, "no call went to the failing replica");
    assert_eq!((failed, server.calls()), (received, 10 - received), "each call was sent once");
}

#[tokio::test]
async fn a_socket_that_listens_without_serving_gets_no_call() {
    let mut tasks = JoinSet::new();
    let server = Server::start(&mut tasks).await;
    let starting = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = starting.local_addr().unwrap();
    let names: Names = Arc::new(Mutex::new(vec![address, server.address]));
    let balanced = balanced_within(&names, Duration::from_millis(50));
    for _ in 0..10 {
        call(&balanced).await.unwrap();
    }
    assert_eq!(server.calls(), 10);
}

#[tokio::test]
async fn an_unreachable_name_fails_promptly_with_its_address() {
    let names: Names = Arc::default();
    let status = call(&balanced(&names)).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::Unavailable);
    assert!(status.message().contains("replicas:1 has no address"), "{}", status.message());
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    names.lock().unwrap().push(closed);
    let status = call(&balanced(&names)).await.unwrap_err();
    assert!(status.message().contains(&closed.to_string()), "{}", status.message());
}

#[test]
fn the_scheme_of_an_address_must_match_its_certificates() {
    for invalid in [
        "",
        "auth:50051",
        "ftp://auth",
        "/auth",
        "http://",
        "http://a:1,https://a:2",
        "http://a:1,",
    ] {
        assert!(
            BalancedChannel::new(invalid, TransportSecurity::Plaintext, REFRESH_INTERVAL).is_err(),
            "{invalid}"
        );
    }
    assert!(
        BalancedChannel::new("https://auth:1", TransportSecurity::Plaintext, REFRESH_INTERVAL)
            .is_err()
    );
    assert!(
        BalancedChannel::new("http://[::1]:1", TransportSecurity::Plaintext, REFRESH_INTERVAL)
            .is_ok()
    );
}
