//! The outbox with a receiver that the tests control.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::Mutex as Lock;
use std::time::{Duration, Instant};

use futures_util::FutureExt as _;
use futures_util::stream::Empty;
use hapa_proto::analytics::v1::analytics_service_server::{
    AnalyticsService, AnalyticsServiceServer,
};
use hapa_proto::analytics::v1::{
    GetPerformanceRequest, GetPerformanceResponse, GetUsageRequest, GetUsageResponse,
    RecordEventsRequest, RecordEventsResponse, WatchPerformanceRequest, WatchPerformanceResponse,
};
use hapa_transport::peer;
use prost::Message as _;
use secrecy::SecretString;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

use super::append_queue::{OWNER_QUEUE_BYTES, OWNER_QUEUE_CAPACITY, QUEUE_BYTES, QUEUE_CAPACITY};
use super::state::DropReason;
use super::store::tests::write_sqlite_file;
use super::*;

const POISON: &str = "/poison";
/// An address without a listener.
const CLOSED_ADDRESS: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 1);
const LIMITS: OutboxLimits =
    OutboxLimits { max_events: 1_000_000, max_age: Duration::from_hours(1) };

#[derive(Clone, Default)]
struct FakeAnalytics {
    ids: Arc<Lock<Vec<String>>>,
    sizes: Arc<Lock<Vec<usize>>>,
}

#[tonic::async_trait]
impl AnalyticsService for FakeAnalytics {
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

impl FakeAnalytics {
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
    let analytics = peer::AnalyticsClient::new(peer::token_channel(&address, &token).unwrap());
    let errors = peer::ErrorsClient::new(peer::token_channel(&address, &token).unwrap());
    Receivers {
        analytics: Some(Receiver { client: analytics, is_own_process: false }),
        errors: Some(Receiver { client: errors, is_own_process: false }),
    }
}

/// A running outbox. Its tasks are aborted with the set, as by a killed process.
async fn open(
    folder: &tempfile::TempDir,
    limits: OutboxLimits,
    address: SocketAddr,
) -> (Outbox, JoinSet<()>) {
    let (outbox, mut tasks) = (Outbox::default(), JoinSet::new());
    let path = folder.path().join("outbox-test");
    let outbox_tasks = outbox.open(path, limits, receivers(address)).await.unwrap();
    outbox_tasks.run(|task| drop(tasks.spawn(task)), &CancellationToken::new());
    (outbox, tasks)
}

fn usage(number: usize, error_code: &str) -> UsageEvent {
    UsageEvent {
        event_id: number.to_string(),
        method: "/hapa.codegen.v1.CodegenService/GenerateCode".to_owned(),
        error_code: error_code.to_owned(),
        ..UsageEvent::default()
    }
}

fn depths(outbox: &Outbox) -> [u64; 3] {
    [0, 1, 2].map(|priority| outbox.state.depth[priority].load(Ordering::Relaxed))
}

async fn until(what: &str, met: impl Fn() -> bool) {
    let waiting = async {
        while !met() {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(Duration::from_secs(30), waiting).await.unwrap_or_else(|_| panic!("no {what}"));
}

/// Ends all tasks, so that the file is unlocked.
async fn kill(mut tasks: JoinSet<()>) {
    tasks.shutdown().await;
}

#[tokio::test]
async fn acknowledged_events_are_there_when_the_outbox_is_opened_again() {
    let folder = tempfile::tempdir().unwrap();
    let (outbox, tasks) = open(&folder, LIMITS, CLOSED_ADDRESS).await;
    for number in 0..3 {
        outbox.append(Some(&usage(number, "")), None).unwrap().await;
    }
    let both = outbox.append(Some(&usage(3, "E4001")), Some(&Occurrence::default()));
    both.unwrap().await;
    until("the file", || depths(&outbox) == [3, 1, 1]).await;
    assert_eq!(outbox.problem(), None);
    kill(tasks).await;
    let fake = FakeAnalytics::default();
    let mut serving = JoinSet::new();
    let (outbox, _tasks) = open(&folder, LIMITS, fake.serve(&mut serving).await).await;
    until("delivery", || depths(&outbox)[..2] == [0, 0]).await;
    let ids: HashSet<_> = fake.ids.lock().unwrap().iter().cloned().collect();
    assert_eq!(ids, ["0", "1", "2", "3"].map(str::to_owned).into());
    assert_eq!(depths(&outbox)[2], 1, "a failing receiver does not block the other kind");
}

#[tokio::test]
async fn beyond_the_maximum_the_lowest_priority_is_evicted_first_and_health_reports_it() {
    let folder = tempfile::tempdir().unwrap();
    let limits = OutboxLimits { max_events: 5, ..LIMITS };
    let (outbox, _tasks) = open(&folder, limits, CLOSED_ADDRESS).await;
    for number in 0..3 {
        outbox.append(None, Some(&Occurrence::default())).unwrap().await;
        outbox.append(Some(&usage(number, "E5004")), None).unwrap().await;
        outbox.append(Some(&usage(number, "")), None).unwrap().await;
    }
    until("eviction", || depths(&outbox) == [0, 2, 3]).await;
    assert!(outbox.problem().unwrap().starts_with("E5010"));
}

#[tokio::test]
async fn calls_without_an_owner_leave_half_of_the_queue_to_the_others() {
    let folder = tempfile::tempdir().unwrap();
    let outbox = Outbox::default();
    // Nothing is written while the tasks do not run.
    let _tasks =
        outbox.open(folder.path().join("o"), LIMITS, receivers(CLOSED_ADDRESS)).await.unwrap();
    let append = |owner: &str| {
        let event = UsageEvent { owner: owner.to_owned(), ..usage(1, "E4003") };
        outbox.append(Some(&event), None).is_some()
    };
    let without_owner = (0..QUEUE_CAPACITY).filter(|_| append("")).count();
    assert_eq!(without_owner, QUEUE_CAPACITY - OWNER_QUEUE_CAPACITY);
    let with_owner = (0..QUEUE_CAPACITY).filter(|_| append("ann")).count();
    assert_eq!(with_owner, OWNER_QUEUE_CAPACITY);
}

#[tokio::test]
async fn events_beyond_the_maximum_age_are_dropped() {
    let folder = tempfile::tempdir().unwrap();
    let limits = OutboxLimits { max_age: Duration::from_millis(1), ..LIMITS };
    let (outbox, _tasks) = open(&folder, limits, CLOSED_ADDRESS).await;
    outbox.append(Some(&usage(0, "")), Some(&Occurrence::default())).unwrap().await;
    until("expiry", || depths(&outbox) == [0, 0, 0]).await;
    assert_eq!(outbox.problem(), Some("E5010: events were dropped within the last minute"));
}

#[tokio::test]
async fn events_arrive_once_in_batches_and_a_refused_one_does_not_block_the_others() {
    let folder = tempfile::tempdir().unwrap();
    let (outbox, tasks) = open(&folder, LIMITS, CLOSED_ADDRESS).await;
    let (count, poison) = (1_300, 777);
    for number in 0..count {
        let mut event = usage(number, if number % 7 == 0 { "E5004" } else { "" });
        if number == poison {
            POISON.clone_into(&mut event.method);
        }
        let ack = outbox.append(Some(&event), None).unwrap();
        if number % 50 == 0 {
            ack.await;
        }
        if number % 500 == 0 {
            until("the file", || depths(&outbox).iter().sum::<u64>() > number as u64).await;
        }
    }
    until("the file", || depths(&outbox).iter().sum::<u64>() == count as u64).await;
    kill(tasks).await;
    let fake = FakeAnalytics::default();
    let mut serving = JoinSet::new();
    let (outbox, _tasks) = open(&folder, LIMITS, fake.serve(&mut serving).await).await;
    until("delivery", || depths(&outbox) == [0, 0, 0]).await;
    let ids = fake.ids.lock().unwrap();
    let different: HashSet<_> = ids.iter().collect();
    assert_eq!((ids.len(), different.len()), (count - 1, count - 1));
    assert!(!different.contains(&poison.to_string()));
    let sizes = fake.sizes.lock().unwrap();
    assert!(sizes.iter().all(|size| *size <= 500) && sizes.contains(&500), "{sizes:?}");
}

#[tokio::test]
async fn an_outbox_belongs_to_one_process_and_events_without_a_receiver_are_not_stored() {
    assert!(Outbox::default().append(Some(&usage(0, "")), None).is_none());
    let folder = tempfile::tempdir().unwrap();
    let (_outbox, _tasks) = open(&folder, LIMITS, CLOSED_ADDRESS).await;
    let second = Outbox::default();
    let path = folder.path().join("outbox-test");
    let Err(error) = second.open(path, LIMITS, receivers(CLOSED_ADDRESS)).await else {
        panic!("shared")
    };
    assert!(error.to_string().starts_with("DATA_DIR"), "{error}");
    let third = Outbox::default();
    let only = Receivers { errors: None, ..receivers(CLOSED_ADDRESS) };
    let _third_tasks = third.open(folder.path().join("outbox-third"), LIMITS, only).await.unwrap();
    assert!(third.append(None, Some(&Occurrence::default())).is_none());
}

#[tokio::test]
async fn calls_without_an_owner_leave_half_of_the_bytes_to_the_others() {
    let queue = AppendQueue::default();
    let push = |owner: &str| {
        let task = "x".repeat(64 * 1024);
        let event = UsageEvent { owner: owner.to_owned(), task, ..usage(1, "") };
        queue.push(CallEvents { usage: Some(&event), occurrences: &[] }, None)
    };
    let without_owner = (0..QUEUE_CAPACITY).take_while(|_| push("").is_ok()).count();
    let with_owner = (0..QUEUE_CAPACITY).take_while(|_| push("ann").is_ok()).count();
    let fits = |bytes: usize| bytes / (64 * 1024) - 1;
    assert_eq!(without_owner, fits(QUEUE_BYTES - OWNER_QUEUE_BYTES));
    assert_eq!(without_owner + with_owner, fits(QUEUE_BYTES));
    assert_eq!(push("ann"), Err(DropReason::QueueFull));
    queue.close();
    assert_eq!(push("ann"), Err(DropReason::Closed));
}

#[tokio::test(start_paused = true)]
async fn a_call_waits_at_most_50_ms_for_a_disk_that_hangs() {
    let queue = AppendQueue::default();
    let push = || {
        let (written, ack) = oneshot::channel();
        let event = usage(0, "");
        queue.push(CallEvents { usage: Some(&event), occurrences: &[] }, Some(written)).unwrap();
        async move { (ack.await.is_ok(), tokio::time::Instant::now()) }
    };
    let begin = tokio::time::Instant::now();
    let calls = async {
        let first = push();
        // The writer takes the first call, and the disk hangs from then on.
        assert!(queue.wait(&mut append_queue::Work::default(), begin));
        sleep(Duration::from_millis(20)).await;
        tokio::join!(first, push())
    };
    let ((is_first, first), (is_second, second)) = tokio::select! {
        ended = calls => ended,
        () = queue.expire_acks() => unreachable!(),
    };
    assert!(!is_first && !is_second);
    let waits = [first - begin, second - begin].map(|wait| wait.as_millis());
    assert!((50..=51).contains(&waits[0]) && (70..=71).contains(&waits[1]), "{waits:?}");
}

#[tokio::test]
async fn an_acknowledgement_follows_the_write() {
    let folder = tempfile::tempdir().unwrap();
    let (outbox, path) = (Outbox::default(), folder.path().join("outbox-test"));
    let opened = outbox.open(path.clone(), LIMITS, receivers(CLOSED_ADDRESS)).await.unwrap();
    let mut ack = outbox.append(Some(&usage(0, "")), Some(&Occurrence::default())).unwrap();
    // Nothing is written while the tasks do not run.
    assert_eq!((&mut ack).now_or_never(), None);
    assert_eq!(count_events(&path).await.unwrap(), 0);
    let mut tasks = JoinSet::new();
    opened.run(|task| drop(tasks.spawn(task)), &CancellationToken::new());
    if ack.await {
        assert_eq!(count_events(&path).await.unwrap(), 2);
    }
    until("the files", || depths(&outbox) == [1, 0, 1]).await;
    assert_eq!(count_events(&path).await.unwrap(), 2);
}

#[tokio::test]
async fn a_failed_write_is_not_acknowledged_and_health_reports_it_until_writes_succeed() {
    let folder = tempfile::tempdir().unwrap();
    let (outbox, _tasks) = open(&folder, LIMITS, CLOSED_ADDRESS).await;
    let path = folder.path().join("outbox-test");
    std::fs::remove_dir_all(&path).unwrap();
    assert!(!outbox.append(Some(&usage(0, "")), None).unwrap().await);
    let unwritable = Some("E5010: the outbox can't be written, and new events are dropped");
    until("a report", || outbox.problem() == unwritable).await;
    assert_eq!(depths(&outbox), [0, 0, 0]);
    std::fs::create_dir(&path).unwrap();
    until("recovery", || outbox.problem().is_none()).await;
    outbox.append(Some(&usage(1, "")), None).unwrap().await;
    until("the files", || depths(&outbox) == [1, 0, 0]).await;
    assert_eq!(count_events(&path).await.unwrap(), 1);
}

#[tokio::test]
async fn the_events_of_an_earlier_version_are_moved_once_and_its_file_is_removed() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("spool-test.db");
    let owned = UsageEvent { owner: "ann".to_owned(), ..usage(0, "") };
    let failed = [1, 2].map(|number| (1, usage(number, "E4001").encode_to_vec()));
    let [first, second] = failed;
    let rows = [(0, owned.encode_to_vec()), first, second, (2, Vec::new())];
    write_sqlite_file(&file, state::now_ms(), rows).await;
    assert!(is_outbox_file(&file));
    assert_eq!(count_events(&file).await.unwrap(), 4);
    assert_eq!(find_with_user_events(folder.path()).await.as_ref(), Some(&file));
    let fake = FakeAnalytics::default();
    let mut serving = JoinSet::new();
    let address = fake.serve(&mut serving).await;
    let (outbox, tasks) = open(&folder, LIMITS, address).await;
    until("delivery", || depths(&outbox) == [0, 0, 1]).await;
    assert_eq!(*fake.ids.lock().unwrap(), ["1", "2", "0"]);
    kill(tasks).await;
    let (outbox, _tasks) = open(&folder, LIMITS, address).await;
    assert_eq!(depths(&outbox), [0, 0, 1]);
    let names = std::fs::read_dir(folder.path()).unwrap();
    let names: Vec<_> = names.map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["outbox-test"]);
}

#[tokio::test]
async fn a_file_of_an_earlier_version_that_is_not_a_database_is_renamed() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("spool-test.db"), [b'x'; 8_192]).unwrap();
    let (outbox, _tasks) = open(&folder, LIMITS, CLOSED_ADDRESS).await;
    outbox.append(Some(&usage(0, "")), None).unwrap().await;
    until("the files", || depths(&outbox) == [1, 0, 0]).await;
    assert!(folder.path().join("spool-test.broken").exists());
}

#[tokio::test]
async fn only_an_outbox_with_an_event_of_a_user_is_a_sign_of_a_lost_store() {
    let folder = tempfile::tempdir().unwrap();
    let (outbox, _tasks) = open(&folder, LIMITS, CLOSED_ADDRESS).await;
    std::fs::write(folder.path().join("outbox-notes.txt"), "no outbox").unwrap();
    outbox.append(Some(&usage(0, "")), Some(&Occurrence::default())).unwrap().await;
    until("the files", || depths(&outbox) == [1, 0, 1]).await;
    assert_eq!(find_with_user_events(folder.path()).await, None);
    let owned = UsageEvent { owner: "ann".to_owned(), ..usage(1, "") };
    outbox.append(Some(&owned), None).unwrap().await;
    until("the files", || depths(&outbox) == [2, 0, 1]).await;
    let found = find_with_user_events(folder.path()).await;
    assert_eq!(found, Some(folder.path().join("outbox-test")));
}

/// Processor time of this process, user and system, in ticks of 10 ms.
fn ticks() -> u64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<_> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement: cargo test --release -p hapa-server -- --ignored --nocapture append_costs"]
async fn append_costs() {
    let folder = tempfile::tempdir().unwrap();
    let (outbox, _tasks) = open(&folder, LIMITS, CLOSED_ADDRESS).await;
    for at_once in [1_usize, 50] {
        let (count, before, mut late) = (20_000, ticks(), 0);
        let (mut handing, mut waiting) = (Vec::new(), Vec::new());
        for first in (0..count).step_by(at_once) {
            let begin = Instant::now();
            let events = first..first + at_once;
            let acks: Vec<_> = events
                .map(|number| {
                    let begin = Instant::now();
                    let ack = outbox.append(Some(&usage(number, "")), None).unwrap();
                    handing.push(begin.elapsed());
                    ack
                })
                .collect();
            for ack in acks {
                late += usize::from(!ack.await);
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
