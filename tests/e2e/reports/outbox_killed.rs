//! Both ends of a delivery are killed repeatedly, and every acknowledged event is stored once.
//!
//! The sender is the outbox itself, and the receiver is a small server over a SQLite file. Each runs in a
//! process of its own: this test's binary, started again for one of the ignored tests below.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant, SystemTime};

use hapa_engine_sim::Engine;
use hapa_proto::analytics::v1::UsageEvent;
use hapa_proto::codegen::v1::codegen_service_client::CodegenServiceClient;
use hapa_server::outbox::{Outbox, OutboxLimits, Receiver, Receivers};
use hapa_test_harness::{AckingSink, hapa, within};
use hapa_transport::peer;
use secrecy::SecretString;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpListener;
use tokio::process::{Child, Command};
use tokio::task::JoinSet;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::api::generate::question;

const KILLS: usize = 200;
const EVENTS: usize = 10_000;
/// Maximum number of events of one sender process. On average, all processes together send all events.
const OF_A_LIFE: u64 = 100;

/// Environment variables of the shared folder and of the receiver's port.
const FOLDER: &str = "HAPA_TEST_FOLDER";
const PORT: &str = "HAPA_TEST_PORT";

fn setting(name: &str) -> String {
    std::env::var(name).expect("it is started by the test below")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a process of the test below"]
async fn sender() {
    let (spool, mut tasks) = (Outbox::default(), JoinSet::new());
    let address = format!("http://127.0.0.1:{}", setting(PORT));
    let client = peer::AnalyticsClient::new(
        peer::token_channel(&address, &SecretString::from("any")).unwrap(),
    );
    let receivers =
        Receivers { analytics: Some(Receiver { client, is_own_process: false }), errors: None };
    let bounds = OutboxLimits { max_events: 1_000_000, max_age: Duration::from_hours(1) };
    let path = PathBuf::from(setting(FOLDER)).join("outbox-sender");
    let work = spool.open(path, bounds, receivers).await.unwrap();
    work.run(|task| drop(tasks.spawn(task)), &CancellationToken::new());
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    let mut calls = JoinSet::new();
    while let Some(event_id) = lines.next_line().await.unwrap() {
        let event = UsageEvent { event_id, method: "/a/b".to_owned(), ..UsageEvent::default() };
        let receipt = spool.append(Some(&event), None).expect("there is room");
        calls.spawn(async move {
            let what = if receipt.await { "stored" } else { "late" };
            println!("{what} {}", event.event_id);
        });
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a process of the test below"]
async fn receiver() {
    let keeper = AckingSink::open(&Path::new(&setting(FOLDER)).join("kept.db")).await;
    let address = format!("127.0.0.1:{}", setting(PORT));
    let listener = loop {
        match TcpListener::bind(&address).await {
            Ok(listener) => break listener,
            Err(_) => sleep(Duration::from_millis(1)).await,
        }
    };
    println!("ready");
    keeper.serve(listener).await;
}

fn start(name: &str, folder: &Path, port: u16) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([
        "--exact",
        &format!("reports::outbox_killed::{name}"),
        "--ignored",
        "--nocapture",
    ]);
    command.env(FOLDER, folder).env(PORT, port.to_string()).kill_on_drop(true);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    command.spawn().unwrap()
}

/// A random number generator (xorshift). Its quality does not matter, only that runs differ.
struct Dice(u64);

impl Dice {
    fn new() -> Dice {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
        Dice(u64::from(now.subsec_nanos()) << 20 | 1)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

/// Runs one sender process. It is killed at a random time after `until` events are acknowledged,
/// while others are in progress.
async fn live(
    (folder, port): (&Path, u16),
    (sent, acknowledged): (&mut usize, &mut HashSet<String>),
    (until, dice): (usize, &mut Dice),
) {
    let mut child = start("sender", folder, port);
    let mut stdin = child.stdin.take().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let (mut seen, mut handed) = (0, 0);
    while seen < until {
        while handed < seen + 16 {
            stdin.write_all(format!("event-{sent}\n").as_bytes()).await.unwrap();
            (*sent, handed) = (*sent + 1, handed + 1);
        }
        let line = within("an acknowledgement", lines.next_line()).await.unwrap().unwrap();
        if let Some((_, event_id)) = line.split_once("stored ") {
            acknowledged.insert(event_id.to_owned());
            seen += 1;
        } else if line.contains("late ") {
            handed -= 1;
        }
    }
    sleep(Duration::from_micros(dice.below(2_000))).await;
    child.kill().await.unwrap();
    // Acknowledgements printed before the kill count too.
    while let Ok(Some(line)) = lines.next_line().await {
        if let Some((_, event_id)) = line.split_once("stored ") {
            acknowledged.insert(event_id.to_owned());
        }
    }
}

async fn kill_receivers(folder: PathBuf, port: u16) -> Child {
    let mut dice = Dice::new();
    for _ in 0..KILLS {
        let mut child = start("receiver", &folder, port);
        let mut lines = BufReader::new(child.stdout.as_mut().unwrap()).lines();
        let ready = async {
            while let Some(line) = lines.next_line().await.unwrap() {
                if line.ends_with("ready") {
                    return;
                }
            }
        };
        within("the receiver", ready).await;
        sleep(Duration::from_micros(dice.below(120_000))).await;
        child.kill().await.unwrap();
    }
    start("receiver", &folder, port)
}

#[tokio::test]
async fn ten_thousand_events_and_200_kills_of_both_ends_lose_nothing_and_store_nothing_twice() {
    let (begin, folder) = (Instant::now(), tempfile::tempdir().unwrap());
    let port = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
    let receiving = tokio::spawn(kill_receivers(folder.path().to_owned(), port));
    let (mut sent, mut acknowledged, mut dice) = (0, HashSet::new(), Dice::new());
    let place = (folder.path(), port);
    for _ in 0..KILLS {
        let until = usize::try_from(dice.below(OF_A_LIFE)).unwrap();
        live(place, (&mut sent, &mut acknowledged), (until, &mut dice)).await;
    }
    let killed = acknowledged.len();
    let rest = EVENTS.saturating_sub(killed);
    live(place, (&mut sent, &mut acknowledged), (rest, &mut dice)).await;
    let _receiver = within("the last receiver", receiving).await.unwrap();
    // A last sender has nothing new, and delivers what the others left.
    let _sender = start("sender", folder.path(), port);
    let keeper = AckingSink::open(&folder.path().join("kept.db")).await;
    let kept = within("everything to arrive", async {
        loop {
            let kept = keeper.ids().await;
            if kept.is_superset(&acknowledged) {
                return kept;
            }
            sleep(Duration::from_millis(100)).await;
        }
    });
    let kept = kept.await;
    let (events, arrivals) = keeper.counts().await;
    assert_eq!(events, kept.len());
    assert!(acknowledged.len() >= EVENTS && events <= sent);
    println!(
        "{sent} events sent, {} acknowledged ({killed} by senders that were killed), {events} stored, \
         {} arrivals were repetitions; {KILLS} kills of each end in {:.0?}",
        acknowledged.len(),
        arrivals - events,
        begin.elapsed()
    );
}

/// A whole mesh in a process of its own, once it serves, and where it is.
async fn mesh(folder: &Path, engine: &Engine, flags: &[String]) -> (Child, String) {
    let mut command = hapa();
    command.args(["all", "--port=0", "--metrics-port=0", "--structured-logging=true"]).args(flags);
    command.env("DATA_DIR", folder).env("AI_MODEL_ENDPOINT", engine.url());
    let mut mesh = command.stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(mesh.stderr.as_mut().unwrap()).lines();
    let address = within("the mesh", async {
        loop {
            let line = lines.next_line().await.unwrap().expect("it goes on");
            let line: serde_json::Value = serde_json::from_str(&line).unwrap();
            if let Some(address) = line["fields"]["address"].as_str() {
                return format!("http://{address}");
            }
        }
    });
    let address = address.await;
    (mesh, address)
}

#[tokio::test]
async fn a_mesh_that_is_killed_when_its_answer_ends_has_remembered_the_call() {
    let (engine, folder) = (Engine::start(), tempfile::tempdir().unwrap());
    let mut receiver = hapa_test_harness::FakeAnalytics::away().await;
    let flags = receiver.flags();
    for round in 0..10 {
        let (mut child, address) = mesh(folder.path(), &engine, &flags).await;
        let token = std::fs::read_to_string(folder.path().join("mesh-token")).unwrap();
        let mut client = CodegenServiceClient::connect(address).await.unwrap();
        let words = if round % 2 == 0 { "q" } else { "" };
        let mut request = tonic::Request::new(question(words));
        request.metadata_mut().insert("x-mesh-token", token.parse().unwrap());
        let answer = within("an answer", client.generate_code(request)).await;
        child.start_kill().unwrap();
        assert_eq!(answer.is_ok(), round % 2 == 0);
        child.wait().await.unwrap();
    }
    receiver.come().await;
    let _last = mesh(folder.path(), &engine, &flags).await;
    receiver.wait_for_usage("codegen", 10).await;
    let failures = async {
        while receiver.occurrences("codegen").len() < 5 {
            sleep(Duration::from_millis(10)).await;
        }
    };
    within("the failures", failures).await;
}
