//! Tests of endpoints that are added and removed with the addresses of a DNS name.

mod refusals;

use std::future::{pending, ready};
use std::net::SocketAddr;
use std::{io, vec};

use hapa_core::circuit_breaker::Outcome;

use super::dispatch::EngineRequest;
use super::*;
use crate::upstream::engine::Operation;

fn pool(setting: &str) -> EnginePool {
    let timeouts = PoolTimeouts { attempt: Duration::from_secs(1), stall: Duration::from_secs(1) };
    EnginePool::new(EngineSource::parse_list(setting).unwrap(), EngineOptions::default(), timeouts)
        .unwrap()
}

async fn resolve_to(pool: &EnginePool, addresses: &[&str]) {
    let found: Vec<SocketAddr> =
        addresses.iter().map(|address| format!("{address}:0").parse().unwrap()).collect();
    pool.resolve_names(|_| ready(Ok::<_, io::Error>(found.clone().into_iter()))).await;
}

fn names(pool: &EnginePool) -> Vec<String> {
    pool.snapshot().endpoints.iter().map(|endpoint| endpoint.name.clone()).collect()
}

fn request() -> EngineRequest {
    EngineRequest {
        operation: Operation::Chat,
        body: bytes::Bytes::new(),
        model: "m".to_owned(),
        affinity: None,
        report: hapa_core::call_stats::CallStats::default(),
        answered: CancellationToken::new(),
        span: tracing::Span::none(),
    }
}

#[tokio::test]
async fn every_address_of_a_name_is_an_endpoint_and_unchanged_endpoints_are_reused() {
    let pool = pool("http://127.0.0.9:7/v1,dns+http://engines:80/v1");
    assert_eq!(names(&pool), ["127.0.0.9:7"]);
    resolve_to(&pool, &["127.0.0.2", "127.0.0.1", "127.0.0.2"]).await;
    assert_eq!(names(&pool), ["127.0.0.9:7", "127.0.0.1:80", "127.0.0.2:80"]);
    let kept = Arc::clone(&pool.snapshot().endpoints[2]);
    resolve_to(&pool, &["127.0.0.2", "127.0.0.3"]).await;
    assert_eq!(names(&pool), ["127.0.0.9:7", "127.0.0.2:80", "127.0.0.3:80"]);
    assert!(Arc::ptr_eq(&kept, &pool.snapshot().endpoints[1]) && !kept.removed.is_cancelled());
}

#[tokio::test]
async fn requests_in_flight_at_a_removed_engine_continue() {
    let pool = pool("dns+http://engines:80/v1");
    resolve_to(&pool, &["127.0.0.1"]).await;
    let attempt = pool.pick(&request(), &[]).unwrap();
    resolve_to(&pool, &["127.0.0.2"]).await;
    assert!(attempt.endpoint.removed.is_cancelled());
    assert_eq!(attempt.endpoint.candidate(false).in_flight, 1);
    let next = pool.pick(&request(), &[]).unwrap();
    assert_eq!(next.endpoint.name, "127.0.0.2:80");
    let removed = Arc::clone(&attempt.endpoint);
    drop(attempt);
    assert_eq!(removed.candidate(false).in_flight, 0);
}

#[tokio::test]
async fn a_failed_or_hanging_dns_lookup_keeps_the_engines_and_delays_no_request() {
    let pool = pool("dns+http://engines:80/v1");
    resolve_to(&pool, &["127.0.0.1"]).await;
    let hangs = pool.resolve_names(|_| pending::<io::Result<vec::IntoIter<SocketAddr>>>());
    let mut hangs = std::pin::pin!(hangs);
    tokio::select! {
        biased;
        () = &mut hangs => panic!("nothing was found"),
        () = ready(()) => assert!(pool.pick(&request(), &[]).is_ok()),
    }
    hangs.await;
    let lost = || Err::<vec::IntoIter<SocketAddr>, _>(io::ErrorKind::NotFound.into());
    pool.resolve_names(|_| ready(lost())).await;
    assert_eq!(names(&pool), ["127.0.0.1:80"]);
}

#[tokio::test]
async fn open_circuits_and_tried_engines_are_distinguished() {
    let pool = pool("http://127.0.0.1:1/v1");
    for _ in 0..5 {
        pool.pick(&request(), &[]).unwrap().finish(Outcome::Failure);
    }
    let closed = pool.pick(&request(), &[]);
    assert!(
        matches!(closed, Err(snapshot::NoEndpoint::CircuitOpen(until)) if until > Instant::now())
    );
    let all = [pool.snapshot().endpoints[0].id];
    assert!(matches!(pool.pick(&request(), &all), Err(snapshot::NoEndpoint::NoneLeft)));
}
