//! The span of a response, with OpenTelemetry's attribute names for generative AI. It contains names and
//! counts, never a prompt, a response or an engine's own text.

use hapa_core::rpc_error::RpcError;
use hapa_telemetry::trace::SpanHandle;

use crate::request::task::Sampling;
use crate::upstream::engine::Operation;

/// Starts a span below the span of the current call. It covers all attempts, from the first request to
/// an engine to the end of the response.
pub(crate) fn start(operation: Operation, model: &str, sampling: Sampling) -> SpanHandle {
    let name = operation.otel_name();
    let span = SpanHandle::client(|| format!("{name} {model}"));
    span.set("gen_ai.operation.name", name);
    // The protocol of the engines, independent of their vendor.
    span.set("gen_ai.provider.name", "openai");
    span.set("gen_ai.request.model", model.to_owned());
    span.set("gen_ai.request.max_tokens", i64::from(sampling.max_tokens));
    span.set("gen_ai.request.temperature", sampling.temperature);
    span.set("gen_ai.request.top_p", sampling.top_p);
    span
}

/// `model` must be the requested model or one that the engine lists.
pub(crate) fn set_response_model(span: &SpanHandle, model: String) {
    span.set("gen_ai.response.model", model);
}

pub(crate) fn record_first_token(span: &SpanHandle) {
    span.event("gen_ai.first_token");
}

/// One finish reason for each choice.
pub(crate) fn set_finish_reasons(span: &SpanHandle, reasons: &[&str]) {
    span.set_list("gen_ai.response.finish_reasons", reasons);
}

pub(crate) fn set_usage(span: &SpanHandle, prompt_tokens: u32, response_tokens: u32) {
    span.set("gen_ai.usage.input_tokens", i64::from(prompt_tokens));
    span.set("gen_ai.usage.output_tokens", i64::from(response_tokens));
}

/// Records the error that the client receives.
pub(crate) fn record_error(span: &SpanHandle, error: &RpcError) {
    span.set("hapa.incident_id", error.incident_id().to_owned());
    span.fail(error.code().to_string(), error.code().entry().meaning);
}
