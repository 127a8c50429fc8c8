//! Two replicas and a name that the test decides.

use std::convert::Infallible;
use std::sync::atomic::AtomicU32;

use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::task::{AbortHandle, JoinSet};

use super::*;

/// What a name stands for.
type Names = Arc<Mutex<Vec<SocketAddr>>>;

/// Something that answers, and counts how often.
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

fn balanced(names: &Names) -> Balanced {
    balanced_within(names, Duration::from_secs(5))
}

fn balanced_within(names: &Names, patience: Duration) -> Balanced {
    let host = place("http://replicas:1").unwrap();
    let dial = Dial::new("replicas", false, Secure::No, patience).unwrap();
    let names = Arc::clone(names);
    let resolve = move || {
        let found = names.lock().unwrap().clone();
        Box::pin(async move { Ok(found) }) as Finding
    };
    Balanced::with(host, dial, Box::new(resolve))
}

async fn call(balanced: &Balanced) -> Result<(), Status> {
    let request = Request::builder().uri("/a.B/C").body(Body::empty()).unwrap();
    balanced.clone().send(request).await.map(drop)
}

#[tokio::test]
async fn calls_are_spread_and_follow_the_name() {
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
    assert_eq!((servers[0].calls(), servers[1].calls()), (20, 20), "they take turns");
    *names.lock().unwrap() = vec![servers[1].address, servers[2].address];
    balanced.0.refresh().await.unwrap();
    for _ in 0..40 {
        call(&balanced).await.unwrap();
    }
    assert_eq!([servers[0].calls(), servers[1].calls(), servers[2].calls()], [20, 40, 20]);
    *names.lock().unwrap() = Vec::new();
    balanced.0.refresh().await.unwrap();
    call(&balanced).await.expect("an empty answer of a name server takes nobody away");
}

#[tokio::test]
async fn a_replica_that_dies_costs_no_call_that_it_has_not_seen() {
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
    // One call may have been on its way; what is dialled anew goes to who is there.
    assert!(failed <= 1, "{failed} calls failed");
    assert!(servers[1].calls() - before >= 49);
}

/// It goes away at each call, and says which stream it began last and why it goes.
async fn leaving(listener: TcpListener, seen: Arc<AtomicU32>, last: u8, why: h2::Reason) {
    const SETTINGS: [u8; 9] = [0, 0, 0, 4, 0, 0, 0, 0, 0];
    let [.., why] = u32::from(why).to_be_bytes();
    let goaway = [0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, last, 0, 0, 0, why];
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
            // The headers of a call.
            if head[3] == 1 {
                break;
            }
        }
        seen.fetch_add(1, Ordering::Relaxed);
        stream.write_all(&goaway).await.unwrap();
        stream.shutdown().await.unwrap();
        open.push(stream);
    }
}

#[tokio::test]
async fn a_call_that_a_leaving_replica_has_not_begun_goes_to_another() {
    let mut tasks = JoinSet::new();
    let server = Server::start(&mut tasks).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, seen) = (listener.local_addr().unwrap(), Arc::<AtomicU32>::default());
    // No stream has begun.
    tasks.spawn(leaving(listener, Arc::clone(&seen), 0, h2::Reason::NO_ERROR));
    let names: Names = Arc::new(Mutex::new(vec![address, server.address]));
    let balanced = balanced(&names);
    for _ in 0..10 {
        call(&balanced).await.unwrap();
    }
    assert_eq!(server.calls(), 10);
    assert!(seen.load(Ordering::Relaxed) >= 1, "nobody asked the one that leaves");
}

#[tokio::test]
async fn a_call_that_a_failing_replica_has_begun_is_not_made_again() {
    let mut tasks = JoinSet::new();
    let server = Server::start(&mut tasks).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, seen) = (listener.local_addr().unwrap(), Arc::<AtomicU32>::default());
    tasks.spawn(leaving(listener, Arc::clone(&seen), 1, h2::Reason::INTERNAL_ERROR));
    let names: Names = Arc::new(Mutex::new(vec![address, server.address]));
    let balanced = balanced(&names);
    let mut failed = 0;
    for _ in 0..10 {
        failed += u32::from(call(&balanced).await.is_err());
    }
    let seen = seen.load(Ordering::Relaxed);
    assert!(seen >= 1, "nobody asked the one that fails");
    assert_eq!((failed, server.calls()), (seen, 10 - seen), "each call was seen once");
}

#[tokio::test]
async fn who_listens_and_does_not_serve_yet_gets_no_call() {
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
async fn nobody_there_is_said_with_the_address_and_without_waiting_for_ever() {
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
fn an_address_and_its_certificates_go_together() {
    for wrong in [
        "",
        "auth:50051",
        "ftp://auth",
        "/auth",
        "http://",
        "http://a:1,https://a:2",
        "http://a:1,",
    ] {
        assert!(Balanced::new(wrong, Secure::No, REFRESH).is_err(), "{wrong}");
    }
    assert!(Balanced::new("https://auth:1", Secure::No, REFRESH).is_err());
    assert!(Balanced::new("http://[::1]:1", Secure::No, REFRESH).is_ok());
}
