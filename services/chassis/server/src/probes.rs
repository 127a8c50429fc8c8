//! The HTTP port for machines that watch: /metrics, /livez, /readyz. No credential, so never routed
//! from outside.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::http::StatusCode;
use axum::routing::get;
use hapa_store::rate_limit::Limiter;
use hapa_telemetry::recorder::MetricsHandle;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::file_descriptors::Reserve;
use crate::health::Health;
use crate::server::REDIS;

/// Most connections at once; each is for one request.
const MAX_CONNECTIONS: usize = 64;
/// Longest wait for a request.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest life of a connection.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest wait for requests that are being answered, at the end.
const LAST_ANSWER: Duration = Duration::from_millis(200);
/// After an accept that failed, so that a lasting cause does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);

/// Serves until `end`; not ready from `draining` on.
pub(crate) async fn serve(
    listener: TcpListener,
    metrics: &'static MetricsHandle,
    (limiter, health): (Arc<Limiter>, Health),
    draining: CancellationToken,
    end: CancellationToken,
) {
    let counting = Arc::clone(&limiter);
    let ready = move || async move {
        if draining.is_cancelled() {
            return (StatusCode::SERVICE_UNAVAILABLE, "draining\n".to_owned());
        }
        let problems = problems(&limiter, &health);
        if health.is_ready() {
            (StatusCode::OK, format!("ready\n{problems}"))
        } else {
            (StatusCode::SERVICE_UNAVAILABLE, format!("not ready\n{problems}"))
        }
    };
    let metrics = move || async move {
        counting.gauge();
        metrics.render()
    };
    let router = Router::new()
        .route("/livez", get(|| async { "alive\n" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics));
    accept(listener, router, end).await;
}

/// Our own loop, because axum's can neither give up a descriptor of a reserve nor end who says nothing.
async fn accept(listener: TcpListener, router: Router, end: CancellationToken) {
    let (reserve, tasks) = (Reserve::new(), TaskTracker::new());
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let accepted = async {
            let permit = Arc::clone(&room).acquire_owned().await.ok();
            (reserve.accept(&listener).await, permit)
        };
        let (accepted, permit) = tokio::select! {
            () = end.cancelled() => break,
            accepted = accepted => accepted,
        };
        let Ok(stream) = accepted else {
            sleep(ACCEPT_PAUSE).await;
            continue;
        };
        let connection = connection(stream, router.clone(), end.clone());
        let reserve = reserve.clone();
        tasks.spawn(async move {
            connection.await;
            // Before anything else takes what it gave back.
            reserve.fill();
            drop(permit);
        });
    }
    tasks.close();
    tasks.wait().await;
}

async fn connection(stream: TcpStream, router: Router, end: CancellationToken) {
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT).keep_alive(false);
    let served = builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    let mut served = pin!(timeout(CONNECTION_TIMEOUT, served));
    let outcome = tokio::select! {
        outcome = &mut served => outcome,
        // What was asked is answered; who has not asked is left.
        () = end.cancelled() => return drop(timeout(LAST_ANSWER, served).await),
    };
    if let Ok(Err(error)) = outcome {
        tracing::debug!(%error, "a connection to the port of metrics broke");
    }
}

/// A line for each thing that is away. The limiter knows of Redis what its last call found.
fn problems(limiter: &Limiter, health: &Health) -> String {
    let mut lines: Vec<_> = limiter.degraded().map(str::to_owned).into_iter().collect();
    for part in health.parts().into_iter().filter(|part| part.name != REDIS) {
        if let Err(why) = part.outcome {
            lines.push(format!("{}: {why}", part.problem));
        }
    }
    lines.into_iter().map(|line| line + "\n").collect()
}
