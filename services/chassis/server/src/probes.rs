//! The HTTP port for probes and monitoring: /metrics, /livez, /readyz. It needs no credential, so it must not be
//! reachable from outside.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::http::StatusCode;
use axum::routing::get;
use hapa_telemetry::recorder::MetricsHandle;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::file_descriptors::DescriptorReserve;
use crate::health::{Health, REDIS};
use crate::rate_limit::Limiter;

/// Maximum number of concurrent connections; each serves one request.
const MAX_CONNECTIONS: usize = 64;
/// Maximum time until the headers of a request are complete.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum age of a connection.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum time at the end for requests that are being answered.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_millis(200);
/// Delay after a failed accept, so that a lasting cause does not make the loop spin.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(20);

/// Serves until `end`. /readyz fails as soon as `draining` fires.
pub(crate) async fn serve(
    listener: TcpListener,
    metrics: &'static MetricsHandle,
    (limiter, health): (Arc<Limiter>, Health),
    draining: CancellationToken,
    end: CancellationToken,
) {
    let gauges = Arc::clone(&limiter);
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
        gauges.gauge();
        metrics.render()
    };
    let router = Router::new()
        .route("/livez", get(|| async { "alive\n" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics));
    accept(listener, router, end).await;
}

/// An own accept loop, because axum's can neither use a descriptor of the reserve nor close idle connections.
async fn accept(listener: TcpListener, router: Router, end: CancellationToken) {
    let (reserve, tasks) = (DescriptorReserve::new(), TaskTracker::new());
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let accepted = async {
            let permit = Arc::clone(&permits).acquire_owned().await.ok();
            (reserve.accept(&listener).await, permit)
        };
        let (accepted, permit) = tokio::select! {
            () = end.cancelled() => break,
            accepted = accepted => accepted,
        };
        let Ok(stream) = accepted else {
            sleep(ACCEPT_RETRY_DELAY).await;
            continue;
        };
        let connection = connection(stream, router.clone(), end.clone());
        let reserve = reserve.clone();
        tasks.spawn(async move {
            connection.await;
            // Before another task takes the descriptor of the closed connection.
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
        // A started request is answered; an idle connection is closed.
        () = end.cancelled() => return drop(timeout(SHUTDOWN_TIMEOUT, served).await),
    };
    if let Ok(Err(error)) = outcome {
        tracing::debug!(%error, "a connection to the metrics port failed");
    }
}

/// One line for each failing component. The rate limiter reports Redis by the result of its last call.
fn problems(limiter: &Limiter, health: &Health) -> String {
    let mut lines: Vec<_> = limiter.degraded().map(str::to_owned).into_iter().collect();
    for component in health.components().into_iter().filter(|component| component.name != REDIS) {
        if let Err(why) = component.outcome {
            lines.push(format!("{}: {why}", component.problem));
        }
    }
    lines.into_iter().map(|line| line + "\n").collect()
}
