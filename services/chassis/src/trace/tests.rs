//! What goes from one service to the next, without a collector.

use super::*;
use crate::config::TraceConfig;

const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

static CALL: Rpc = Rpc::new("/hapa.a.v1.AService/Do", Access::Caller);
static MESH: Rpc = Rpc::new("/hapa.a.v1.AService/Tell", Access::Mesh);
static WATCH: Rpc = Rpc::new("/hapa.a.v1.AService/WatchThings", Access::Caller);

fn tracing(ratio: f64) -> (Tracing, Option<Exporter>) {
    let config = TraceConfig {
        otel_exporter_otlp_endpoint: Some("http://127.0.0.1:9".to_owned()),
        otel_exporter_otlp_headers: None,
        otel_service_name: None,
        otel_traces_sampler_arg: ratio,
    };
    Tracing::new(&config).unwrap()
}

fn parent() -> HeaderMap {
    let pairs = [("traceparent", PARENT), ("tracestate", "a=b")];
    HeaderMap::from_iter(
        pairs.map(|(name, value)| (name.parse::<HeaderName>().unwrap(), value.parse().unwrap())),
    )
}

#[tokio::test]
async fn a_trace_goes_on_where_the_call_goes() {
    let (tracing, _exporter) = tracing(0.0);
    let arrived = tracing.arrive(&parent(), Some(&CALL));
    assert_eq!(arrived.id(), "4bf92f3577b34da6a3ce929d0e0e4736");
    let asked = arrived.trace().around(async { Trace::current().ask(|| "x".to_owned()) }).await;
    let mut headers = HeaderMap::new();
    asked.carry(&mut headers);
    let carried = headers["traceparent"].to_str().unwrap();
    let parts: Vec<_> = carried.split('-').collect();
    // Whoever began it has decided that it is kept.
    assert_eq!((parts[1], parts[3]), ("4bf92f3577b34da6a3ce929d0e0e4736", "01"));
    assert_ne!(parts[2], "00f067aa0ba902b7");
    assert_eq!(headers["tracestate"], "a=b");
    assert!(Trace::current().0.is_none());
}

#[tokio::test]
async fn a_trace_that_is_not_kept_is_named_and_told_on_all_the_same() {
    let (tracing, exporter) = tracing(0.0);
    let arrived = tracing.arrive(&HeaderMap::new(), Some(&CALL));
    assert_eq!(arrived.id().len(), 32);
    let mut headers = HeaderMap::new();
    arrived.carry(&mut headers);
    assert!(headers["traceparent"].to_str().unwrap().ends_with("-00"));
    drop(arrived);
    assert!(exporter.unwrap().is_empty());
}

#[tokio::test]
async fn what_is_on_nobodys_behalf_has_no_span() {
    let (tracing, _exporter) = tracing(1.0);
    for rpc in [None, Some(&MESH), Some(&WATCH)] {
        assert_eq!(tracing.arrive(&HeaderMap::new(), rpc).id(), "");
    }
    assert_ne!(tracing.arrive(&parent(), Some(&MESH)).id(), "");
    let off = Tracing::default().arrive(&parent(), Some(&CALL));
    let mut headers = HeaderMap::new();
    off.carry(&mut headers);
    assert!(headers.is_empty() && off.id().is_empty());
}
