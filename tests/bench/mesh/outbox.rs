//! The cost of the outbox for a call: an event is encoded and passed to the writer, and the last frame of the
//! answer is sent after the write. No receiver listens, so that delivery is not measured.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use hapa_proto::analytics::v1::UsageEvent;
use hapa_server::outbox::{Outbox, OutboxLimits, Receiver, Receivers};
use hapa_transport::peer;
use secrecy::SecretString;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::decisions::METHOD;
use crate::gauge;
use crate::report::{Table, verdict};
use crate::samples::Samples;

/// Microseconds.
const TARGET: f64 = 50.0;
/// Microseconds for one call.
const CPU_TARGET: f64 = 25.0;
/// Calls that end at once.
const WRITER_COUNT: usize = 32;
/// None is dropped.
const LIMITS: OutboxLimits =
    OutboxLimits { max_events: 1_000_000, max_age: Duration::from_hours(1) };
const NOBODY: &str = "http://127.0.0.1:1";

pub(crate) async fn measure(rounds: usize) -> anyhow::Result<Table> {
    let folder = tempfile::tempdir()?;
    let (spool, mut tasks) = (Outbox::default(), JoinSet::new());
    let client =
        peer::AnalyticsClient::new(peer::token_channel(NOBODY, &SecretString::from("any"))?);
    let receivers =
        Receivers { analytics: Some(Receiver { client, is_own_process: false }), errors: None };
    let work = spool.open(folder.path().join("outbox-bench"), LIMITS, receivers).await?;
    work.run(|task| drop(tasks.spawn(task)), &CancellationToken::new());

    let title = format!("Remembering a call, {rounds} rounds, in us");
    let mut table = Table::new(title, &["", "median", "p99", "target"]);
    for together in [1, WRITER_COUNT] {
        let Timed { handed, written, late, cpu } = timed(&spool, rounds, together).await?;
        let calls =
            if together == 1 { "one call".to_owned() } else { format!("{together} calls at once") };
        let median = handed.median() * 1e3;
        let target = verdict(median, "<", TARGET, " us");
        let figures = |samples: &Samples| {
            [samples.median(), samples.p99()].map(|value| format!("{:.1}", value * 1e3))
        };
        let [median, p99] = figures(&handed);
        table.row([format!("an append, {calls}"), median, p99, target]);
        let [median, p99] = figures(&written);
        let late = format!("{late} waited 50 ms and went on");
        table.row([format!("until the file has it, {calls}"), median, p99, late]);
        let call_count = u32::try_from(rounds * together)?;
        let per_call = format!("{:.1}", (cpu / call_count).as_secs_f64() * 1e6);
        let (none, target) = (String::new(), format!("< {CPU_TARGET} us"));
        table.row([format!("CPU time of all threads, {calls}"), per_call, none, target]);
    }
    tasks.shutdown().await;
    Ok(table)
}

#[derive(Default)]
struct Timed {
    /// What an append took.
    handed: Samples,
    /// Time until all events of a round were written.
    written: Samples,
    /// Number of receipts that arrived only because the maximum wait was over.
    late: usize,
    /// The CPU time of the process, with that of the receipts' callers.
    cpu: Duration,
}

async fn timed(spool: &Outbox, rounds: usize, together: usize) -> anyhow::Result<Timed> {
    let mut timed = Timed::default();
    let mut receipts = Vec::with_capacity(together);
    let before = gauge::cpu(std::process::id())?;
    for _ in 0..rounds {
        let events: Vec<_> = (0..together).map(|_| event()).collect();
        let begin = Instant::now();
        for event in &events {
            let from = Instant::now();
            receipts.push(spool.append(Some(event), None).context("there is no room")?);
            timed.handed.push(from.elapsed());
        }
        for receipt in receipts.drain(..) {
            timed.late += usize::from(!receipt.await);
        }
        timed.written.push(begin.elapsed());
    }
    timed.cpu = gauge::cpu(std::process::id())?.saturating_sub(before);
    Ok(timed)
}

/// That of a generation.
fn event() -> UsageEvent {
    UsageEvent {
        event_id: Uuid::now_v7().to_string(),
        time: Some(std::time::SystemTime::now().into()),
        method: METHOD.to_owned(),
        grpc_status: "OK".to_owned(),
        key_id: "key_0123456789abcdef".to_owned(),
        user_id: "usr_0123456789abcdef".to_owned(),
        owner: "usr_0123456789abcdef".to_owned(),
        model: "qwen2.5-coder-7b".to_owned(),
        task: "generate".to_owned(),
        prompt_tokens: 900,
        completion_tokens: 400,
        duration_us: 4_000_000,
        time_to_first_token_us: Some(200_000),
        inter_token_us: Some(9_000),
        service: "codegen".to_owned(),
        ..UsageEvent::default()
    }
}
