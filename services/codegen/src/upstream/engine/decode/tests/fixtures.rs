//! Streams in the shapes of real engines, from tests/engine-sim/fixtures.

use std::fs;
use std::path::Path;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::upstream::engine::tool_calls::ToolCalls;

/// A recorded stream with its expected content.
pub(super) struct Fixture {
    /// Engine and kind.
    pub(super) name: String,
    pub(super) body: String,
    pub(super) expected: Value,
}

/// All recorded streams.
pub(super) fn load() -> Vec<Fixture> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/engine-sim/fixtures");
    let expected = fs::read_to_string(folder.join("expected.json")).unwrap();
    let engines: BTreeMap<String, BTreeMap<String, Value>> =
        serde_json::from_str(&expected).unwrap();
    let mut all = Vec::new();
    for (engine, kinds) in engines {
        let files = fs::read_dir(folder.join(&engine)).unwrap().count();
        assert_eq!(files, kinds.len(), "expected.json has a row for each file of {engine}");
        for (kind, expected) in kinds {
            let path = folder.join(&engine).join(format!("{kind}.sse"));
            let body = fs::read_to_string(&path).unwrap();
            all.push(Fixture { name: format!("{engine}/{kind}"), body, expected });
        }
    }
    assert!(all.len() > 50);
    all
}

/// What a consumer collects from a stream, with a new `EngineDelta` for each read.
#[derive(Debug, Default, PartialEq)]
struct StreamContent {
    texts: BTreeMap<usize, Texts>,
    finish_reasons: BTreeMap<usize, &'static str>,
    logprobs: BTreeMap<usize, (f64, u32)>,
    usage: Option<Usage>,
    tool_calls: Vec<(String, String, String)>,
    model: Option<String>,
    is_done: bool,
    has_error: bool,
}

fn collect(pieces: &[&[u8]]) -> StreamContent {
    let (mut parser, mut content, mut whole) =
        (SseParser::default(), StreamContent::default(), EngineDelta::default());
    let mut decoder = StreamDecoder::default();
    for piece in pieces.iter().map(Some).chain([None]) {
        let mut delta = EngineDelta { is_done: whole.is_done, ..EngineDelta::default() };
        let result = match piece {
            Some(piece) => parser.feed(piece, |data| decoder.push_event(data, &mut delta)),
            None => parser.finish(|data| decoder.push_event(data, &mut delta)),
        };
        whole.pieces.append(&mut delta.pieces);
        merge_usage(&mut whole.usage, delta.usage);
        whole.model = whole.model.or(delta.model);
        whole.is_done |= delta.is_done;
        content.has_error = result.is_err();
        if content.has_error {
            break;
        }
    }
    content.texts = texts(&whole);
    let mut calls = ToolCalls::default();
    for piece in &whole.pieces {
        if let Some(reason) = piece.finish_reason {
            content.finish_reasons.insert(piece.choice, reason.as_str());
        }
        if let Content::ToolCall(call) = &piece.content {
            calls.push(piece.choice, call).unwrap();
        }
        let logprobs = content.logprobs.entry(piece.choice).or_default();
        *logprobs = (logprobs.0 + piece.logprob, logprobs.1 + piece.logprob_tokens);
        merge_usage(&mut content.usage, piece.usage);
    }
    merge_usage(&mut content.usage, whole.usage);
    let calls = calls.into_calls().into_iter();
    content.tool_calls = calls.map(|call| (call.id, call.name, call.arguments)).collect();
    (content.model, content.is_done) = (whole.model, whole.is_done);
    content
}

/// The fields of expected.json that a stream has.
fn summary(content: &StreamContent, expected: &Value) -> Value {
    let choices = expected["texts"].as_array().unwrap().len();
    let of = |choice| content.texts.get(&choice);
    let text = |choice| of(choice).map(|texts| texts.text.as_str()).unwrap_or_default();
    let reasoning = of(0).map(|texts| &texts.reasoning).filter(|text| !text.is_empty());
    let refusal = of(0).map(|texts| &texts.refusal).filter(|text| !text.is_empty());
    let finish: Vec<_> = content.finish_reasons.values().collect();
    let usage = content.usage.map(|usage| {
        let Usage { prompt_tokens, completion_tokens, total_tokens, .. } = usage;
        let (reasoning, cached) = (usage.reasoning_tokens, usage.cached_tokens);
        [prompt_tokens, completion_tokens, total_tokens, reasoning, cached]
    });
    let calls = content
        .tool_calls
        .iter()
        .map(|(id, name, arguments)| json!({"id": id, "name": name, "arguments": arguments}));
    let calls: Vec<_> = calls.collect();
    let logprobs: Vec<_> = content.logprobs.values().filter(|(_, tokens)| *tokens > 0).collect();
    let mut summary = json!({
        "texts": (0..choices).map(text).collect::<Vec<_>>(),
        "reasoning": reasoning.map(|text| [text]),
        "refusal": refusal,
        "finish": (!finish.is_empty()).then_some(finish),
        "usage": usage,
        "tool_calls": (!calls.is_empty()).then_some(calls),
        "logprobs": (!logprobs.is_empty()).then_some(logprobs),
        "model": content.model,
        // The status of an error is tested with the errors.
        "error": content.has_error.then(|| expected["error"].clone()),
    });
    summary.as_object_mut().unwrap().retain(|_, value| !value.is_null());
    summary
}

#[test]
fn streams_of_all_engines_are_read() {
    for Fixture { name, body, expected } in load() {
        let content = collect(&[body.as_bytes()]);
        assert_eq!(summary(&content, &expected), expected, "{name}");
        let is_done = body.contains("[DONE]") && !content.has_error;
        assert_eq!(content.is_done, is_done, "{name}");
    }
}

#[test]
fn streams_are_the_same_byte_by_byte_and_with_other_line_ends() {
    for Fixture { name, body, .. } in load() {
        let whole = collect(&[body.as_bytes()]);
        let bytes: Vec<_> = body.as_bytes().chunks(1).collect();
        assert_eq!(collect(&bytes), whole, "{name}");
        for end in ["\r\n", "\r"] {
            let body = body.replace('\n', end);
            let pieces: Vec<_> = body.as_bytes().chunks(5).collect();
            assert_eq!(collect(&pieces), whole, "{name}");
        }
        let trimmed = body.trim_end().as_bytes();
        assert_eq!(collect(&[b"\xef\xbb\xbf", trimmed]), whole, "{name}");
    }
}

proptest! {
    #[test]
    fn streams_are_the_same_however_the_bytes_are_cut(
        choice in any::<prop::sample::Index>(),
        cuts in prop::collection::vec(1..200_usize, 1..50),
    ) {
        let all = load();
        let Fixture { name, body, .. } = choice.get(&all);
        let (mut rest, mut pieces) = (body.as_bytes(), Vec::new());
        for cut in cuts {
            let (piece, after) = rest.split_at(cut.min(rest.len()));
            pieces.push(piece);
            rest = after;
        }
        pieces.push(rest);
        prop_assert_eq!(collect(&pieces), collect(&[body.as_bytes()]), "{}", name);
    }
}
