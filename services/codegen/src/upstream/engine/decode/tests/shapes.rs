//! Content, indexes, finish reasons and tool calls in the forms that engines send.

use super::*;

#[test]
fn content_is_read_in_any_form() {
    for (content, expected) in [
        (r#""a""#, "a"),
        ("null", ""),
        ("7", "7"),
        ("1.5", "1.5"),
        ("true", ""),
        ("[]", ""),
        ("{}", ""),
        (r#"["a","b"]"#, "ab"),
        (
            r#"[{"type":"text","text":"a"},null,{"text":"b"},7,{"type":"image_url","text":"c"},{"type":"image_url"}]"#,
            "abc",
        ),
        (r#"[{"type":"text","text":null},{"type":"output_text","text":"b"}]"#, "b"),
        (r#"{"type":"text","text":"a"}"#, "a"),
        (r#""nul \u0000""#, "nul \0"),
    ] {
        for field in ["delta", "message"] {
            let event = choice_event(&format!(r#""{field}":{{"content":{content}}}"#));
            assert_eq!(text(&[&event]), expected, "{event}");
        }
        let event = choice_event(&format!(r#""text":{content}"#));
        assert_eq!(text(&[&event]), expected, "{event}");
    }
}

#[test]
fn choices_of_other_types_are_skipped() {
    let usable = r#"{"index":0,"delta":{"content":"a"}}"#;
    for (choices, expected) in [
        ("null".to_owned(), ""),
        ("{}".to_owned(), ""),
        ("7".to_owned(), ""),
        ("\"x\"".to_owned(), ""),
        ("true".to_owned(), ""),
        ("[]".to_owned(), ""),
        (format!("[null,\"x\",7,[],{{}},{usable}]"), "a"),
        (usable.to_owned(), "a"),
        (r#"[{"delta":null},{"delta":[]},{"delta":["x"]},{"delta":7}]"#.to_owned(), ""),
        (r#"[[0,{"content":"x"}],["",0]]"#.to_owned(), ""),
        (r#"[{"delta":null,"message":{"content":"a"}}]"#.to_owned(), "a"),
        (r#"[{"delta":{"content":""},"text":"a"}]"#.to_owned(), "a"),
    ] {
        assert_eq!(text(&[&format!(r#"{{"choices":{choices}}}"#)]), expected, "{choices}");
    }
}

#[test]
fn an_index_is_read_in_any_form() {
    let choice = |index: &str| {
        let event = format!(r#"{{"choices":[{{}},{{{index}"text":"a"}}]}}"#);
        read(&[&event]).pieces.first().map(|piece| piece.choice)
    };
    for (index, expected) in [
        ("", Some(1)),
        (r#""index":null,"#, Some(1)),
        (r#""index":-1,"#, Some(1)),
        (r#""index":1.5,"#, Some(1)),
        (r#""index":[],"#, Some(1)),
        (r#""index":"x","#, Some(1)),
        (r#""index":5,"#, Some(5)),
        (r#""index":3.0,"#, Some(3)),
        (r#""index":" 4","#, Some(4)),
        (r#""index":127,"#, Some(127)),
        (r#""index":128,"#, None),
        (r#""index":1e300,"#, None),
        (r#""index":18446744073709551616,"#, None),
    ] {
        assert_eq!(choice(index), expected, "{index}");
    }
}

#[test]
fn only_the_first_128_choices_are_read() {
    let choices: Vec<_> = (0..200).map(|_| r#"{"index":0,"text":"a"}"#).collect();
    let event = format!(r#"{{"choices":[{}]}}"#, choices.join(","));
    assert_eq!(text(&[&event]).len(), MAX_ENTRIES);
    let calls: Vec<_> = (0..200).map(|_| r#"{"function":{"name":"f"}}"#).collect();
    let event = choice_event(&format!(r#""delta":{{"tool_calls":[{}]}}"#, calls.join(",")));
    assert_eq!(read(&[&event]).pieces.len(), MAX_ENTRIES);
}

#[test]
fn finish_reasons_are_read_in_any_form() {
    let reason = |value: &str| {
        let event = choice_event(&format!(r#""delta":{{"content":"a"}},"finish_reason":{value}"#));
        read(&[&event]).pieces[0].finish_reason.map(FinishReason::as_str)
    };
    for none in ["null", "\"\"", "\"null\"", "\"None\"", "0", "false", "[]", "{}", "[\"stop\"]"] {
        assert_eq!(reason(none), None, "{none}");
    }
    for (value, expected) in [
        ("stop", "stop"),
        ("STOP", "stop"),
        ("eos_token", "stop"),
        ("stop_sequence", "stop"),
        ("MAX_TOKENS", "length"),
        ("function_call", "tool_calls"),
        ("content_filter", "content_filter"),
        ("abort", "abort"),
        ("error", "error"),
        ("no such word", "other"),
    ] {
        assert_eq!(reason(&format!("\"{value}\"")), Some(expected), "{value}");
    }
    for (value, expected) in [
        (r#"{"type":"stop"}"#, "stop"),
        (r#"{"type":"x"}"#, "other"),
        ("true", "other"),
        ("7", "other"),
    ] {
        assert_eq!(reason(value), Some(expected), "{value}");
    }
    for event in [
        choice_event(r#""delta":{},"finish_reason":0"#),
        choice_event(r#""delta":{"content":"","finish_reason":"x"},"finish_reason":null"#),
    ] {
        assert_eq!(read(&[&event]).pieces[0].finish_reason, Some(FinishReason::Other), "{event}");
    }
}

#[test]
fn reasoning_is_read_once_and_comes_before_the_text() {
    for (fields, expected) in [
        (r#""reasoning_content":"r""#, "r"),
        (r#""reasoning":"r""#, "r"),
        (r#""thinking":"r""#, "r"),
        (r#""reasoning_content":"r","reasoning":"r""#, "r"),
        (r#""reasoning_content":"","reasoning":"r""#, "r"),
        (r#""reasoning_content":null,"reasoning":7"#, "7"),
        (r#""reasoning":"r","reasoning_details":[{"type":"reasoning.text","text":"r"}]"#, "r"),
        (r#""reasoning_details":[{"text":"r"},null,{"summary":"s"},{"data":"x"},7]"#, "rs"),
        (r#""reasoning":[{"type":"text","text":"r"},{"type":"thinking","thinking":"s"}]"#, "sr"),
        (r#""reasoning":true,"reasoning_details":{}"#, ""),
    ] {
        let event = choice_event(&format!(r#""delta":{{"content":"a",{fields}}}"#));
        let delta = read(&[&event]);
        assert_eq!(texts(&delta)[&0].reasoning, expected, "{event}");
        assert_eq!(delta.pieces.last().unwrap().content, Content::Text("a".to_owned()));
    }
    let parts = r#""delta":{"content":[{"type":"thinking","thinking":[{"type":"text","text":"r"}]},{"type":"text","text":"a"}]}"#;
    let delta = read(&[&choice_event(parts)]);
    let contents: Vec<_> = delta.pieces.iter().map(|piece| &piece.content).collect();
    let expected = [Content::Reasoning("r".to_owned()), Content::Text("a".to_owned())];
    assert_eq!(contents, expected.iter().collect::<Vec<_>>());
}

#[test]
fn a_refusal_is_read() {
    for fields in [r#""refusal":"no""#, r#""content":[{"type":"refusal","refusal":"no"}]"#] {
        let delta = read(&[&choice_event(&format!(r#""delta":{{{fields}}}"#))]);
        assert_eq!(delta.pieces[0].content, Content::Refusal("no".to_owned()), "{fields}");
    }
}

#[test]
fn tool_calls_are_read_in_any_form() {
    let row = |index, id: &str, name: &str, arguments: &str| {
        let text = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        ToolCallDelta { index, id: text(id), name: text(name), arguments: arguments.to_owned() }
    };
    let calls = |fields: &str| -> Vec<_> {
        let delta = read(&[&choice_event(&format!(r#""delta":{{{fields}}}"#))]);
        let contents = delta.pieces.into_iter().map(|piece| piece.content);
        contents
            .filter_map(|content| match content {
                Content::ToolCall(call) => Some(call),
                _ => None,
            })
            .collect()
    };
    let list = |calls: &str| format!(r#""tool_calls":{calls}"#);
    for (fields, expected) in [
        (
            list(
                r#"[{"index":2,"id":"a","type":"function","function":{"name":"f","arguments":""}}]"#,
            ),
            vec![row(2, "a", "f", "")],
        ),
        (
            list(
                r#"[{"index":0,"id":null,"function":{"name":null,"arguments":" {\"a\": 1.0}\n"}}]"#,
            ),
            vec![row(0, "", "", " {\"a\": 1.0}\n")],
        ),
        (
            list(
                r#"[null,{"function":{"name":"f","arguments":{"a":[1]}}},7,{"name":"g","arguments":"{}"}]"#,
            ),
            vec![row(1, "", "f", r#"{"a":[1]}"#), row(3, "", "g", "{}")],
        ),
        (list(r#"{"index":0,"id":"","function":{"arguments":"{"}}"#), vec![row(0, "", "", "{")]),
        (
            list(r#"[{"index":0,"id":5,"function":{"name":["f"],"arguments":7}}]"#),
            vec![row(0, "5", "", "")],
        ),
        (list(r#"[{"index":0,"function":{"arguments":""}},{"index":500,"id":"a"}]"#), vec![]),
        (list("null"), vec![]),
        (list("\"x\""), vec![]),
        (
            r#""function_call":{"name":"f","arguments":"{}"}"#.to_owned(),
            vec![row(0, "", "f", "{}")],
        ),
        (r#""function_call":"none""#.to_owned(), vec![]),
    ] {
        assert_eq!(calls(&fields), expected, "{fields}");
    }
}

#[test]
fn broken_characters_and_json_are_repaired() {
    let text = |json: &[u8]| {
        let event = [br#"{"choices":[{"text":""#.as_slice(), json, br#""}]}"#].concat();
        let mut delta = EngineDelta::default();
        delta.push_event(&event).unwrap();
        texts(&delta).remove(&0).unwrap_or_default().text
    };
    for (json, expected) in [
        (br"a\ud83d".as_slice(), "a\u{fffd}"),
        (br"\ude00b", "\u{fffd}b"),
        (br"\ud83dA", "\u{fffd}A"),
        (br"\ud83d\ud83d\ude00", "\u{fffd}\u{1f600}"),
        (br"\uzz", "\\uzz"),
        (br"\x41\'", "x41'"),
        (b"a\xffb", "a\u{fffd}b"),
        (b"a\tb\nc\0d", "a\tb\nc\0d"),
        (br#"\"\\\/\b\f\n\r\t\ud83d"#, "\"\\/\u{8}\u{c}\n\r\t\u{fffd}"),
    ] {
        assert_eq!(text(json), expected, "{json:?}");
    }
    for (rest, expected) in [
        (r#""usage":NaN"#, "a"),
        (r#""usage":{"prompt_tokens":1e999},"x":[-Infinity,01,.5,None,1e-999,]"#, "a"),
        (r#""x":undefined,"y":True"#, "a"),
    ] {
        let event = format!(r#"{{"choices":[{{"text":"a","delta":null}}],{rest}}}"#);
        let strange = event.replace("\"delta\":null", "\"delta\":7");
        assert_eq!(super::text(&[&strange]), expected, "{strange}");
    }
}

#[test]
fn deep_nesting_does_not_hide_the_text() {
    let deep = format!("{}{}", "[".repeat(5_000), "]".repeat(5_000));
    for delta in ["null", "7"] {
        let event = format!(r#"{{"x":{deep},"choices":[{{"delta":{delta},"text":"a"}}]}}"#);
        assert_eq!(text(&[&event]), "a");
    }
    let deep = format!("{}1{}", r#"{"a":"#.repeat(40), "}".repeat(40));
    let call = format!(r#""delta":{{"tool_calls":[{{"function":{{"arguments":{deep}}}}}]}}"#);
    let delta = read(&[&choice_event(&call)]);
    assert!(matches!(&delta.pieces[0].content, Content::ToolCall(call) if call.arguments == deep));
}
