//! Engines that come and go with the addresses of a name.

use std::future::{pending, ready};
use std::net::SocketAddr;
use std::{io, vec};

use super::open::Request;
use super::*;
use crate::engine::Ask;

fn fleet(setting: &str) -> Fleet {
    let bounds = Bounds { attempt: Duration::from_secs(1), stuck: Duration::from_secs(1) };
    Fleet::new(Source::read(setting).unwrap(), EngineAccess::default(), bounds).unwrap()
}

async fn resolves_to(fleet: &Fleet, addresses: &[&str]) {
    let found: Vec<SocketAddr> =
        addresses.iter().map(|address| format!("{address}:0").parse().unwrap()).collect();
    fleet.resolve_with(|_| ready(Ok::<_, io::Error>(found.clone().into_iter()))).await;
}

fn names(fleet: &Fleet) -> Vec<String> {
    fleet.known().replicas.iter().map(|replica| replica.name.clone()).collect()
}

fn request() -> Request {
    Request {
        ask: Ask::Chat,
        body: bytes::Bytes::new(),
        model: "m".to_owned(),
        affinity: None,
        report: hapa_core::call_stats::Report::default(),
        answered: CancellationToken::new(),
        span: tracing::Span::none(),
    }
}

#[tokio::test]
async fn every_address_of_a_name_is_an_engine_and_those_that_stay_are_kept() {
    let fleet = fleet("http://127.0.0.9:7/v1,dns+http://engines:80/v1");
    assert_eq!(names(&fleet), ["127.0.0.9:7"]);
    resolves_to(&fleet, &["127.0.0.2", "127.0.0.1", "127.0.0.2"]).await;
    assert_eq!(names(&fleet), ["127.0.0.9:7", "127.0.0.1:80", "127.0.0.2:80"]);
    let kept = Arc::clone(&fleet.known().replicas[2]);
    resolves_to(&fleet, &["127.0.0.2", "127.0.0.3"]).await;
    assert_eq!(names(&fleet), ["127.0.0.9:7", "127.0.0.2:80", "127.0.0.3:80"]);
    assert!(Arc::ptr_eq(&kept, &fleet.known().replicas[1]) && !kept.gone.is_cancelled());
}

#[tokio::test]
async fn what_an_engine_that_goes_is_asked_already_goes_on() {
    let fleet = fleet("dns+http://engines:80/v1");
    resolves_to(&fleet, &["127.0.0.1"]).await;
    let attempt = fleet.pick(&request(), &[]).unwrap();
    resolves_to(&fleet, &["127.0.0.2"]).await;
    assert!(attempt.replica.gone.is_cancelled());
    assert_eq!(attempt.replica.candidate(false).own, 1);
    let next = fleet.pick(&request(), &[]).unwrap();
    assert_eq!(next.replica.name, "127.0.0.2:80");
    let gone = Arc::clone(&attempt.replica);
    drop(attempt);
    assert_eq!(gone.candidate(false).own, 0);
}

#[tokio::test]
async fn a_name_that_hangs_or_is_lost_keeps_its_engines_and_requests_do_not_wait_for_it() {
    let fleet = fleet("dns+http://engines:80/v1");
    resolves_to(&fleet, &["127.0.0.1"]).await;
    let hangs = fleet.resolve_with(|_| pending::<io::Result<vec::IntoIter<SocketAddr>>>());
    let mut hangs = std::pin::pin!(hangs);
    tokio::select! {
        biased;
        () = &mut hangs => panic!("nothing was found"),
        () = ready(()) => assert!(fleet.pick(&request(), &[]).is_ok()),
    }
    hangs.await;
    let lost = || Err::<vec::IntoIter<SocketAddr>, _>(io::ErrorKind::NotFound.into());
    fleet.resolve_with(|_| ready(lost())).await;
    assert_eq!(names(&fleet), ["127.0.0.1:80"]);
}

#[tokio::test]
async fn engines_that_failed_and_engines_that_were_asked_are_told_apart() {
    let fleet = fleet("http://127.0.0.1:1/v1");
    for _ in 0..5 {
        fleet.pick(&request(), &[]).unwrap().went(breaker::Verdict::Failure);
    }
    let closed = fleet.pick(&request(), &[]);
    assert!(matches!(closed, Err(board::Nobody::Closed(until)) if until > Instant::now()));
    let all = [fleet.known().replicas[0].id];
    assert!(matches!(fleet.pick(&request(), &all), Err(board::Nobody::Left)));
}
