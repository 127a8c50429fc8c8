//! Tests of the decoder of response streams: single events in usual and in odd forms.

mod agreement;
mod counts;
mod errors;
mod fixtures;
mod messages;
mod mutations;
mod shapes;

use std::collections::BTreeMap;

use super::*;
use crate::upstream::engine::sse::SseParser;

/// The content of these events.
fn read(events: &[&str]) -> EngineDelta {
    let (mut decoder, mut delta) = (StreamDecoder::default(), EngineDelta::default());
    for event in events {
        decoder.push_event(event.as_bytes(), &mut delta).unwrap();
    }
    delta
}

/// An event with one choice.
fn choice_event(fields: &str) -> String {
    format!(r#"{{"choices":[{{"index":0,{fields}}}]}}"#)
}

/// The texts of a choice.
#[derive(Debug, Default, PartialEq)]
struct Texts {
    text: String,
    reasoning: String,
    refusal: String,
}

fn texts(delta: &EngineDelta) -> BTreeMap<usize, Texts> {
    let mut all = BTreeMap::<usize, Texts>::new();
    for piece in &delta.pieces {
        let texts = all.entry(piece.choice).or_default();
        match &piece.content {
            Content::Text(text) => texts.text.push_str(text),
            Content::Reasoning(text) => texts.reasoning.push_str(text),
            Content::Refusal(text) => texts.refusal.push_str(text),
            Content::None | Content::ToolCall(_) => {}
        }
    }
    all
}

/// The text of the first choice.
fn text(events: &[&str]) -> String {
    texts(&read(events)).remove(&0).unwrap_or_default().text
}

/// The content of a body that arrives in these pieces, and its error.
fn read_body(pieces: &[&[u8]]) -> (EngineDelta, Option<EngineError>) {
    let (mut parser, mut decoder) = (SseParser::default(), StreamDecoder::default());
    let mut delta = EngineDelta::default();
    for piece in pieces {
        if let Err(error) = parser.feed(piece, |data| decoder.push_event(data, &mut delta)) {
            return (delta, Some(error));
        }
    }
    let error = parser.finish(|data| decoder.push_event(data, &mut delta)).err();
    (delta, error)
}

#[test]
fn adjacent_texts_of_a_choice_are_joined() {
    let content = |text: &str| choice_event(&format!(r#""delta":{{"content":"{text}"}}"#));
    let reasoning = choice_event(r#""delta":{"reasoning":"r","content":""}"#);
    let other = r#"{"choices":[{"index":1,"delta":{"content":"c"}}]}"#;
    let end = choice_event(r#""delta":{"content":"d"},"finish_reason":"stop""#);
    let delta = read(&[
        &reasoning,
        &reasoning,
        &content("a"),
        &content("b"),
        other,
        &content("c"),
        &end,
        &content("e"),
    ]);
    let piece = |choice, content, events| Piece { choice, content, events, ..Piece::default() };
    let text = |text: &str| Content::Text(text.to_owned());
    let expected = [
        piece(0, Content::Reasoning("rr".to_owned()), 2),
        piece(0, text("ab"), 2),
        piece(1, text("c"), 1),
        piece(0, text("c"), 1),
        Piece { finish_reason: Some(FinishReason::Stop), ..piece(0, text("d"), 1) },
        piece(0, text("e"), 1),
    ];
    assert_eq!(delta.pieces, expected);
    assert!(delta.has_content() && !read(&["{}"]).has_content());
}

#[test]
fn an_event_with_a_role_and_no_content_is_no_piece() {
    let role = choice_event(r#""delta":{"role":"assistant","content":""},"finish_reason":null"#);
    assert!(read(&[&role]).pieces.is_empty());
    let end = choice_event(r#""delta":{},"finish_reason":"length""#);
    let expected =
        Piece { finish_reason: Some(FinishReason::Length), events: 0, ..Piece::default() };
    assert_eq!(read(&[&role, &end]).pieces, [expected]);
}

#[test]
fn everything_after_done_is_ignored() {
    let event = choice_event(r#""text":"a""#);
    for done in ["[DONE]", " [DONE]\t", "\"[DONE]\"", "[DONE]\n{}"] {
        let delta = read(&[&event, done, &event, r#"{"error":"late"}"#]);
        assert!(delta.is_done, "{done}");
        assert_eq!(texts(&delta)[&0].text, "a", "{done}");
    }
    let joined = format!("{event}\n[DONE]");
    assert!(read(&[&joined]).is_done);
    assert_eq!(text(&[&joined]), "a");
}

#[test]
fn several_values_in_one_event_are_all_read() {
    let first = choice_event(r#""text":"a""#);
    let second = choice_event(r#""text":"b","delta":null"#);
    for event in [
        format!("{first}{second}"),
        format!("{first}\n{second}"),
        format!("  {first} \n\n {second}  "),
        format!("[{first},{second}]"),
        format!("{first} garbage\n{second}"),
        format!("garbage\n{first}\ndata: {second}"),
        format!("data: data:{first}\n{second} trailing {{}}"),
        format!("{first}\n{{\"choices\":[{{\"trun\n{second}"),
    ] {
        assert_eq!(text(&[&event]), "ab", "{event}");
    }
    let indented = "{\n  \"choices\": [\n    {\n      \"text\": \"ab\"\n    }\n  ]\n}";
    assert_eq!(text(&[indented]), "ab");
}

#[test]
fn an_event_that_is_no_json_is_skipped() {
    let valid = choice_event(r#""text":"a""#);
    let truncated = &valid[..valid.len() - 3];
    let lines = "{\n".repeat(100_000);
    for odd in [
        "",
        " ",
        "hello",
        "null",
        "1",
        "\"text\"",
        "[1,null,\"x\"]",
        "{",
        "}",
        "[",
        truncated,
        &lines,
    ] {
        let delta = read(&[odd, &valid]);
        assert_eq!(texts(&delta)[&0].text, "a");
        assert_eq!(delta.pieces.len(), 1);
    }
}

#[test]
fn the_first_name_of_a_model_counts() {
    let model = |events: &[&str]| read(events).model;
    let named = [r#"{"model":""}"#, r#"{"model":null}"#, r#"{"model":7}"#, r#"{"model":"m\"1"}"#];
    assert_eq!(model(&named[..3]), None);
    assert_eq!(model(&[&named[..], &[r#"{"model":"other"}"#]].concat()).unwrap(), "m\"1");
}

#[test]
fn kinds_of_oddities_are_distinct() {
    let names: std::collections::BTreeSet<_> =
        Oddity::ALL.iter().map(|kind| kind.as_str()).collect();
    assert_eq!(names.len(), Oddity::ALL.len());
    for kind in Oddity::ALL {
        kind.count();
    }
}

#[test]
fn faults_seen_in_engines_do_not_fail_an_answer() {
    let content = choice_event(r#""delta":{"content":"x = 1\n"},"finish_reason":null"#);
    let end = choice_event(r#""delta":{},"finish_reason":"stop""#);
    let null_delta = choice_event(r#""delta":null,"finish_reason":"stop""#);
    let usage = r#""usage":{"prompt_tokens":5,"completion_tokens":3,"total_tokens":8}"#;
    let null_choices = format!(r#"{{"choices":null,{usage}}}"#);
    let no_choices = format!(r#"{{"choices":[],{usage}}}"#);
    let null_usage =
        r#"{"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":null,"total_tokens":5}}"#;
    let body = |events: &[&str]| {
        events.iter().fold(String::new(), |body, event| format!("{body}data: {event}\n\n"))
    };
    for (body, total, is_done) in [
        (body(&[&content, &end, &null_choices, "[DONE]"]), 8, true),
        (body(&[&content, &null_delta, "[DONE]"]), 0, true),
        (body(&[&content, &end, null_usage, "[DONE]"]), 5, true),
        (body(&[&content, &end]) + "data: [DONE]\n", 0, true),
        (body(&[&content, &end]) + "data: [DONE]", 0, true),
        (body(&[&content, &end, &no_choices]), 8, false),
    ] {
        let (delta, error) = read_body(&[body.as_bytes()]);
        assert_eq!((error, delta.is_done), (None, is_done), "{body}");
        assert_eq!(texts(&delta)[&0].text, "x = 1\n", "{body}");
        let finish = delta.pieces.iter().find_map(|piece| piece.finish_reason);
        assert_eq!(finish, Some(FinishReason::Stop), "{body}");
        assert_eq!(delta.usage.map_or(0, |usage| usage.total_tokens), total, "{body}");
    }
}

#[test]
fn an_answer_without_text_shows_its_reasoning_and_its_end() {
    let reasoning = choice_event(r#""delta":{"reasoning":"hm, "},"finish_reason":null"#);
    let end = choice_event(r#""delta":{},"finish_reason":"length""#);
    let delta = read(&[&reasoning, &end, "[DONE]"]);
    assert_eq!(texts(&delta)[&0].reasoning, "hm, ");
    assert_eq!(delta.pieces[1].finish_reason, Some(FinishReason::Length));
}

#[test]
fn one_json_body_in_place_of_a_stream_is_read() {
    let body = r#"{"id":"chatcmpl-1","object":"chat.completion","created":1,"model":"m","choices":[{"index":0,"message":{"role":"assistant","content":"x = 1\n","reasoning_content":"hm","tool_calls":[{"id":"a","type":"function","function":{"name":"f","arguments":"{}"}}]},"logprobs":null,"finish_reason":"stop"}],"usage":{"prompt_tokens":5,"completion_tokens":3,"total_tokens":8}}"#;
    let value: serde_json::Value = serde_json::from_str(body).unwrap();
    let indented = serde_json::to_string_pretty(&value).unwrap();
    let compact = format!("{body}\n");
    for body in [body, &compact, &indented] {
        let pieces: Vec<_> = body.as_bytes().chunks(7).collect();
        let (delta, error) = read_body(&pieces);
        assert_eq!(error, None);
        let expected = Texts {
            text: "x = 1\n".to_owned(),
            reasoning: "hm".to_owned(),
            refusal: String::new(),
        };
        assert_eq!(texts(&delta)[&0], expected);
        let last = delta.pieces.last().unwrap();
        assert!(matches!(&last.content, Content::ToolCall(call) if call.arguments == "{}"));
        assert_eq!(last.finish_reason, Some(FinishReason::Stop));
        assert_eq!(last.usage.unwrap().total_tokens, 8);
    }
    let (delta, error) = read_body(&[br#"{"error":{"message":"no","code":400}}"#]);
    let expected = serde_json::json!({"message": "no", "code": 400});
    assert_eq!(error, Some(crate::upstream::engine::stream_error(&expected, &[])));
    assert!(delta.pieces.is_empty());
}
