//! Server spans and their propagation, with an exporter that is read instead of a collector.

use std::net::IpAddr;

use clap::{Args, FromArgMatches as _};
use hapa_core::access::{Access, Rpc};
use hapa_core::call::Call;
use hapa_telemetry::config::{LogConfig, TraceConfig};
use hapa_telemetry::logging::prepare;
use hapa_transport::otlp_exporter::{SpanExporter, tracer_and_exporter};
use http::HeaderName;
use opentelemetry::trace::{SpanKind, Status};
use tracing::Instrument as _;
use tracing::dispatcher::{DefaultGuard, set_default};

use super::*;

const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

static CALL: Rpc = Rpc::new("/hapa.a.v1.AService/Do", Access::Authenticated);
static MESH: Rpc = Rpc::new("/hapa.a.v1.AService/Tell", Access::Service);
static OPEN: Rpc = Rpc::new("/hapa.a.v1.AService/Look", Access::NoAuth);
static WATCH: Rpc = Rpc::new("/hapa.a.v1.AService/WatchThings", Access::Authenticated);

fn log(level: &str) -> LogConfig {
    let command = LogConfig::augment_args(clap::Command::new("log"));
    let flags = ["log".to_owned(), format!("--log-level={level}")];
    LogConfig::from_arg_matches(&command.get_matches_from(flags)).unwrap()
}

fn trace_config(collector: Option<&str>, ratio: f64) -> TraceConfig {
    TraceConfig {
        otel_exporter_otlp_endpoint: collector.map(str::to_owned),
        otel_exporter_otlp_certificate: None,
        otel_exporter_otlp_headers: None,
        otel_service_name: None,
        otel_traces_sampler_arg: ratio,
    }
}

/// Makes spans on this thread, independently of the log level.
fn start_tracing(ratio: f64) -> (SpanExporter, DefaultGuard) {
    let config = trace_config(Some("http://127.0.0.1:9"), ratio);
    let (tracer, exporter) = tracer_and_exporter(&config).unwrap().unzip();
    let dispatch = prepare(&log("off"), tracer).unwrap();
    (exporter.unwrap(), set_default(&dispatch))
}

fn start_span(headers: &HeaderMap, rpc: Option<&'static Rpc>) -> (Span, SpanHandle, String) {
    let call = Call::new(Some("a-request"), rpc, IpAddr::from([127, 0, 0, 1]));
    let path = rpc.map_or("unknown", |rpc| rpc.path);
    let ServerSpan { span, part, trace_id } = start_server_span(headers, &call, path);
    (span, part, trace_id)
}

fn traced_headers() -> HeaderMap {
    let pairs = [("traceparent", PARENT), ("tracestate", "a=b")];
    HeaderMap::from_iter(
        pairs.map(|(name, value)| (name.parse::<HeaderName>().unwrap(), value.parse().unwrap())),
    )
}

fn injected_headers(part: &SpanHandle) -> HeaderMap {
    let mut headers = HeaderMap::new();
    part.inject(&mut headers);
    headers
}

#[tokio::test]
async fn a_trace_continues_across_services() {
    let (mut exporter, _guard) = start_tracing(0.0);
    let (span, part, id) = start_span(&traced_headers(), Some(&CALL));
    assert_eq!(id, "4bf92f3577b34da6a3ce929d0e0e4736");
    let asked = async { SpanHandle::client(|| "x".to_owned()) }.instrument(span.clone()).await;
    let headers = injected_headers(&asked);
    let parts: Vec<_> = headers["traceparent"].to_str().unwrap().split('-').collect();
    // The sampling decision of the caller stands.
    assert_eq!((parts[1], parts[3]), ("4bf92f3577b34da6a3ce929d0e0e4736", "01"));
    assert_ne!(parts[2], "00f067aa0ba902b7");
    assert_eq!(headers["tracestate"], "a=b");
    assert!(!SpanHandle::client(|| unreachable!()).is_some(), "a client span needs a server span");
    let asked_id = parts[2].to_owned();

    drop((asked, part));
    let [asked, call] = &exporter.ended()[..] else { panic!("two spans") };
    // The part has ended although the log span is still open.
    assert!(!span.is_disabled());
    assert_eq!((asked.name.as_ref(), call.name.as_ref()), ("x", "hapa.a.v1.AService/Do"));
    assert_eq!((&asked.span_kind, &call.span_kind), (&SpanKind::Client, &SpanKind::Server));
    assert_eq!(asked.span_context.span_id().to_string(), asked_id);
    assert_eq!(asked.parent_span_id, call.span_context.span_id());
    let mut names: Vec<_> = call.attributes.iter().map(|one| one.key.as_str()).collect();
    names.sort_unstable();
    assert_eq!(names, ["hapa.request_id", "rpc.method", "rpc.service", "rpc.system"]);
}

#[tokio::test]
async fn a_trace_that_is_not_sampled_is_still_propagated() {
    let (mut exporter, _guard) = start_tracing(0.0);
    let (_span, part, id) = start_span(&HeaderMap::new(), Some(&CALL));
    assert_eq!(id.len(), 32);
    assert!(injected_headers(&part)["traceparent"].to_str().unwrap().ends_with("-00"));
    drop(part);
    assert!(exporter.ended().is_empty());
}

#[tokio::test]
async fn calls_without_a_user_have_no_span() {
    let (_exporter, _guard) = start_tracing(1.0);
    for rpc in [None, Some(&MESH), Some(&OPEN), Some(&WATCH)] {
        let (span, part, id) = start_span(&HeaderMap::new(), rpc);
        assert!(!part.is_some() && id.is_empty());
        let _entered = span.enter();
        assert!(!SpanHandle::client(|| unreachable!()).is_some());
    }
    assert!(start_span(&traced_headers(), Some(&MESH)).1.is_some());
}

#[tokio::test]
async fn a_log_line_is_not_an_event_of_a_span() {
    let (mut exporter, _guard) = start_tracing(1.0);
    let (span, part, _) = start_span(&HeaderMap::new(), Some(&CALL));
    span.in_scope(|| tracing::error!("what an engine said"));
    part.event("of-ours");
    drop(part);
    let [call] = &exporter.ended()[..] else { panic!("one span") };
    let events: Vec<_> = call.events.iter().map(|event| event.name.as_ref()).collect();
    assert_eq!(events, ["of-ours"]);
    assert_eq!(call.status, Status::Unset);
}

#[tokio::test]
async fn a_library_that_checks_the_log_level_does_not_lose_the_span() {
    let config = trace_config(Some("http://127.0.0.1:9"), 1.0);
    let (tracer, exporter) = tracer_and_exporter(&config).unwrap().unzip();
    let dispatch = prepare(&log("debug"), tracer).unwrap();
    let _guard = set_default(&dispatch);
    assert!(
        tracing::enabled!(target: "a_library", tracing::Level::DEBUG),
        "DEBUG lines are enabled"
    );
    let (span, part, _) = start_span(&HeaderMap::new(), Some(&CALL));
    assert!(!span.is_disabled());
    drop(part);
    assert_eq!(exporter.unwrap().ended().len(), 1);
}

#[tokio::test]
async fn without_a_collector_only_log_lines_have_spans() {
    let (tracer, exporter) = tracer_and_exporter(&trace_config(None, 1.0)).unwrap().unzip();
    let dispatch = prepare(&log("trace"), tracer).unwrap();
    assert!(exporter.is_none());
    let _guard = set_default(&dispatch);
    let (span, part, id) = start_span(&traced_headers(), Some(&CALL));
    // The log lines still name the caller's trace.
    assert_eq!(id, "4bf92f3577b34da6a3ce929d0e0e4736");
    assert!(!span.is_disabled());
    assert!(part.span().is_disabled() && injected_headers(&part).is_empty());
    let _entered = span.enter();
    let asked = SpanHandle::client(|| unreachable!("the name is not even computed"));
    assert!(asked.span().is_disabled() && injected_headers(&asked).is_empty());
}

#[test]
fn only_a_valid_traceparent_is_used() {
    let read = |text: &str| {
        let headers = [("traceparent".parse().unwrap(), text.parse().unwrap())];
        trace_id_of(&HeaderMap::from_iter(headers)).to_owned()
    };
    let id = "4bf92f3577b34da6a3ce929d0e0e4736";
    assert_eq!(read(&format!("00-{id}-00f067aa0ba902b7-01")), id);
    let zero = "0".repeat(32);
    for wrong in ["", "x", id, &format!("00-{zero}-00f067aa0ba902b7-01"), "00-ab-cd-01"] {
        assert_eq!(read(wrong), "", "{wrong}");
    }
}
