//! Whole messages beside and after deltas.

use super::*;

fn message(fields: &str) -> String {
    choice_event(&format!(r#""message":{{{fields}}}"#))
}

fn delta(fields: &str) -> String {
    choice_event(&format!(r#""delta":{{{fields}}}"#))
}

fn first(events: &[&str]) -> Texts {
    texts(&read(events)).remove(&0).unwrap_or_default()
}

#[test]
fn a_message_after_deltas_brings_only_its_end_and_its_usage() {
    let end = r#"{"object":"chat.completion","choices":[{"index":0,"finish_reason":"stop","delta":null,"message":{"role":"assistant","content":"ab","reasoning_content":"r","tool_calls":[{"function":{"name":"f","arguments":"{}"}}]}}],"usage":{"prompt_tokens":10,"completion_tokens":10}}"#;
    let deltas = [&delta(r#""reasoning_content":"r""#), &delta(r#""content":"a""#)];
    let read = read(&[deltas[0], deltas[1], &delta(r#""content":"b""#), end]);
    let expected = Texts { text: "ab".into(), reasoning: "r".into(), refusal: String::new() };
    assert_eq!(texts(&read)[&0], expected);
    let last = read.pieces.last().unwrap();
    assert_eq!((&last.content, last.finish_reason), (&Content::None, Some(FinishReason::Stop)));
    assert_eq!(last.usage.unwrap().total_tokens, 20);
    // Text completions have no delta.
    assert_eq!(first(&[&choice_event(r#""text":"ab""#), end]).text, "ab");
}

#[test]
fn a_message_is_remembered_over_reads_and_for_its_answer_only() {
    let mut decoder = StreamDecoder::default();
    let mut push = |event: &str| {
        let mut delta = EngineDelta::default();
        decoder.push_event(event.as_bytes(), &mut delta).unwrap();
        texts(&delta)
    };
    assert_eq!(push(&delta(r#""content":"a""#))[&0].text, "a");
    assert!(push(&message(r#""content":"a""#)).is_empty());
    for _ in 0..2 {
        let other = r#"{"choices":[{"index":127,"message":{"content":"b"}}]}"#;
        assert_eq!(push(other)[&127].text, "b", "messages alone are all read");
    }
}

#[test]
fn a_message_beside_a_delta_is_read_if_the_delta_has_no_content() {
    for fields in ["", r#""role":"assistant""#, r#""content":"""#, r#""content":null"#] {
        let event = choice_event(&format!(r#""delta":{{{fields}}},"message":{{"content":"a"}}"#));
        assert_eq!(text(&[&event]), "a", "{event}");
    }
    let both = choice_event(r#""delta":{"content":"a"},"message":{"content":"ab"}"#);
    assert_eq!(text(&[&both, &both]), "aa");
}

#[test]
fn the_answer_of_a_message_is_read_after_deltas_of_reasoning() {
    let reasoning = delta(r#""reasoning_content":"r""#);
    let all = first(&[&reasoning, &message(r#""reasoning_content":"r","content":"a""#)]);
    assert_eq!((all.reasoning.as_str(), all.text.as_str()), ("r", "a"));
}

#[test]
fn a_delta_that_is_a_text_and_content_in_a_choice_are_read() {
    assert_eq!(text(&[&choice_event(r#""delta":"a""#), &choice_event(r#""content":"b""#)]), "ab");
    assert_eq!(text(&[&choice_event(r#""text":"a","content":"b""#)]), "a");
}

#[test]
fn parts_of_databricks_and_of_unknown_types_are_read() {
    let content = |parts: &str| first(&[&delta(&format!(r#""content":{parts}"#))]);
    let parts = r#"[{"type":"reasoning","summary":[{"type":"summary_text","text":"r","signature":""}]},{"type":"text","text":"a"}]"#;
    let expected = Texts { text: "a".into(), reasoning: "r".into(), refusal: String::new() };
    assert_eq!(content(parts), expected);
    for part in [
        r#"{"type":"text","text":{"value":"a"}}"#,
        r#"{"type":"text_delta","text":"a"}"#,
        r#"{"type":"other","text":"a"}"#,
    ] {
        assert_eq!(content(&format!("[{part}]")).text, "a", "{part}");
    }
    for part in [
        r#"{"type":"reasoning.text","text":"r"}"#,
        r#"{"type":"thinking_delta","thinking":"r"}"#,
        r#"{"type":"reasoning","thinking":null,"summary":[],"content":[{"text":"r"}]}"#,
    ] {
        assert_eq!(content(&format!("[{part}]")).reasoning, "r", "{part}");
    }
    assert_eq!(content(r#"[{"type":"redacted_thinking","data":"x"}]"#), Texts::default());
    let blocks = delta(r#""thinking_blocks":[{"type":"thinking","thinking":"r"}],"content":"""#);
    assert_eq!(first(&[&blocks]).reasoning, "r");
}
