//! Traces of calls: a server span per call, a client span per request to another service, and spans of handlers. They
//! are `tracing` spans, which the OpenTelemetry layer passes to the exporter.
//!
//! Attributes are names, counts and published words: never a prompt, an answer or a secret. Without a collector only
//! the spans of log lines exist.

use http::{HeaderMap, HeaderName, HeaderValue};
use opentelemetry::propagation::{Extractor, Injector, TextMapPropagator as _};
use opentelemetry::trace::{Status, TraceContextExt as _};
use opentelemetry::{Context, StringValue, Value};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::SdkTracer;
use tonic::Code;
use tracing::level_filters::LevelFilter;
use tracing::subscriber::Interest;
use tracing::{Metadata, Span, Subscriber};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::{FilterFn, dynamic_filter_fn, filter_fn};
use tracing_subscriber::registry::LookupSpan;

/// Target of the spans that log lines omit.
const TRACE_ONLY_TARGET: &str = "hapa::trace";
/// Field that marks the spans for a collector.
const KIND_FIELD: &str = "otel.kind";

/// An open span of a trace; disabled without a collector. Dropping it ends the span, even if other handles of the
/// `tracing` span exist.
#[derive(Debug)]
pub struct SpanHandle(pub Span);

/// The layer that passes spans to the tracer. It ignores events and the spans of libraries.
pub(crate) fn layer<S>(tracer: SdkTracer) -> impl Layer<S> + Send + Sync
where
    S: Subscriber + for<'s> LookupSpan<'s> + Send + Sync,
{
    // Return `sometimes`, not `always`: with `always`, per-layer filters cache the answer of `enabled` and apply it to
    // the next event (tracing-subscriber's FilterState).
    let interest = |metadata: &Metadata<'_>| {
        if is_traced(metadata) { Interest::sometimes() } else { Interest::never() }
    };
    let filter = dynamic_filter_fn(|metadata, _| is_traced(metadata))
        .with_callsite_filter(interest)
        .with_max_level_hint(LevelFilter::INFO);
    // `tracing` tracks the current span, so OpenTelemetry does not need its own context.
    tracing_opentelemetry::layer()
        .with_tracer(tracer)
        .with_context_activation(false)
        .with_location(false)
        .with_target(false)
        .with_threads(false)
        .with_tracked_inactivity(false)
        .with_filter(filter)
}

fn is_traced(metadata: &Metadata<'_>) -> bool {
    metadata.is_span() && metadata.fields().iter().any(|field| field.name() == KIND_FIELD)
}

/// The filter of log lines, which omits the spans that are only for traces.
pub(crate) fn log_filter() -> FilterFn<impl Fn(&Metadata<'_>) -> bool> {
    filter_fn(|metadata: &Metadata<'_>| metadata.target() != TRACE_ONLY_TARGET)
        .with_max_level_hint(LevelFilter::TRACE)
}

/// The trace context of a span; `None` if the span is not part of a trace.
pub fn trace_context(span: &Span) -> Option<Context> {
    let context = span.context();
    context.span().span_context().is_valid().then_some(context)
}

impl Default for SpanHandle {
    fn default() -> Self {
        SpanHandle(Span::none())
    }
}

impl SpanHandle {
    /// Starts a client span for a request to another service, on behalf of the current call. Disabled outside a call.
    #[must_use]
    pub fn client(name: impl FnOnce() -> String) -> SpanHandle {
        SpanHandle::client_under(&Span::current(), name)
    }

    /// Starts a client span under a span that need not be the current one.
    #[must_use]
    pub fn client_under(parent: &Span, name: impl FnOnce() -> String) -> SpanHandle {
        if trace_context(parent).is_none() {
            return SpanHandle::default();
        }
        let name = name();
        SpanHandle(tracing::info_span!(
            target: TRACE_ONLY_TARGET,
            parent: parent,
            "ask",
            otel.name = name.as_str(),
            otel.kind = "client"
        ))
    }

    /// The `tracing` span, as the parent of further spans.
    pub fn span(&self) -> &Span {
        &self.0
    }

    /// Whether the span is enabled.
    pub fn is_some(&self) -> bool {
        !self.0.is_disabled()
    }

    /// The trace id; "" if the span is disabled.
    pub fn id(&self) -> String {
        let id =
            trace_context(&self.0).map(|place| place.span().span_context().trace_id().to_string());
        id.unwrap_or_default()
    }

    /// Sets an attribute, with a name of the semantic conventions or of the mesh.
    pub fn set(&self, name: &'static str, value: impl Into<Value>) {
        self.0.set_attribute(name, value);
    }

    /// Sets the attributes of the RPC at `path`.
    pub fn set_rpc(&self, path: &str) {
        let (service, method) = span_name(path).split_once('/').unwrap_or((path, ""));
        self.set("rpc.system", "grpc");
        self.set("rpc.service", service.to_owned());
        self.set("rpc.method", method.to_owned());
    }

    /// Sets an attribute with a list of values.
    pub fn set_list(&self, name: &'static str, values: &[&str]) {
        if self.is_some() {
            let values: Vec<StringValue> =
                values.iter().map(|value| (*value).to_owned().into()).collect();
            self.set(name, Value::Array(values.into()));
        }
    }

    /// Sets the address of the peer: `host:port`.
    pub fn set_server(&self, address: &str) {
        if !self.is_some() {
            return;
        }
        let (host, port) = address.rsplit_once(':').unwrap_or((address, ""));
        self.set("server.address", host.to_owned());
        if let Ok(port) = port.parse::<i64>() {
            self.set("server.port", port);
        }
    }

    /// Adds an event at the current time.
    pub fn event(&self, name: &'static str) {
        self.0.add_event(name, Vec::new());
    }

    /// Marks the span as failed. `kind` must come from a short list.
    pub fn fail(&self, kind: impl Into<String>, description: &'static str) {
        if self.is_some() {
            self.set("error.type", kind.into());
            self.0.set_status(Status::error(description));
        }
    }

    /// Writes the trace context to the headers of a request, so that the peer continues the trace.
    pub fn inject(&self, headers: &mut HeaderMap) {
        if let Some(place) = trace_context(&self.0) {
            TraceContextPropagator::new().inject_context(&place, &mut HeaderInjector(headers));
        }
    }
}

impl Drop for SpanHandle {
    fn drop(&mut self) {
        // `tracing` closes a span with its last handle, which may be much later.
        if let Some(place) = trace_context(&self.0) {
            place.span().end();
        }
    }
}

/// The span name of an RPC path, such as `hapa.codegen.v1.CodegenService/GenerateCode`.
pub fn span_name(path: &str) -> &str {
    path.trim_start_matches('/')
}

/// Whether a status marks a server span as failed, by the semantic conventions. Errors of the client do not.
pub fn is_server_error(code: Code) -> bool {
    matches!(
        code,
        Code::Unknown
            | Code::DeadlineExceeded
            | Code::Unimplemented
            | Code::Internal
            | Code::Unavailable
            | Code::DataLoss
    )
}

/// Extracts the trace context from the headers of a request.
#[derive(Debug)]
pub struct HeaderExtractor<'h>(pub &'h HeaderMap);

impl Extractor for HeaderExtractor<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).and_then(|value| value.to_str().ok())
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(HeaderName::as_str).collect()
    }
}

struct HeaderInjector<'h>(&'h mut HeaderMap);

impl Injector for HeaderInjector<'_> {
    fn set(&mut self, key: &str, value: String) {
        // An empty `tracestate` must not be sent.
        if let (Ok(name), Ok(value), false) =
            (HeaderName::try_from(key), HeaderValue::from_str(&value), value.is_empty())
        {
            self.0.insert(name, value);
        }
    }
}
