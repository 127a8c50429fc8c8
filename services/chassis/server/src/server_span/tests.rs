//! What goes from one service to the next, without a collector.

use std::net::IpAddr;

use clap::{Args, FromArgMatches as _};
use hapa_core::access::{Access, Rpc};
use hapa_core::call::Call;
use hapa_telemetry::config::{LogConfig, TraceConfig};
use hapa_telemetry::logging::prepare;
use hapa_transport::otlp_exporter::{Exporter, collect};
use http::HeaderName;
use opentelemetry::trace::{SpanKind, Status};
use tracing::Instrument as _;
use tracing::dispatcher::{DefaultGuard, set_default};

use super::*;

const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

static CALL: Rpc = Rpc::new("/hapa.a.v1.AService/Do", Access::Caller);
static MESH: Rpc = Rpc::new("/hapa.a.v1.AService/Tell", Access::Mesh);
static OPEN: Rpc = Rpc::new("/hapa.a.v1.AService/Look", Access::Public);
static WATCH: Rpc = Rpc::new("/hapa.a.v1.AService/WatchThings", Access::Caller);

fn log(level: &str) -> LogConfig {
    let command = LogConfig::augment_args(clap::Command::new("log"));
    let flags = ["log".to_owned(), format!("--log-level={level}")];
    LogConfig::from_arg_matches(&command.get_matches_from(flags)).unwrap()
}

fn to(collector: Option<&str>, ratio: f64) -> TraceConfig {
    TraceConfig {
        otel_exporter_otlp_endpoint: collector.map(str::to_owned),
        otel_exporter_otlp_certificate: None,
        otel_exporter_otlp_headers: None,
        otel_service_name: None,
        otel_traces_sampler_arg: ratio,
    }
}

/// Makes spans on this thread, whatever the level of log lines.
fn tracing(ratio: f64) -> (Exporter, DefaultGuard) {
    let config = to(Some("http://127.0.0.1:9"), ratio);
    let (tracer, exporter) = collect(&config).unwrap().unzip();
    let dispatch = prepare(&log("off"), tracer).unwrap();
    (exporter.unwrap(), set_default(&dispatch))
}

fn arrived(headers: &HeaderMap, rpc: Option<&'static Rpc>) -> (Span, Part, String) {
    let call = Call::new(Some("a-request"), rpc, IpAddr::from([127, 0, 0, 1]));
    arrive(headers, &call, rpc.map_or("unknown", |rpc| rpc.path))
}

fn parent() -> HeaderMap {
    let pairs = [("traceparent", PARENT), ("tracestate", "a=b")];
    HeaderMap::from_iter(
        pairs.map(|(name, value)| (name.parse::<HeaderName>().unwrap(), value.parse().unwrap())),
    )
}

fn carried(part: &Part) -> HeaderMap {
    let mut headers = HeaderMap::new();
    part.carry(&mut headers);
    headers
}

#[tokio::test]
async fn a_trace_goes_on_where_the_call_goes() {
    let (mut exporter, _guard) = tracing(0.0);
    let (span, part, id) = arrived(&parent(), Some(&CALL));
    assert_eq!(id, "4bf92f3577b34da6a3ce929d0e0e4736");
    let asked = async { Part::ask(|| "x".to_owned()) }.instrument(span.clone()).await;
    let headers = carried(&asked);
    let parts: Vec<_> = headers["traceparent"].to_str().unwrap().split('-').collect();
    // Whoever began it has decided that it is kept.
    assert_eq!((parts[1], parts[3]), ("4bf92f3577b34da6a3ce929d0e0e4736", "01"));
    assert_ne!(parts[2], "00f067aa0ba902b7");
    assert_eq!(headers["tracestate"], "a=b");
    assert!(!Part::ask(|| unreachable!()).is_some(), "nothing is asked on nobody's behalf");
    let asked_id = parts[2].to_owned();

    drop((asked, part));
    let [asked, call] = &exporter.ended()[..] else { panic!("two spans") };
    // It has ended though its span is still held.
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
async fn a_trace_that_is_not_kept_is_named_and_told_on_all_the_same() {
    let (mut exporter, _guard) = tracing(0.0);
    let (_span, part, id) = arrived(&HeaderMap::new(), Some(&CALL));
    assert_eq!(id.len(), 32);
    assert!(carried(&part)["traceparent"].to_str().unwrap().ends_with("-00"));
    drop(part);
    assert!(exporter.ended().is_empty());
}

#[tokio::test]
async fn what_is_on_nobodys_behalf_has_no_span() {
    let (_exporter, _guard) = tracing(1.0);
    for rpc in [None, Some(&MESH), Some(&OPEN), Some(&WATCH)] {
        let (span, part, id) = arrived(&HeaderMap::new(), rpc);
        assert!(!part.is_some() && id.is_empty());
        let _entered = span.enter();
        assert!(!Part::ask(|| unreachable!()).is_some());
    }
    assert!(arrived(&parent(), Some(&MESH)).1.is_some());
}

#[tokio::test]
async fn a_log_line_is_no_event_of_a_span() {
    let (mut exporter, _guard) = tracing(1.0);
    let (span, part, _) = arrived(&HeaderMap::new(), Some(&CALL));
    span.in_scope(|| tracing::error!("what an engine said"));
    part.event("of-ours");
    drop(part);
    let [call] = &exporter.ended()[..] else { panic!("one span") };
    let events: Vec<_> = call.events.iter().map(|event| event.name.as_ref()).collect();
    assert_eq!(events, ["of-ours"]);
    assert_eq!(call.status, Status::Unset);
}

#[tokio::test]
async fn a_library_that_only_asks_whether_it_would_be_heard_costs_no_span() {
    let config = to(Some("http://127.0.0.1:9"), 1.0);
    let (tracer, exporter) = collect(&config).unwrap().unzip();
    let dispatch = prepare(&log("debug"), tracer).unwrap();
    let _guard = set_default(&dispatch);
    assert!(tracing::enabled!(target: "a_library", tracing::Level::DEBUG), "a line would be");
    let (span, part, _) = arrived(&HeaderMap::new(), Some(&CALL));
    assert!(!span.is_disabled());
    drop(part);
    assert_eq!(exporter.unwrap().ended().len(), 1);
}

#[tokio::test]
async fn without_a_collector_there_are_no_spans_but_those_of_log_lines() {
    let (tracer, exporter) = collect(&to(None, 1.0)).unwrap().unzip();
    let dispatch = prepare(&log("trace"), tracer).unwrap();
    assert!(exporter.is_none());
    let _guard = set_default(&dispatch);
    let (span, part, id) = arrived(&parent(), Some(&CALL));
    // Its lines name the caller's trace all the same.
    assert_eq!(id, "4bf92f3577b34da6a3ce929d0e0e4736");
    assert!(!span.is_disabled());
    assert!(part.span().is_disabled() && carried(&part).is_empty());
    let _entered = span.enter();
    let asked = Part::ask(|| unreachable!("not even its name is made"));
    assert!(asked.span().is_disabled() && carried(&asked).is_empty());
}

#[test]
fn a_trace_is_taken_where_it_is_valid() {
    let read = |text: &str| {
        let headers = [("traceparent".parse().unwrap(), text.parse().unwrap())];
        trace_id(&HeaderMap::from_iter(headers)).to_owned()
    };
    let id = "4bf92f3577b34da6a3ce929d0e0e4736";
    assert_eq!(read(&format!("00-{id}-00f067aa0ba902b7-01")), id);
    let zero = "0".repeat(32);
    for wrong in ["", "x", id, &format!("00-{zero}-00f067aa0ba902b7-01"), "00-ab-cd-01"] {
        assert_eq!(read(wrong), "", "{wrong}");
    }
}
