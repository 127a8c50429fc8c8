//! The JSON and text that vLLM 0.32 sends, field by field.
//!
//! Invariants: names, order and nulls are those of vLLM. It omits unset fields in chunks, and adds
//! the fingerprint only to the last one. This module depends neither on scripts nor on sockets.

use std::fmt::Write as _;
use std::io::Write as _;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::Setup;
use super::ledger::{Counts, Totals};
use super::request::{Api, GenerationRequest};

const FINGERPRINT: &str = "vllm-0.32.0-sim";

/// The reasons by which vLLM counts successes.
const REASONS: [&str; 5] = ["stop", "length", "abort", "error", "repetition"];

/// The number of sequences that the simulated cache can hold.
const MAX_SEQUENCES: f64 = 256.0;

/// The reported tokens of prompt and answer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Usage {
    pub(super) prompt: u64,
    pub(super) completion: u64,
}

impl Usage {
    fn json(self) -> String {
        let Self { prompt, completion } = self;
        let total = prompt + completion;
        format!(
            r#"{{"prompt_tokens":{prompt},"total_tokens":{total},"completion_tokens":{completion}}}"#
        )
    }
}

/// A choice in a completion's chunk.
#[derive(Clone, Copy, Debug)]
pub(super) struct ChoicePiece<'a> {
    pub(super) index: usize,
    pub(super) text: &'a str,
    pub(super) logprob: Option<f64>,
    pub(super) finish: Option<&'static str>,
}

/// Writes the chunks of one stream. Their common part is encoded once.
#[derive(Debug)]
pub(super) struct ChunkWriter {
    open: String,
    prompt: u64,
    include_usage: bool,
    continuous_usage: bool,
}

impl ChunkWriter {
    pub(super) fn new(request: &GenerationRequest) -> Self {
        let object = match request.api {
            Api::Chat => "chat.completion.chunk",
            Api::Completion { .. } => "text_completion",
        };
        let open = format!(
            r#"{{"id":{},"object":"{object}","created":{},"model":{},"choices":["#,
            Value::from(request.id.as_str()),
            now(),
            Value::from(request.model.as_str()),
        );
        Self {
            open,
            prompt: request.prompt_tokens,
            include_usage: request.include_usage,
            continuous_usage: request.continuous_usage,
        }
    }

    pub(super) fn role(&self, into: &mut Vec<u8>) {
        into.extend_from_slice(self.open.as_bytes());
        into.extend_from_slice(br#"{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],"prompt_token_ids":null,"prompt_text":null"#);
        self.close(0, into);
    }

    /// `field` is the field of the delta, `json` the token's text as a JSON string, and `sent` the number of tokens
    /// including this one.
    pub(super) fn token(&self, field: &str, json: &str, sent: u64, into: &mut Vec<u8>) {
        into.extend_from_slice(self.open.as_bytes());
        into.extend_from_slice(br#"{"index":0,"delta":{""#);
        into.extend_from_slice(field.as_bytes());
        into.extend_from_slice(br#"":"#);
        into.extend_from_slice(json.as_bytes());
        into.extend_from_slice(br#"},"logprobs":null,"finish_reason":null,"token_ids":null}]"#);
        self.close(sent, into);
    }

    pub(super) fn finish(&self, reason: &str, sent: u64, into: &mut Vec<u8>) {
        let reason = Value::from(reason);
        into.extend_from_slice(self.open.as_bytes());
        let _ = write!(
            into,
            r#"{{"index":0,"delta":{{"content":""}},"logprobs":null,"finish_reason":{reason},"stop_reason":null,"token_ids":null}}]"#
        );
        if !self.include_usage {
            let _ = write!(into, r#","system_fingerprint":"{FINGERPRINT}""#);
        }
        self.close(sent, into);
    }

    /// A piece of a completion's choice. `sent` is the number of tokens including this one. The last piece has a
    /// finish reason.
    pub(super) fn choice(&self, piece: &ChoicePiece<'_>, sent: u64, into: &mut Vec<u8>) {
        let ChoicePiece { index, text, logprob, finish } = *piece;
        let logprobs = logprob.map(|logprob| {
            json!({
                "text_offset": [0], "token_logprobs": [logprob], "tokens": [text],
                "top_logprobs": [{text: logprob}],
            })
        });
        let choice = json!({
            "index": index, "text": text, "logprobs": logprobs, "finish_reason": finish,
            "stop_reason": null, "token_ids": null,
        });
        into.extend_from_slice(self.open.as_bytes());
        let _ = write!(into, "{choice}]");
        self.close(sent, into);
    }

    pub(super) fn usage(&self, usage: Usage, into: &mut Vec<u8>) {
        into.extend_from_slice(self.open.as_bytes());
        let _ =
            write!(into, r#"],"usage":{},"system_fingerprint":"{FINGERPRINT}"}}"#, usage.json());
    }

    fn close(&self, completion: u64, into: &mut Vec<u8>) {
        if self.continuous_usage {
            let usage = Usage { prompt: self.prompt, completion };
            let _ = write!(into, r#","usage":{}"#, usage.json());
        }
        into.push(b'}');
    }
}

/// A whole answer, for `stream: false`.
pub(super) fn completion(
    request: &GenerationRequest,
    text: &str,
    finish: Option<&str>,
    usage: Option<Usage>,
) -> Value {
    let usage = usage.map(|Usage { prompt, completion }| {
        json!({
            "prompt_tokens": prompt, "total_tokens": prompt + completion,
            "completion_tokens": completion, "prompt_tokens_details": null,
        })
    });
    json!({
        "id": request.id, "object": "chat.completion", "created": now(), "model": request.model,
        "choices": [{
            "index": 0,
            "message": {
                "role": "assistant", "content": text, "refusal": null, "annotations": null,
                "audio": null, "function_call": null, "tool_calls": [], "reasoning": null,
            },
            "logprobs": null, "finish_reason": finish, "stop_reason": null, "token_ids": null,
        }],
        "service_tier": null, "system_fingerprint": FINGERPRINT, "usage": usage,
        "prompt_logprobs": null, "prompt_token_ids": null, "kv_transfer_params": null,
    })
}

/// A whole answer to a completion, with the text and finish reason of each choice.
pub(super) fn text_completion(
    request: &GenerationRequest,
    choices: impl Iterator<Item = (String, Option<&'static str>)>,
    usage: Option<Usage>,
) -> Value {
    let choices: Vec<_> = choices
        .enumerate()
        .map(|(index, (text, finish))| {
            json!({
                "index": index, "text": text, "logprobs": null, "finish_reason": finish,
                "stop_reason": null, "token_ids": null, "prompt_logprobs": null,
            })
        })
        .collect();
    let usage = usage.map(|Usage { prompt, completion }| {
        json!({
            "prompt_tokens": prompt, "total_tokens": prompt + completion,
            "completion_tokens": completion, "prompt_tokens_details": null,
        })
    });
    json!({
        "id": request.id, "object": "text_completion", "created": now(), "model": request.model,
        "choices": choices, "service_tier": null, "system_fingerprint": FINGERPRINT,
        "usage": usage, "kv_transfer_params": null,
    })
}

/// An error, with the type that vLLM names for this status.
pub(super) fn error(status: u16, message: &str, param: Option<&str>) -> Value {
    let kind = match status {
        400 => "BadRequestError",
        404 => "NotFoundError",
        429 => "Too Many Requests",
        500 => "InternalServerError",
        503 => "Service Unavailable",
        _ => "Error",
    };
    json!({"error": {"message": message, "type": kind, "param": param, "code": status}})
}

/// The error for a body that is not a request. Its type has a space.
pub(super) fn bad_request(message: &str, param: Option<&str>) -> Value {
    json!({"error": {"message": message, "type": "Bad Request", "param": param, "code": 400}})
}

/// The error for a missing credential: a string instead of an object.
pub(super) fn unauthorized() -> Value {
    json!({"error": "Unauthorized"})
}

/// `GET /v1/models`: adapters have a parent and no length of their own.
pub(super) fn models(setup: &Setup, adapters: &[String]) -> Value {
    let card = |id: &str, parent: Option<&str>, length: Option<usize>| {
        json!({
            "id": id, "object": "model", "created": now(), "owned_by": "vllm", "root": id,
            "parent": parent, "max_model_len": length, "permission": [],
        })
    };
    let base = card(&setup.model, None, Some(setup.max_model_len));
    let adapters = adapters.iter().map(|id| card(id, Some(&setup.model), None));
    let data: Vec<Value> = std::iter::once(base).chain(adapters).collect();
    json!({"object": "list", "data": data})
}

/// `GET /metrics`, with the numbers of this simulator.
pub(super) fn metrics(model: &str, counts: Counts, totals: &Totals) -> String {
    let waiting = counts.waiting;
    let running = u32::try_from(counts.in_flight() - waiting).unwrap_or(u32::MAX);
    let cache = (f64::from(running) / MAX_SEQUENCES).min(1.0);
    let labels = format!(r#"engine="0",model_name="{model}""#);
    let mut page = String::new();
    let mut family = |kind: &str, name: &str, values: &[(&str, String)]| {
        let _ = writeln!(page, "# HELP vllm:{name} See vLLM.\n# TYPE vllm:{name} {kind}");
        for (more, value) in values {
            let _ = writeln!(page, "vllm:{name}{{{labels}{more}}} {value}");
        }
    };
    family("gauge", "num_requests_running", &[("", running.to_string())]);
    family("gauge", "num_requests_waiting", &[("", waiting.to_string())]);
    family("gauge", "kv_cache_usage_perc", &[("", cache.to_string())]);
    family("counter", "prompt_tokens_total", &[("", totals.prompt_tokens.to_string())]);
    family("counter", "generation_tokens_total", &[("", counts.tokens_sent.to_string())]);
    let reasons = REASONS.map(|reason| {
        let count = totals.succeeded.get(reason).unwrap_or(&0);
        (format!(r#",finished_reason="{reason}""#), count.to_string())
    });
    let reasons: Vec<_> = reasons.iter().map(|(label, n)| (label.as_str(), n.clone())).collect();
    family("counter", "request_success_total", &reasons);
    let adapters: Vec<_> = totals.running.keys().filter(|name| *name != model).cloned().collect();
    let _ = writeln!(
        page,
        "# HELP vllm:lora_requests_info See vLLM.\n# TYPE vllm:lora_requests_info gauge\n\
         vllm:lora_requests_info{{max_lora=\"4\",running_lora_adapters=\"{}\",\
         waiting_lora_adapters=\"\"}} {}.0",
        adapters.join(","),
        now(),
    );
    page
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
