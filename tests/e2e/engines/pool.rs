//! Several engines as one pool: selection, failover, and no leaked state.

mod chaos;
mod failover;
mod outage;
mod selection;

use std::time::Instant;

use hapa_engine_sim::{Engine, Script};
use hapa_proto::codegen::v1::{GenerateCodeRequest, ListModelsRequest, Model};
use hapa_test_harness::{TestMesh, within};
use tokio::task::JoinSet;

use crate::api::generate::{Read, question, stream};

/// The interval of polls of an engine.
const POLL_INTERVAL: std::time::Duration = std::time::Duration::from_millis(20);
pub(super) const ANSWER: &str = "Two words.\n```python\nprint('once')\n```\n";

/// A mesh with `count` engines that return [`ANSWER`]. A silent attempt fails after a second.
async fn cluster(count: usize) -> TestMesh {
    let mesh = TestMesh::with_engines(count, &["--first-token-timeout-seconds=3"]).await;
    mesh.engines().for_each(answers);
    mesh
}

fn answers(engine: &Engine) {
    engine.script(Script::text(ANSWER));
}

/// Reads `calls` streams to their end, `at_once` of them concurrently.
async fn ask(mesh: &TestMesh, calls: usize, at_once: usize) -> Vec<Read> {
    let mut running = JoinSet::new();
    for first in 0..at_once.min(calls) {
        let mut client = mesh.client();
        running.spawn(async move {
            let mut reads = Vec::new();
            for _ in (first..calls).step_by(at_once) {
                reads.push(stream(&mut client, question("q")).await);
            }
            reads
        });
    }
    within("the calls", running.join_all()).await.into_iter().flatten().collect()
}

/// The answer is complete, and was sent once.
#[track_caller]
fn is_whole(read: &Read) {
    assert!(read.finished.is_some() && read.failed.is_none(), "{read:?}");
    assert_eq!((&*read.code, &*read.explanation), ("print('once')\n", "Two words.\n"));
}

/// Requests to all engines.
fn started(mesh: &TestMesh) -> u64 {
    mesh.engines().map(|engine| engine.counts().started).sum()
}

fn in_session(session: &str) -> GenerateCodeRequest {
    GenerateCodeRequest { session_id: session.to_owned(), ..question("q") }
}

async fn model(mesh: &TestMesh, name: &str) -> Option<Model> {
    let models = within("the models", mesh.client().list_models(ListModelsRequest {})).await;
    models.unwrap().into_inner().models.into_iter().find(|model| model.name == name)
}

/// Waits until a model is listed as wanted.
async fn model_becomes(mesh: &TestMesh, name: &str, wanted: impl Fn(&Model) -> bool) -> Model {
    within(&format!("{name} to be listed so"), async {
        loop {
            if let Some(model) = model(mesh, name).await.filter(|model| wanted(model)) {
                return model;
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    })
    .await
}

/// A metric, summed over the engines of this mesh.
pub(super) async fn gauge(mesh: &TestMesh, name: &str) -> f64 {
    let metrics = mesh.metrics().await;
    let of = |engine: &Engine| metrics.sum(name, &[&format!("engine=\"{}\"", engine.address())]);
    mesh.engines().map(of).sum()
}

/// Repeats calls until all engines are used again and answer; returns the time that this took.
async fn recovers(mesh: &TestMesh) -> std::time::Duration {
    let from = Instant::now();
    within("the engines to be used again", async {
        loop {
            let whole = ask(mesh, 6, 3).await.iter().all(|read| read.finished.is_some());
            let open = gauge(mesh, "hapa_engine_breaker_state").await;
            let up = gauge(mesh, "hapa_engine_up").await;
            let engines = u32::try_from(mesh.engines().count()).unwrap();
            if whole && open == 0.0 && up >= f64::from(engines) {
                return;
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    })
    .await;
    from.elapsed()
}

/// Waits until nothing is in flight any more, as metrics and engines see it.
async fn is_quiet(mesh: &TestMesh) {
    within("the gauges", async {
        while gauge(mesh, "hapa_engine_requests_in_flight").await != 0.0 {
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    })
    .await;
    for engine in mesh.engines() {
        engine.wait_until(|counts| counts.in_flight() == 0).await;
    }
}
