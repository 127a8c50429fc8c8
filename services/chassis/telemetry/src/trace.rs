//! A call's trace, as OpenTelemetry has it: one span where it arrives, one for each question to another
//! service, and those that handlers make of their work. They are spans of `tracing`, under the one in
//! which they are made, and its OpenTelemetry layer sends them to a collector. Attributes are names,
//! counts and published words: never a prompt, an answer or a secret. Without a collector there are no
//! spans but those of log lines.

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

/// The target of the spans that no log line has.
const TARGET: &str = "hapa::trace";
/// The field of the spans that are for a collector.
const KIND: &str = "otel.kind";

/// An open span of a trace; none where nobody traces. Dropping it ends it, whoever else still holds
/// the span.
#[derive(Debug)]
pub struct Part(pub Span);

/// What makes spans those of a trace. It takes none of a library, and no log line.
pub fn layer<S>(tracer: SdkTracer) -> impl Layer<S> + Send + Sync
where
    S: Subscriber + for<'s> LookupSpan<'s> + Send + Sync,
{
    // Never `always`: a filter that is asked only whether it would hear something keeps that answer for
    // what comes next, unless it is asked of that too.
    let interest =
        |of: &Metadata<'_>| if is_ours(of) { Interest::sometimes() } else { Interest::never() };
    let filter = dynamic_filter_fn(|of, _| is_ours(of))
        .with_callsite_filter(interest)
        .with_max_level_hint(LevelFilter::INFO);
    // The current span is that of `tracing`: OpenTelemetry need keep none of its own.
    tracing_opentelemetry::layer()
        .with_tracer(tracer)
        .with_context_activation(false)
        .with_location(false)
        .with_target(false)
        .with_threads(false)
        .with_tracked_inactivity(false)
        .with_filter(filter)
}

fn is_ours(of: &Metadata<'_>) -> bool {
    of.is_span() && of.fields().iter().any(|field| field.name() == KIND)
}

/// What of it all is for log lines, whatever their level.
pub fn loggable() -> FilterFn<impl Fn(&Metadata<'_>) -> bool> {
    filter_fn(|of: &Metadata<'_>| of.target() != TARGET).with_max_level_hint(LevelFilter::TRACE)
}

/// The place in a trace that a span has; none where it is in none.
pub fn place(span: &Span) -> Option<Context> {
    let context = span.context();
    context.span().span_context().is_valid().then_some(context)
}

impl Default for Part {
    fn default() -> Self {
        Part(Span::none())
    }
}

impl Part {
    /// A question to someone else on behalf of the call that runs here, from now until it is dropped.
    /// What no call is behind has none.
    #[must_use]
    pub fn ask(name: impl FnOnce() -> String) -> Part {
        Part::ask_under(&Span::current(), name)
    }

    /// The same under a span that need not be the current one.
    #[must_use]
    pub fn ask_under(parent: &Span, name: impl FnOnce() -> String) -> Part {
        if place(parent).is_none() {
            return Part::default();
        }
        let name = name();
        Part(tracing::info_span!(
            target: TARGET,
            parent: parent,
            "ask",
            otel.name = name.as_str(),
            otel.kind = "client"
        ))
    }

    /// The span under which those of its own are made.
    pub fn span(&self) -> &Span {
        &self.0
    }

    /// Whether there is one.
    pub fn is_some(&self) -> bool {
        !self.0.is_disabled()
    }

    /// The id of its trace; "" where there is none.
    pub fn id(&self) -> String {
        let id = place(&self.0).map(|place| place.span().span_context().trace_id().to_string());
        id.unwrap_or_default()
    }

    /// Says something about it, under a name of the semantic conventions or of our own.
    pub fn set(&self, name: &'static str, value: impl Into<Value>) {
        self.0.set_attribute(name, value);
    }

    /// Says which RPC it is of.
    pub fn set_rpc(&self, path: &str) {
        let (service, method) = name(path).split_once('/').unwrap_or((path, ""));
        self.set("rpc.system", "grpc");
        self.set("rpc.service", service.to_owned());
        self.set("rpc.method", method.to_owned());
    }

    /// Says which of several there were.
    pub fn set_list(&self, name: &'static str, values: &[&str]) {
        if self.is_some() {
            let values: Vec<StringValue> =
                values.iter().map(|value| (*value).to_owned().into()).collect();
            self.set(name, Value::Array(values.into()));
        }
    }

    /// Says where the other end is: `host:port`.
    pub fn set_server(&self, place: &str) {
        if !self.is_some() {
            return;
        }
        let (host, port) = place.rsplit_once(':').unwrap_or((place, ""));
        self.set("server.address", host.to_owned());
        if let Ok(port) = port.parse::<i64>() {
            self.set("server.port", port);
        }
    }

    /// Something happened now.
    pub fn event(&self, name: &'static str) {
        self.0.add_event(name, Vec::new());
    }

    /// It failed: a word from a short list, and fixed words.
    pub fn fail(&self, kind: impl Into<String>, words: &'static str) {
        if self.is_some() {
            self.set("error.type", kind.into());
            self.0.set_status(Status::error(words));
        }
    }

    /// Lets whoever is asked go on with the trace.
    pub fn carry(&self, headers: &mut HeaderMap) {
        if let Some(place) = place(&self.0) {
            TraceContextPropagator::new().inject_context(&place, &mut Carried(headers));
        }
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        // `tracing` closes a span with the last that holds it, which may be much later.
        if let Some(place) = place(&self.0) {
            place.span().end();
        }
    }
}

/// `hapa.codegen.v1.CodegenService/GenerateCode`.
pub fn name(path: &str) -> &str {
    path.trim_start_matches('/')
}

/// Whether a server says of itself that it failed, as the semantic conventions have it: what its
/// caller did wrong is the caller's failure alone.
pub fn is_servers_failure(code: Code) -> bool {
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

pub struct Presented<'h>(pub &'h HeaderMap);

impl Extractor for Presented<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).and_then(|value| value.to_str().ok())
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(HeaderName::as_str).collect()
    }
}

struct Carried<'h>(&'h mut HeaderMap);

impl Injector for Carried<'_> {
    fn set(&mut self, key: &str, value: String) {
        // An empty state is none.
        if let (Ok(name), Ok(value), false) =
            (HeaderName::try_from(key), HeaderValue::from_str(&value), value.is_empty())
        {
            self.0.insert(name, value);
        }
    }
}
