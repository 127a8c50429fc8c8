//! A deployed mesh: several processes on one PostgreSQL and one Redis. Promised numbers are measured here.

mod audit;
mod budgets;
mod limits;
mod outage;
mod replicas;
mod revocation;
mod rolling;
mod rotation;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use hapa_proto::auth::v1::{GetKeyRequest, Key};
use hapa_proto::codegen::v1::GetCodeHealthRequest;
use hapa_proto::codegen::v1::stream_generate_code_response::Event;
use hapa_test_harness::{CodegenClient, TestCluster, incident, within};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tonic::{Code, Status};

use crate::api::generate::question;

/// Between two polls.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// Prints a line of measurements.
#[expect(clippy::print_stdout, reason = "`--nocapture` shows it")]
fn say(line: &str) {
    println!("{line}");
}

/// Measured durations.
#[derive(Default)]
struct Times(Vec<Duration>);

impl Times {
    /// Prints the percentiles in one line, and returns the 99th.
    fn p99(mut self, what: &str, of: &str) -> Duration {
        self.0.sort();
        let at = |share: usize| self.0[(self.0.len() * share).div_ceil(100) - 1];
        let (p50, p99, max) = (at(50), at(99), at(100));
        let millis = |time: Duration| time.as_millis();
        say(&format!(
            "{what}: {} {of}, p50 {} ms, p99 {} ms, max {} ms on both replicas",
            self.0.len(),
            millis(p50),
            millis(p99),
            millis(max)
        ));
        p99
    }
}

/// Code and status of a failed call.
fn failure(status: &Status) -> (String, Code) {
    (incident(status).0, status.code())
}

async fn health(client: &mut CodegenClient) -> Result<(), Status> {
    within("a call", client.get_code_health(GetCodeHealthRequest {})).await.map(drop)
}

/// Repeats a call until its credential is refused with E4007.
async fn refused(mut client: CodegenClient) {
    within("a refusal", async {
        loop {
            match health(&mut client).await {
                // The interval leaves processor time for the measured calls.
                Ok(()) => sleep(4 * POLL_INTERVAL).await,
                Err(status) => {
                    let ended = ("E4007".to_owned(), Code::Unauthenticated);
                    return assert_eq!(failure(&status), ended, "{status:?}");
                }
            }
        }
    })
    .await;
}

/// A stream in the middle of its answer.
struct Open(tonic::Streaming<hapa_proto::codegen::v1::StreamGenerateCodeResponse>);

impl Open {
    /// The engine's script must hold after a token.
    async fn begin(mut client: CodegenClient) -> Open {
        let frames = within("a stream", client.stream_generate_code(question("q"))).await;
        let mut frames = frames.unwrap().into_inner();
        within("a token", async {
            loop {
                let frame = frames.message().await.unwrap().expect("it goes on");
                if matches!(frame.event, Some(Event::Delta(_))) {
                    return;
                }
            }
        })
        .await;
        Open(frames)
    }

    /// Whether the stream sends no frame, or a heartbeat, within 100 poll intervals.
    async fn goes_on(&mut self) -> bool {
        let frame = timeout(100 * POLL_INTERVAL, self.0.message()).await;
        match frame {
            Err(_) => true,
            Ok(frame) => matches!(frame.unwrap().unwrap().event, Some(Event::Heartbeat(_))),
        }
    }

    /// Reads the stream to its end, which must report that the credential has ended (E4007).
    async fn ended(mut self) {
        within("the end of a stream", async {
            let mut failed = None;
            loop {
                match self.0.message().await {
                    Ok(Some(frame)) => match frame.event {
                        Some(Event::Failed(event)) => failed = Some(event),
                        Some(Event::Heartbeat(_)) => assert!(failed.is_none()),
                        other => panic!("after the hold came {other:?}"),
                    },
                    Ok(None) => panic!("the stream ended as if it were whole"),
                    Err(status) => {
                        let failed = failed.expect("a last frame says why");
                        assert_eq!(failed.error_code, "E4007");
                        assert_eq!(incident(&status), (failed.error_code, failed.incident_id));
                        return assert_eq!(status.code(), Code::Unauthenticated);
                    }
                }
            }
        })
        .await;
    }
}

/// A key as auth shows it.
async fn shown(cluster: &TestCluster, key_id: &str) -> Key {
    let request = GetKeyRequest { key_id: key_id.to_owned() };
    let key = within("a key", async { cluster.auth.keys().get_key(request).await }).await;
    key.unwrap().into_inner().key.unwrap()
}

/// One call of many.
struct Done {
    begun: Instant,
    ended: Instant,
    /// `None` if the call succeeded.
    failure: Option<(String, Code)>,
}

/// Callers that repeat calls until [`Load::end`], and the outcomes of their calls.
struct Load<T> {
    over: Arc<AtomicBool>,
    calls: Arc<AtomicUsize>,
    callers: JoinSet<Vec<T>>,
}

impl Load<Done> {
    fn begin(clients: impl IntoIterator<Item = CodegenClient>) -> Self {
        Load::of(clients.into_iter().map(|client| Arc::new(Mutex::new(client))))
    }

    /// With clients that can be changed meanwhile.
    fn of(clients: impl IntoIterator<Item = Arc<Mutex<CodegenClient>>>) -> Self {
        let mut load = Load::none();
        for client in clients {
            load.add(2 * POLL_INTERVAL, move || {
                let mut client = client.lock().unwrap().clone();
                async move {
                    let begun = Instant::now();
                    let outcome = health(&mut client).await;
                    let (ended, failure) = (Instant::now(), outcome.err().as_ref().map(failure));
                    [Done { begun, ended, failure }]
                }
            });
        }
        load
    }
}

impl<T: Send + 'static> Load<T> {
    fn none() -> Self {
        Load { over: Arc::default(), calls: Arc::default(), callers: JoinSet::new() }
    }

    /// One more caller that makes a round of calls. It leaves processor time for the measured ones on a
    /// machine with two cores.
    fn add<const N: usize, F>(&mut self, room: Duration, round: impl Fn() -> F + Send + 'static)
    where
        F: Future<Output = [T; N]> + Send,
    {
        let (over, calls) = (Arc::clone(&self.over), Arc::clone(&self.calls));
        self.callers.spawn(async move {
            let mut done = Vec::new();
            while !over.load(Ordering::Relaxed) {
                done.extend(round().await);
                calls.fetch_add(N, Ordering::Relaxed);
                sleep(room).await;
            }
            done
        });
    }

    /// Waits for `count` more calls.
    async fn has_called(&self, count: usize) {
        let enough = self.calls.load(Ordering::Relaxed) + count;
        within("more calls", async {
            while self.calls.load(Ordering::Relaxed) < enough {
                sleep(POLL_INTERVAL).await;
            }
        })
        .await;
    }

    /// Stops the callers; returns the outcomes of all calls.
    async fn end(self) -> Vec<T> {
        self.over.store(true, Ordering::Relaxed);
        within("the callers", self.callers.join_all()).await.into_iter().flatten().collect()
    }
}
