//! A call's trace, as OpenTelemetry has it: one span where it arrives, one for each question to another
//! service, and those that handlers make of their work. Attributes are names, counts and published
//! words: never a prompt, an answer or a secret. Without a collector there are no spans, and no cost.

mod export;
mod wire;

use std::fmt::{self, Debug, Formatter};
use std::sync::Arc;

use http::{HeaderMap, HeaderName, HeaderValue};
use opentelemetry::propagation::{Extractor, Injector, TextMapPropagator as _};
use opentelemetry::trace::{SpanKind, Status, TraceContextExt as _, Tracer as _};
use opentelemetry::{Context, KeyValue, Value};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::SdkTracer;
use tonic::Code;

use crate::rpc::{Access, Rpc};

pub(crate) use export::{Exporter, Tracing};
pub use wire::Traced;

tokio::task_local! {
    static CURRENT: Trace;
}

/// A place in a trace, under which spans are made; none where nobody traces.
#[derive(Clone, Default)]
pub struct Trace(Option<Arc<Place>>);

struct Place {
    tracer: SdkTracer,
    context: Context,
}

/// An open span. Dropping it ends it.
#[derive(Debug, Default)]
pub struct Part(Trace);

impl Trace {
    /// The trace of the call on whose behalf this runs.
    pub(crate) fn current() -> Trace {
        CURRENT.try_with(Trace::clone).unwrap_or_default()
    }

    /// Runs a future of this call: what it asks other services is under this place.
    pub async fn around<T>(&self, future: impl Future<Output = T>) -> T {
        if self.0.is_none() {
            return future.await;
        }
        CURRENT.scope(self.clone(), future).await
    }

    /// Runs a piece of this call that does not wait.
    pub(crate) fn within<T>(&self, piece: impl FnOnce() -> T) -> T {
        if self.0.is_none() {
            return piece();
        }
        CURRENT.sync_scope(self.clone(), piece)
    }

    /// A question to someone else, from now until it is dropped.
    #[must_use]
    pub fn ask(&self, name: impl FnOnce() -> String) -> Part {
        let Some(place) = &self.0 else { return Part::default() };
        let builder = place.tracer.span_builder(name()).with_kind(SpanKind::Client);
        let span = place.tracer.build_with_context(builder, &place.context);
        let context = Context::new().with_span(span);
        Part(Trace(Some(Arc::new(Place { tracer: place.tracer.clone(), context }))))
    }
}

impl Part {
    /// The place under which spans of its own are made.
    pub fn trace(&self) -> &Trace {
        &self.0
    }

    /// The id of its trace; "" where there is none.
    pub(crate) fn id(&self) -> String {
        let place = self.0.0.as_ref();
        let id = place.map(|place| place.context.span().span_context().trace_id().to_string());
        id.unwrap_or_default()
    }

    /// Says something about it, under a name of the semantic conventions or of our own.
    pub fn set(&self, name: &'static str, value: impl Into<Value>) {
        if let Some(context) = self.recorded() {
            context.span().set_attribute(KeyValue::new(name, value));
        }
    }

    /// Says several things about it.
    fn set_all(&self, attributes: Vec<KeyValue>) {
        if let Some(context) = self.recorded() {
            context.span().set_attributes(attributes);
        }
    }

    /// Says which of several there were.
    pub fn set_list(&self, name: &'static str, values: &[&str]) {
        if let Some(context) = self.recorded() {
            let values: Vec<opentelemetry::StringValue> =
                values.iter().map(|value| (*value).to_owned().into()).collect();
            context.span().set_attribute(KeyValue::new(name, Value::Array(values.into())));
        }
    }

    /// Says where the other end is: `host:port`.
    pub fn set_server(&self, place: &str) {
        if self.recorded().is_none() {
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
        if let Some(context) = self.recorded() {
            context.span().add_event(name, Vec::new());
        }
    }

    /// It failed: a word from a short list, and fixed words.
    pub fn fail(&self, kind: impl Into<String>, words: &'static str) {
        if let Some(context) = self.recorded() {
            context.span().set_attribute(KeyValue::new("error.type", kind.into()));
            context.span().set_status(Status::error(words));
        }
    }

    /// Lets whoever is asked go on with the trace.
    pub fn carry(&self, headers: &mut HeaderMap) {
        if let Some(place) = &self.0.0 {
            TraceContextPropagator::new().inject_context(&place.context, &mut Carried(headers));
        }
    }

    fn recorded(&self) -> Option<&Context> {
        let place = self.0.0.as_ref()?;
        Some(&place.context).filter(|context| context.span().is_recording())
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        if let Some(place) = &self.0.0 {
            place.context.span().end();
        }
    }
}

impl Tracing {
    /// A call's own span, under that of its caller. What lives as long as a service does has none,
    /// and neither has what services tell each other on nobody's behalf.
    pub(crate) fn arrive(&self, headers: &HeaderMap, rpc: Option<&'static Rpc>) -> Part {
        let (Some(tracer), Some(rpc)) = (&self.tracer, rpc) else { return Part::default() };
        let caller = TraceContextPropagator::new()
            .extract_with_context(&Context::new(), &Presented(headers));
        let has_caller = caller.span().span_context().is_valid();
        let alone = rpc.access == Access::Mesh && !has_caller;
        if alone || rpc.access == Access::Public || rpc.is_watch() {
            return Part::default();
        }
        let builder = tracer.span_builder(name(rpc.path)).with_kind(SpanKind::Server);
        let builder = builder.with_attributes(rpc_attributes(rpc.path));
        let span = tracer.build_with_context(builder, &caller);
        let context = Context::new().with_span(span);
        Part(Trace(Some(Arc::new(Place { tracer: tracer.clone(), context }))))
    }
}

/// `hapa.codegen.v1.CodegenService/GenerateCode`.
fn name(path: &str) -> String {
    path.trim_start_matches('/').to_owned()
}

fn rpc_attributes(path: &str) -> Vec<KeyValue> {
    let (service, method) = path.trim_start_matches('/').split_once('/').unwrap_or((path, ""));
    vec![
        KeyValue::new("rpc.system", "grpc"),
        KeyValue::new("rpc.service", service.to_owned()),
        KeyValue::new("rpc.method", method.to_owned()),
    ]
}

/// Whether a server says of itself that it failed, as the semantic conventions have it: what its
/// caller did wrong is the caller's failure alone.
pub(crate) fn is_servers_failure(code: Code) -> bool {
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

struct Presented<'h>(&'h HeaderMap);

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

impl Debug for Trace {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "Trace" } else { "no Trace" })
    }
}

#[cfg(test)]
mod tests;
