//! A call's own span, which its log lines have and, where it is traced, the collector gets. What lives
//! as long as a service does is in no trace, and neither is what services tell each other on nobody's
//! behalf.

use hapa_core::access::{Access, Rpc};
use hapa_core::call::{BODY_ID, Call};
use hapa_telemetry::trace::{Part, Presented, name};
use http::HeaderMap;
use opentelemetry::Context;
use opentelemetry::propagation::TextMapPropagator as _;
use opentelemetry::trace::TraceContextExt as _;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tracing::Span;
use tracing::field::Empty;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

/// Its ids are in every line of the call, whatever level is asked for.
macro_rules! call_span {
    ($call:expr, $path:expr $(, $field:ident.$word:ident = $value:expr)*) => {
        tracing::error_span!(
            parent: None,
            "call",
            $($field.$word = $value,)*
            rpc = $path,
            request_id = %$call.request_id,
            trace_id = Empty,
            incident_id = Empty,
            { BODY_ID } = Empty
        )
    };
}

/// The span of a call that has come, the same as a part of its caller's trace, and the trace's id: also
/// where nobody traces here, as the caller may.
pub(crate) fn arrive(headers: &HeaderMap, call: &Call, path: &'static str) -> (Span, Part, String) {
    let (span, part) = match caller(headers, call.rpc) {
        Some(caller) => {
            let span = call_span!(call, path, otel.name = name(path), otel.kind = "server");
            // There is no layer that would know a caller where nobody collects.
            let is_traced = span.set_parent(caller).is_ok();
            let part = if is_traced { Part(span.clone()) } else { Part::default() };
            (span, part)
        }
        None => (call_span!(call, path), Part::default()),
    };
    if part.is_some() {
        part.set_rpc(path);
        part.set("hapa.request_id", call.request_id.to_string());
    }
    let mut id = part.id();
    if id.is_empty() {
        trace_id(headers).clone_into(&mut id);
    }
    if !id.is_empty() {
        span.record("trace_id", id.as_str());
    }
    (span, part, id)
}

/// Under what a call is traced, if it is.
fn caller(headers: &HeaderMap, rpc: Option<&'static Rpc>) -> Option<Context> {
    let rpc = rpc.filter(|rpc| rpc.access != Access::Public && !rpc.is_watch())?;
    let caller =
        TraceContextPropagator::new().extract_with_context(&Context::new(), &Presented(headers));
    let is_alone = rpc.access == Access::Mesh && !caller.span().span_context().is_valid();
    (!is_alone).then_some(caller)
}

/// The trace that a caller names, "" where it names none:
/// <https://www.w3.org/TR/trace-context/#traceparent-header>
fn trace_id(headers: &HeaderMap) -> &str {
    let value = headers.get("traceparent").and_then(|value| value.to_str().ok());
    let Some(parts) = value.map(|value| value.split('-').collect::<Vec<_>>()) else { return "" };
    let id = |text: &str, length| {
        let hex = |byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        text.len() == length && text.bytes().all(hex) && text.bytes().any(|byte| byte != b'0')
    };
    match parts[..] {
        // Later versions may have more parts.
        [version, trace, span, ..] if version.len() == 2 && id(trace, 32) && id(span, 16) => trace,
        _ => "",
    }
}

#[cfg(test)]
mod tests;
