//! The spool with a receiver that does as it is told.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::Mutex as Lock;
use std::time::Instant;

use futures_util::stream::Empty;
use hapa_proto::analytics::v1::analytics_service_server::{
    AnalyticsService, AnalyticsServiceServer,
};
use hapa_proto::analytics::v1::{
    GetPerformanceRequest, GetPerformanceResponse, GetUsageRequest, GetUsageResponse,
    RecordEventsRequest, RecordEventsResponse, WatchPerformanceRequest, WatchPerformanceResponse,
};
use hapa_transport::peer;
use secrecy::SecretString;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio::time::sleep;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

use super::*;

const POISON: &str = "/poison";
/// Nobody listens there.
const NOBODY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 1);
const LARGE: Bounds = Bounds { most: 1_000_000, oldest: Duration::from_hours(1) };

#[derive(Clone, Default)]
struct Fake {
    ids: Arc<Lock<Vec<String>>>,
    sizes: Arc<Lock<Vec<usize>>>,
}

#[tonic::async_trait]
impl AnalyticsService for Fake {
    type WatchPerformanceStream = Empty<Result<WatchPerformanceResponse, Status>>;

    async fn record_events(
        &self,
        request: Request<RecordEventsRequest>,
    ) -> Result<Response<RecordEventsResponse>, Status> {
        let events = request.into_inner().events;
        if events.iter().any(|event| event.method == POISON) {
            return Err(Status::invalid_argument("poison"));
        }
        self.sizes.lock().unwrap().push(events.len());
        self.ids.lock().unwrap().extend(events.into_iter().map(|event| event.event_id));
        Ok(Response::new(RecordEventsResponse::default()))
    }

    async fn get_performance(
        &self,
        _: Request<GetPerformanceRequest>,
    ) -> Result<Response<GetPerformanceResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn get_usage(
        &self,
        _: Request<GetUsageRequest>,
    ) -> Result<Response<GetUsageResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn watch_performance(
        &self,
        _: Request<WatchPerformanceRequest>,
    ) -> Result<Response<Self::WatchPerformanceStream>, Status> {
        Err(Status::unimplemented(""))
    }
}

impl Fake {
    async fn serve(&self, tasks: &mut JoinSet<()>) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let service = AnalyticsServiceServer::new(self.clone());
        let serving = Server::builder().add_service(service);
        let serving = serving.serve_with_incoming(TcpIncoming::from(listener));
        tasks.spawn(async { serving.await.unwrap() });
        address
    }
}

fn receivers(address: SocketAddr) -> Receivers {
    let (address, token) = (format!("http://{address}"), SecretString::from("a token"));
    let analytics = peer::AnalyticsClient::new(peer::wire(&address, &token).unwrap());
    let errors = peer::ErrorsClient::new(peer::wire(&address, &token).unwrap());
    Receivers {
        analytics: Some(Receiver { client: analytics, own: false }),
        errors: Some(Receiver { client: errors, own: false }),
    }
}

/// A running spool; its tasks end with the set, as a process that is killed does.
async fn open(
    folder: &tempfile::TempDir,
    bounds: Bounds,
    address: SocketAddr,
) -> (Spool, JoinSet<()>) {
    let (spool, mut tasks) = (Spool::default(), JoinSet::new());
    let path = folder.path().join("spool-test.db");
    let work = spool.open(path, bounds, receivers(address)).await.unwrap();
    work.run(|task| drop(tasks.spawn(task)), &CancellationToken::new());
    (spool, tasks)
}

fn usage(number: usize, error_code: &str) -> UsageEvent {
    UsageEvent {
        event_id: number.to_string(),
        method: "/hapa.codegen.v1.CodegenService/GenerateCode".to_owned(),
        error_code: error_code.to_owned(),
        ..UsageEvent::default()
    }
}

fn depths(spool: &Spool) -> [u64; 3] {
    [0, 1, 2].map(|rank| spool.state.depth[rank].load(Ordering::Relaxed))
}

async fn until(what: &str, met: impl Fn() -> bool) {
    let waiting = async {
        while !met() {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(Duration::from_secs(30), waiting).await.unwrap_or_else(|_| panic!("no {what}"));
}

/// The file belongs to nobody once all tasks are gone.
async fn kill(mut tasks: JoinSet<()>) {
    tasks.shutdown().await;
}

#[tokio::test]
async fn what_was_acknowledged_is_there_when_the_file_is_opened_again() {
    let folder = tempfile::tempdir().unwrap();
    let (spool, tasks) = open(&folder, LARGE, NOBODY).await;
    for number in 0..3 {
        spool.append(Some(&usage(number, "")), None).unwrap().await;
    }
    let both = spool.append(Some(&usage(3, "E4001")), Some(&Occurrence::default()));
    both.unwrap().await;
    until("the file", || depths(&spool) == [3, 1, 1]).await;
    assert_eq!(spool.problem(), None);
    kill(tasks).await;
    let fake = Fake::default();
    let mut serving = JoinSet::new();
    let (spool, _tasks) = open(&folder, LARGE, fake.serve(&mut serving).await).await;
    until("delivery", || depths(&spool)[..2] == [0, 0]).await;
    let ids: HashSet<_> = fake.ids.lock().unwrap().iter().cloned().collect();
    assert_eq!(ids, ["0", "1", "2", "3"].map(str::to_owned).into());
    assert_eq!(depths(&spool)[2], 1, "who does not answer holds nobody else back");
}

#[tokio::test]
async fn beyond_its_size_the_least_worth_keeping_goes_first_and_health_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let bounds = Bounds { most: 5, ..LARGE };
    let (spool, _tasks) = open(&folder, bounds, NOBODY).await;
    for number in 0..3 {
        spool.append(None, Some(&Occurrence::default())).unwrap().await;
        spool.append(Some(&usage(number, "E5004")), None).unwrap().await;
        spool.append(Some(&usage(number, "")), None).unwrap().await;
    }
    until("eviction", || depths(&spool) == [0, 2, 3]).await;
    assert!(spool.problem().unwrap().starts_with("E5010"));
}

#[tokio::test]
async fn calls_without_an_owner_leave_half_of_the_queue_to_the_others() {
    let folder = tempfile::tempdir().unwrap();
    let spool = Spool::default();
    // Nothing is written while this work does not run.
    let _work = spool.open(folder.path().join("s.db"), LARGE, receivers(NOBODY)).await.unwrap();
    let append = |owner: &str| {
        let event = UsageEvent { owner: owner.to_owned(), ..usage(1, "E4003") };
        spool.append(Some(&event), None).is_some()
    };
    let strangers = (0..WAITING).filter(|_| append("")).count();
    assert_eq!(strangers, WAITING - RESERVED);
    let owners = (0..WAITING).filter(|_| append("ann")).count();
    assert_eq!(owners, RESERVED);
}

#[tokio::test]
async fn what_is_too_old_goes() {
    let folder = tempfile::tempdir().unwrap();
    let bounds = Bounds { oldest: Duration::from_millis(1), ..LARGE };
    let (spool, _tasks) = open(&folder, bounds, NOBODY).await;
    spool.append(Some(&usage(0, "")), Some(&Occurrence::default())).unwrap().await;
    until("expiry", || depths(&spool) == [0, 0, 0]).await;
    assert_eq!(spool.problem(), Some("E5010: events were dropped within the last minute"));
}

#[tokio::test]
async fn events_arrive_once_in_batches_and_one_that_is_refused_holds_nobody_back() {
    let folder = tempfile::tempdir().unwrap();
    let (spool, tasks) = open(&folder, LARGE, NOBODY).await;
    let (count, poison) = (1_300, 777);
    for number in 0..count {
        let mut event = usage(number, if number % 7 == 0 { "E5004" } else { "" });
        if number == poison {
            POISON.clone_into(&mut event.method);
        }
        let receipt = spool.append(Some(&event), None).unwrap();
        if number % 50 == 0 {
            receipt.await;
        }
        if number % 500 == 0 {
            until("the file", || depths(&spool).iter().sum::<u64>() > number as u64).await;
        }
    }
    until("the file", || depths(&spool).iter().sum::<u64>() == count as u64).await;
    kill(tasks).await;
    let fake = Fake::default();
    let mut serving = JoinSet::new();
    let (spool, _tasks) = open(&folder, LARGE, fake.serve(&mut serving).await).await;
    until("delivery", || depths(&spool) == [0, 0, 0]).await;
    let ids = fake.ids.lock().unwrap();
    let different: HashSet<_> = ids.iter().collect();
    assert_eq!((ids.len(), different.len()), (count - 1, count - 1));
    assert!(!different.contains(&poison.to_string()));
    let sizes = fake.sizes.lock().unwrap();
    assert!(sizes.iter().all(|size| *size <= 500) && sizes.contains(&500), "{sizes:?}");
}

#[tokio::test]
async fn a_file_belongs_to_one_process_and_nothing_is_taken_that_nobody_wants() {
    assert!(Spool::default().append(Some(&usage(0, "")), None).is_none());
    let folder = tempfile::tempdir().unwrap();
    let (_spool, _tasks) = open(&folder, LARGE, NOBODY).await;
    let second = Spool::default();
    let path = folder.path().join("spool-test.db");
    let Err(error) = second.open(path, LARGE, receivers(NOBODY)).await else { panic!("shared") };
    assert!(error.to_string().starts_with("DATA_DIR"), "{error}");
    let third = Spool::default();
    let only = Receivers { errors: None, ..receivers(NOBODY) };
    let _work = third.open(folder.path().join("spool-third.db"), LARGE, only).await.unwrap();
    assert!(third.append(None, Some(&Occurrence::default())).is_none());
}

#[tokio::test]
async fn a_file_that_is_no_database_is_put_aside() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("spool-test.db"), [b'x'; 8_192]).unwrap();
    let (spool, _tasks) = open(&folder, LARGE, NOBODY).await;
    spool.append(Some(&usage(0, "")), None).unwrap().await;
    until("the file", || depths(&spool) == [1, 0, 0]).await;
    assert!(folder.path().join("spool-test.broken").exists());
}

/// Processor time of this process, user and system, in ticks of 10 ms.
fn ticks() -> u64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<_> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement: cargo test --release -p hapa-chassis -- --ignored --nocapture append_costs"]
async fn append_costs() {
    let folder = tempfile::tempdir().unwrap();
    let (spool, _tasks) = open(&folder, LARGE, NOBODY).await;
    for at_once in [1_usize, 50] {
        let (count, before, mut late) = (20_000, ticks(), 0);
        let (mut handing, mut waiting) = (Vec::new(), Vec::new());
        for first in (0..count).step_by(at_once) {
            let begin = Instant::now();
            let events = first..first + at_once;
            let receipts: Vec<_> = events
                .map(|number| {
                    let begin = Instant::now();
                    let receipt = spool.append(Some(&usage(number, "")), None).unwrap();
                    handing.push(begin.elapsed());
                    receipt
                })
                .collect();
            for receipt in receipts {
                late += usize::from(!receipt.await);
            }
            waiting.push(begin.elapsed());
        }
        handing.sort();
        waiting.sort();
        let cpu = (ticks() - before) * 10_000 / count as u64;
        println!(
            "{at_once} at once: handed over in {:?} (median), written after {:?} (median) {:?} (p99), {late} late; {cpu} us of CPU an event in all",
            handing[handing.len() / 2],
            waiting[waiting.len() / 2],
            waiting[waiting.len() * 99 / 100],
        );
    }
}
