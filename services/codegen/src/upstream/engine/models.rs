//! The list of models of an engine. Engines differ in its shape, and an entry that cannot be read must not
//! hide the others.

use serde_json::Value;

use crate::request::generate_params::MAX_MODEL_NAME_LEN;
use crate::request::unicode::{is_bidi, is_invisible};
use crate::upstream::engine::{DecodeError, EngineError};

/// Maximum number of models read from one engine.
const MAX_MODELS: usize = 1_000;

/// Names of the context length that requests may use, most specific first: vLLM and SGLang, LM Studio,
/// Mistral, Together and OpenRouter, Groq. `n_ctx_train` of llama.cpp is not a limit.
const LENGTH_NAMES: [&str; 5] = [
    "max_model_len",
    "loaded_context_length",
    "max_context_length",
    "context_length",
    "context_window",
];

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ListedModel {
    pub(crate) id: String,
    pub(crate) parent: Option<String>,
    pub(crate) max_model_len: Option<u32>,
    /// Origin of the weights.
    pub(crate) root: Option<String>,
}

/// Reads the reply to `GET /models`: each model once, in order. Names that no request could use are left out.
pub(super) fn parse_list(body: &[u8]) -> Result<Vec<ListedModel>, EngineError> {
    let list: Value = serde_json::from_slice(body).map_err(|error| EngineError::from(&error))?;
    let entries = entries(&list).ok_or(EngineError::InvalidReply(DecodeError::NotAModelList))?;
    let readable: Vec<_> = entries.iter().filter_map(ListedModel::from_entry).collect();
    if readable.is_empty() && !entries.is_empty() {
        return Err(EngineError::InvalidReply(DecodeError::NotAModelList));
    }
    let mut models: Vec<ListedModel> = Vec::new();
    let mut names = std::collections::HashSet::new();
    for model in readable.into_iter().filter_map(ListedModel::validated) {
        if models.len() < MAX_MODELS && names.insert(model.id.clone()) {
            models.push(model);
        }
    }
    Ok(models)
}

/// A bare array, or the array under `data` or, as in Ollama's own interface, `models`.
fn entries(list: &Value) -> Option<&Vec<Value>> {
    let named = |name: &str| list.get(name).and_then(Value::as_array);
    let data = list.as_array().or_else(|| named("data"));
    data.filter(|data| !data.is_empty()).or_else(|| named("models")).or(data)
}

impl ListedModel {
    /// From an object with a name, or from the name alone.
    fn from_entry(entry: &Value) -> Option<ListedModel> {
        if let Value::String(id) = entry {
            return Some(ListedModel { id: id.clone(), ..ListedModel::default() });
        }
        let text = |name: &str| entry.get(name).and_then(Value::as_str).map(str::to_owned);
        let length = LENGTH_NAMES.iter().find_map(|name| positive(entry.get(name)?));
        Some(ListedModel {
            id: text("id").or_else(|| text("model")).or_else(|| text("name"))?,
            parent: text("parent"),
            max_model_len: length.or_else(|| positive(entry.get("meta")?.get("n_ctx")?)),
            root: text("root"),
        })
    }

    /// `None` if no request could name the model. Names appear in lists, logs and traces, so they must
    /// be visible text and no longer than a request allows.
    pub(super) fn validated(self) -> Option<ListedModel> {
        let parent = self.parent.filter(|parent| is_valid_model_name(parent));
        is_valid_model_name(&self.id).then_some(ListedModel { parent, ..self })
    }
}

/// A positive integer; any other value means unknown.
fn positive(value: &Value) -> Option<u32> {
    u32::try_from(value.as_u64()?).ok().filter(|length| *length > 0)
}

fn is_valid_model_name(name: &str) -> bool {
    let is_visible = |letter: char| {
        !letter.is_control() && !letter.is_whitespace() && !is_invisible(letter) && !is_bidi(letter)
    };
    (1..=MAX_MODEL_NAME_LEN).contains(&name.chars().count()) && name.chars().all(is_visible)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_that_no_request_could_name_is_not_listed() {
        let listed = |id: &str, parent: Option<&str>| {
            let (id, parent) = (id.to_owned(), parent.map(str::to_owned));
            let model = ListedModel { id, parent, ..ListedModel::default() };
            model.validated().map(|model| (model.id, model.parent))
        };
        let own = listed("Qwen/Qwen2.5-Coder-7B@main:fp8", Some("기본"));
        assert_eq!(own.unwrap().1.as_deref(), Some("기본"));
        assert_eq!(listed("m", Some("a\nb")).unwrap().1, None);
        let long = "m".repeat(201);
        for odd in ["", "a b", "a\nb", "a\u{1b}[31m", "a\u{200b}", "a\u{202e}b", long.as_str()] {
            assert!(listed(odd, None).is_none(), "{odd:?}");
        }
    }

    fn ids(body: &str) -> Vec<String> {
        parse_list(body.as_bytes()).unwrap().into_iter().map(|model| model.id).collect()
    }

    #[test]
    fn lists_of_every_shape_are_read() {
        for body in [
            r#"{"object":"list","data":[{"id":"a"},{"id":"b"}]}"#,
            r#"[{"id":"a"},{"id":"b"}]"#,
            r#"["a","b"]"#,
            r#"{"models":[{"name":"a","model":"a"},{"name":"b"}],"data":[]}"#,
            r#"{"models":[{"name":"x"}],"data":[{"id":"a"},{"id":"b"}]}"#,
            r#"{"data":[{"id":7},null,{"id":"a"},[],{"id":"b"},{"name":{}}]}"#,
            r#"{"data":[{"id":"a"},{"id":"b"},{"id":"a","max_model_len":7}]}"#,
        ] {
            assert_eq!(ids(body), ["a", "b"], "{body}");
        }
        assert!(ids(r#"{"data":[]}"#).is_empty());
    }

    #[test]
    fn a_reply_without_a_readable_model_is_an_error() {
        for body in [
            r#"{"error":"Unexpected endpoint"}"#,
            r#"{"data":"a"}"#,
            r#"{"data":[{"id":{}}]}"#,
            "7",
        ] {
            let error = parse_list(body.as_bytes()).unwrap_err();
            assert_eq!(error, EngineError::InvalidReply(DecodeError::NotAModelList), "{body}");
        }
        assert!(matches!(
            parse_list(b"<html>").unwrap_err(),
            EngineError::InvalidReply(DecodeError::NotJson { .. })
        ));
    }

    #[test]
    fn a_context_length_is_a_positive_integer_or_unknown() {
        for (fields, expected) in [
            (r#""max_model_len":4096"#, Some(4096)),
            (r#""max_model_len":null,"max_context_length":8192"#, Some(8192)),
            (r#""max_context_length":8192,"loaded_context_length":2048"#, Some(2048)),
            (r#""context_length":32768"#, Some(32768)),
            (r#""meta":{"n_ctx_train":8192,"n_ctx":2048}"#, Some(2048)),
            (r#""meta":{"n_ctx_train":8192}"#, None),
            (r#""meta":null"#, None),
            (r#""max_model_len":-5"#, None),
            (r#""max_model_len":0"#, None),
            (r#""max_model_len":4096.5"#, None),
            (r#""max_model_len":"4096""#, None),
            (r#""max_model_len":99999999999"#, None),
        ] {
            let body = format!(r#"[{{"id":"a",{fields}}}]"#);
            assert_eq!(parse_list(body.as_bytes()).unwrap()[0].max_model_len, expected, "{fields}");
        }
    }
}
