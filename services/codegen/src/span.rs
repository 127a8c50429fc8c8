//! The span of an answer, in the names that OpenTelemetry has for generative models. It tells what was
//! asked for and what came of it in names and counts: never a prompt, an answer or an engine's words.

use hapa_core::rpc_error::Fault;
use hapa_telemetry::trace::Part;

use crate::engine::Ask;
use crate::task::Sampling;

/// From the question to an engine to the end of its answer, with all that is asked again; in the trace
/// of the call that runs here.
pub(crate) fn begin(ask: Ask, model: &str, sampling: Sampling) -> Part {
    let operation = ask.operation();
    let part = Part::ask(|| format!("{operation} {model}"));
    part.set("gen_ai.operation.name", operation);
    // The protocol that engines speak, whoever they are.
    part.set("gen_ai.provider.name", "openai");
    part.set("gen_ai.request.model", model.to_owned());
    part.set("gen_ai.request.max_tokens", i64::from(sampling.max_tokens));
    part.set("gen_ai.request.temperature", sampling.temperature);
    part.set("gen_ai.request.top_p", sampling.top_p);
    part
}

/// The model that answers, as the engine names it: one that was asked for or that it lists.
pub(crate) fn answers(part: &Part, model: String) {
    part.set("gen_ai.response.model", model);
}

/// The first token has come.
pub(crate) fn first_token(part: &Part) {
    part.event("gen_ai.first_token");
}

/// Why each of its answers is whole.
pub(crate) fn finished(part: &Part, reasons: &[&str]) {
    part.set_list("gen_ai.response.finish_reasons", reasons);
}

/// What was used, as far as it is known.
pub(crate) fn used(part: &Part, prompt: u32, answer: u32) {
    part.set("gen_ai.usage.input_tokens", i64::from(prompt));
    part.set("gen_ai.usage.output_tokens", i64::from(answer));
}

/// It ended as it was shown to the caller.
pub(crate) fn failed(part: &Part, fault: &Fault) {
    part.set("hapa.incident_id", fault.incident_id().to_owned());
    part.fail(fault.code().to_string(), fault.code().entry().meaning);
}
