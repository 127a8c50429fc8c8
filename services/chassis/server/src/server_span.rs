//! The server span of a call: its log lines carry it and, if the call is traced, the exporter sends it.
//!
//! Streams that live as long as a service, and calls between services that no user's call caused, are not traced.

use hapa_core::access::{Access, Rpc};
use hapa_core::call::{BODY_REQUEST_ID_FIELD, Call};
use hapa_telemetry::trace::{HeaderExtractor, SpanHandle, span_name};
use http::HeaderMap;
use opentelemetry::Context;
use opentelemetry::propagation::TextMapPropagator as _;
use opentelemetry::trace::TraceContextExt as _;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tracing::Span;
use tracing::field::Empty;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

/// The level is ERROR so that the ids are in every log line of the call, whatever LOG_LEVEL is.
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
            { BODY_REQUEST_ID_FIELD } = Empty
        )
    };
}

/// The span of one call.
pub(crate) struct ServerSpan {
    /// The span of its log lines.
    pub(crate) span: Span,
    /// The same span, as a part of the caller's trace; inert if the call is not traced.
    pub(crate) part: SpanHandle,
    /// The id of the trace, also if only the caller traces; "" without one.
    pub(crate) trace_id: String,
}

/// Starts the span of a call, below the span of its caller if the headers name one.
pub(crate) fn start_server_span(
    headers: &HeaderMap,
    call: &Call,
    path: &'static str,
) -> ServerSpan {
    let (span, part) = match trace_parent(headers, call.rpc) {
        Some(parent) => {
            let span = call_span!(call, path, otel.name = span_name(path), otel.kind = "server");
            // It fails if no exporter is configured.
            let is_traced = span.set_parent(parent).is_ok();
            let part = if is_traced { SpanHandle(span.clone()) } else { SpanHandle::default() };
            (span, part)
        }
        None => (call_span!(call, path), SpanHandle::default()),
    };
    if part.is_some() {
        part.set_rpc(path);
        part.set("hapa.request_id", call.request_id.to_string());
    }
    let mut trace_id = part.id();
    if trace_id.is_empty() {
        trace_id_of(headers).clone_into(&mut trace_id);
    }
    if !trace_id.is_empty() {
        span.record("trace_id", trace_id.as_str());
    }
    ServerSpan { span, part, trace_id }
}

/// The parent of the call's span; `None` if the call is not traced.
fn trace_parent(headers: &HeaderMap, rpc: Option<&'static Rpc>) -> Option<Context> {
    let rpc = rpc.filter(|rpc| rpc.access != Access::NoAuth && !rpc.is_watch())?;
    let parent = TraceContextPropagator::new()
        .extract_with_context(&Context::new(), &HeaderExtractor(headers));
    let is_untraced = rpc.access == Access::Service && !parent.span().span_context().is_valid();
    (!is_untraced).then_some(parent)
}

/// The trace id in the headers; "" if they have none:
/// <https://www.w3.org/TR/trace-context/#traceparent-header>
fn trace_id_of(headers: &HeaderMap) -> &str {
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
