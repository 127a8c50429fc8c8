//! Parses a generation request, or returns the refusal.
//!
//! Invariants: the checks have vLLM's order (credential, content type, shape, model, length) and vLLM's
//! texts. Unknown fields are accepted and ignored, as vLLM does.

use serde_json::Value;

use super::http::{Request, Response};
use super::{Shared, shapes};

pub(super) const CHAT: &str = "/v1/chat/completions";
pub(super) const COMPLETE: &str = "/v1/completions";

/// Characters of a prompt that count as one token.
const CHARS_PER_TOKEN: usize = 4;

/// The limit of vLLM.
const MAX_STOP_SEQUENCES: usize = 4;
/// vLLM's default `max_tokens` of a completion.
const DEFAULT_MAX_TOKENS: usize = 16;

/// The two APIs for generations.
#[derive(Clone, Debug)]
pub(super) enum Api {
    Chat,
    Completion { choices: usize, logprobs: bool, stop: Vec<String> },
}

#[derive(Debug)]
pub(super) struct GenerationRequest {
    /// The called API.
    pub(super) api: Api,
    pub(super) id: String,
    pub(super) model: String,
    pub(super) stream: bool,
    pub(super) include_usage: bool,
    pub(super) continuous_usage: bool,
    pub(super) max_tokens: Option<usize>,
    pub(super) prompt_tokens: u64,
}

impl GenerationRequest {
    pub(super) fn read(shared: &Shared, request: &Request, body: &Value) -> Result<Self, Response> {
        if !authorized(shared, request) {
            return Err(Response::json(401, &shapes::unauthorized()));
        }
        let stream = check_shape(request, body)?;
        let api = if request.path == CHAT { Api::Chat } else { completion(body)? };
        let model = match &body["model"] {
            Value::String(name) => name,
            _ => &shared.setup.model,
        };
        if !shared.serves(model) {
            let message = format!("The model `{model}` does not exist.");
            return Err(Response::json(404, &shapes::error(404, &message, Some("model"))));
        }
        let max_tokens = ["max_completion_tokens", "max_tokens"]
            .iter()
            .find_map(|name| usize::try_from(body[*name].as_u64()?).ok());
        let max_tokens = match api {
            Api::Chat => max_tokens,
            Api::Completion { .. } => max_tokens.or(Some(DEFAULT_MAX_TOKENS)),
        };
        let prompt_tokens = prompt_chars(body).div_ceil(CHARS_PER_TOKEN);
        check_length(shared.setup.max_model_len, prompt_tokens, max_tokens)?;
        let include_usage = body["stream_options"]["include_usage"] == true;
        Ok(Self {
            id: id(shared, request, &api),
            api,
            model: model.clone(),
            stream,
            include_usage,
            // vLLM applies it only together with include_usage.
            continuous_usage: include_usage
                && body["stream_options"]["continuous_usage_stats"] == true,
            max_tokens,
            prompt_tokens: prompt_tokens as u64,
        })
    }
}

/// Whether the request has the credential for `/v1`.
pub(super) fn authorized(shared: &Shared, request: &Request) -> bool {
    let Some(key) = &shared.setup.api_key else { return true };
    let presented = request.header("authorization").and_then(|value| value.split_once(' '));
    presented.is_some_and(|(scheme, token)| scheme.eq_ignore_ascii_case("bearer") && token == key)
}

/// Returns whether a stream is requested.
fn check_shape(request: &Request, body: &Value) -> Result<bool, Response> {
    let bad = |message: &str, param| Response::json(400, &shapes::bad_request(message, param));
    let kind = request.header("content-type").unwrap_or_default();
    if !kind.to_ascii_lowercase().starts_with("application/json") {
        return Err(bad("Unsupported Media Type: Only 'application/json' is allowed", None));
    }
    if !body.is_object() {
        return Err(bad("The body is not a JSON object: JSON decode error", None));
    }
    if request.path == CHAT && !body["messages"].is_array() {
        return Err(bad("messages: a list of messages is required", Some("messages")));
    }
    let stream = match &body["stream"] {
        Value::Null => false,
        Value::Bool(stream) => *stream,
        _ => return Err(bad("stream: Input should be a valid boolean", Some("stream"))),
    };
    let options = &body["stream_options"];
    if options.as_object().is_some_and(|options| !options.is_empty()) && !stream {
        let message = "Stream options can only be defined when `stream=True`.";
        let error = shapes::error(400, message, Some("stream_options"));
        return Err(Response::json(400, &error));
    }
    Ok(stream)
}

fn check_length(limit: usize, prompt: usize, wanted: Option<usize>) -> Result<(), Response> {
    let total = prompt + wanted.unwrap_or(1);
    if total <= limit {
        return Ok(());
    }
    let however = match wanted {
        Some(wanted) => format!(
            "you requested {wanted} output tokens and your prompt contains at least {prompt} input \
             tokens, for a total of at least {total} tokens. Please reduce the length of the input \
             prompt or the number of requested output tokens."
        ),
        None => format!("your prompt contains at least {prompt} input tokens."),
    };
    let message =
        format!("This model's maximum context length is {limit} tokens. However, {however}");
    Err(Response::json(400, &shapes::error(400, &message, Some("input_tokens"))))
}

fn completion(body: &Value) -> Result<Api, Response> {
    let bad = |message: &str, param| Response::json(400, &shapes::error(400, message, Some(param)));
    if !body["prompt"].is_string() {
        return Err(bad(
            "Either prompt or prompt_embeds must be provided and non-empty.",
            "prompt",
        ));
    }
    if body["suffix"].as_str().is_some_and(|suffix| !suffix.is_empty()) {
        let message = "suffix is only supported for models with FIM completion rendering";
        return Err(bad(message, "suffix"));
    }
    let stop: Vec<String> = match &body["stop"] {
        Value::String(one) => vec![one.clone()],
        Value::Array(all) => all.iter().filter_map(|one| one.as_str().map(str::to_owned)).collect(),
        _ => Vec::new(),
    };
    if stop.len() > MAX_STOP_SEQUENCES {
        return Err(bad("You can specify at most 4 stop strings", "stop"));
    }
    let choices = body["n"].as_u64().and_then(|n| usize::try_from(n).ok()).unwrap_or(1);
    Ok(Api::Completion { choices, logprobs: body["logprobs"].is_u64(), stop })
}

/// The number of characters of all messages (their content is a string or a list of parts), or of the prompt.
fn prompt_chars(body: &Value) -> usize {
    let chars = |text: &Value| text.as_str().map_or(0, |text| text.chars().count());
    if body["messages"].is_null() {
        return chars(&body["prompt"]);
    }
    let messages = body["messages"].as_array().into_iter().flatten();
    messages
        .map(|message| match &message["content"] {
            Value::Array(parts) => parts.iter().map(|part| chars(&part["text"])).sum(),
            content => chars(content),
        })
        .sum()
}

/// The id of the completion contains the client's request id.
fn id(shared: &Shared, request: &Request, api: &Api) -> String {
    let kind = if matches!(api, Api::Chat) { "chatcmpl" } else { "cmpl" };
    match request.header("x-request-id") {
        Some(id) => format!("{kind}-{id}"),
        None => format!("{kind}-{:016x}", shared.next_serial()),
    }
}
