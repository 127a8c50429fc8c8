//! Tests of the parser of server-sent events.

use proptest::prelude::*;

use super::*;

fn read(pieces: &[&[u8]]) -> Result<Vec<String>, EventTooLong> {
    let (mut parser, mut events) = (SseParser::default(), Vec::new());
    for piece in pieces {
        parser.feed(piece, |data| {
            events.push(String::from_utf8(data.to_vec()).unwrap());
            Ok::<_, EventTooLong>(())
        })?;
    }
    Ok(events)
}

#[test]
fn comments_other_fields_and_line_ends_of_all_kinds_are_parsed() {
    let stream = b": keep-alive\n\ndata: one\n\nevent: x\rdata:two\r\rid: 1\r\ndata: a\r\ndata: b\r\n\r\ndata\n\nretry\n\n";
    assert_eq!(read(&[stream]).unwrap(), ["one", "two", "a\nb", ""]);
}

#[test]
fn an_event_without_its_empty_line_is_not_emitted() {
    assert_eq!(read(&[b"data: one\n\ndata: two\n"]).unwrap(), ["one"]);
}

#[test]
fn an_endless_line_and_an_endless_event_are_rejected() {
    let piece = [b'x'; 4096];
    let mut parser = SseParser::default();
    let mut refuse =
        || (0..300).find_map(|_| parser.feed(&piece, |_| Ok::<_, EventTooLong>(())).err());
    assert_eq!(refuse(), Some(EventTooLong));
    assert_eq!(parser.line.len(), MAX_EVENT_BYTES / 4096 * 4096);
    let line = [b"data: ".as_slice(), &piece, b"\n"].concat();
    let mut parser = SseParser::default();
    let refused = (0..300).find_map(|_| parser.feed(&line, |_| Ok::<_, EventTooLong>(())).err());
    assert_eq!(refused, Some(EventTooLong));
}

/// The events of a body in these pieces, with its end.
fn read_body(pieces: &[&[u8]]) -> Vec<String> {
    let (mut parser, mut events) = (SseParser::default(), Vec::new());
    let mut event = |data: &[u8]| {
        events.push(String::from_utf8(data.to_vec()).unwrap());
        Ok::<_, EventTooLong>(())
    };
    for piece in pieces {
        parser.feed(piece, &mut event).unwrap();
    }
    parser.finish(&mut event).unwrap();
    events
}

#[test]
fn the_end_of_the_body_ends_an_event() {
    for end in ["", "\n", "\r", "\r\n", "\n\n"] {
        let body = format!("data: {{\"a\":1}}\n\ndata: [DONE]{end}");
        assert_eq!(read_body(&[body.as_bytes()]), ["{\"a\":1}", "[DONE]"], "{end:?}");
    }
    assert_eq!(read_body(&[b"data: one\n\ndat"]), ["one"]);
    assert!(read_body(&[]).is_empty());
}

#[test]
fn a_byte_order_mark_is_skipped_at_the_start_only() {
    let mark = "\u{feff}";
    let body = format!("{mark}data: one\n\n{mark}data: two\n\ndata: {mark}three\n\n");
    let expected = ["one".to_owned(), format!("{mark}three")];
    assert_eq!(read_body(&[body.as_bytes()]), expected);
    let bytes: Vec<_> = body.as_bytes().chunks(1).collect();
    assert_eq!(read_body(&bytes), expected);
    assert_eq!(read_body(&[format!("{mark}{{}}").as_bytes()]), ["{}"]);
}

#[test]
fn json_without_a_field_name_is_an_event() {
    let lines = b"{\"a\":1}\n{\"b\":\"}\"}\r\n[DONE]";
    assert_eq!(read_body(&[lines]), [r#"{"a":1}"#, r#"{"b":"}"}"#, "[DONE]"]);
    let indented = b"{\n  \"a\": [\n    1\n  ],\n\n  \"b\": \"\\\"{\"\n}\n";
    let whole = "{\n  \"a\": [\n    1\n  ],\n\n  \"b\": \"\\\"{\"\n}";
    assert_eq!(read_body(&[indented]), [whole]);
    let padded = b"\n   \n\t {\"a\":1}\n  {\"b\":2}\n";
    assert_eq!(read_body(&[padded]), ["\t {\"a\":1}", "  {\"b\":2}"]);
    // A field ends JSON that is incomplete.
    assert_eq!(read_body(&[b"[\n1\ndata: {}\n\n"]), ["[\n1", "{}"]);
    // JSON below a data line belongs to its event.
    assert_eq!(read_body(&[b"data: {}\n{\"a\":1}\n\n"]), ["{}\n{\"a\":1}"]);
}

#[test]
fn an_event_named_error_is_passed_on_as_an_error() {
    for (body, expected) in [
        ("event: error\ndata: {\"code\":400}\n\n", r#"{"error":{"code":400}}"#),
        ("data: {\"code\":400}\nevent: error\n\n", r#"{"error":{"code":400}}"#),
        ("error: {\"code\":400}\n\n", r#"{"error":{"code":400}}"#),
        ("event:error\ndata: no \"room\"\n\n", r#"{"error":"no \"room\""}"#),
        ("event: error\ndata: [DONE]\n\n", "[DONE]"),
        ("event: error\n\ndata: {}\n\n", "{}"),
        ("event: error\ndata\n\ndata: {}\n\n", "{}"),
        ("event: error\nevent: message\ndata: {}\n\n", "{}"),
    ] {
        assert_eq!(read_body(&[body.as_bytes()]), [expected], "{body:?}");
    }
}

#[test]
fn endless_json_without_a_field_name_is_rejected() {
    let mut parser = SseParser::default();
    let line = [b"{".as_slice(), &[b' '; 4095], b"\n"].concat();
    let refused = (0..300).find_map(|_| parser.feed(&line, |_| Ok::<_, EventTooLong>(())).err());
    assert_eq!(refused, Some(EventTooLong));
    assert!(parser.data.len() <= MAX_EVENT_BYTES);
}

proptest! {
    #[test]
    fn events_are_the_same_however_the_bytes_are_cut(
        texts in prop::collection::vec("[^\r\n]{0,12}", 0..8),
        ends in prop::collection::vec(prop::sample::select(vec!["\n", "\r\n", "\r"]), 8),
        cuts in prop::collection::vec(1usize..9, 0..200),
    ) {
        let end = |index: usize| ends[index % ends.len()];
        let mut stream = String::new();
        for (index, text) in texts.iter().enumerate() {
            stream.extend([": 주석", end(index), "data: ", text, end(index), end(index)]);
        }
        let mut rest = stream.as_bytes();
        let mut pieces = Vec::new();
        for cut in cuts {
            let (piece, after) = rest.split_at(cut.min(rest.len()));
            pieces.push(piece);
            rest = after;
        }
        pieces.push(rest);
        prop_assert_eq!(read(&pieces).unwrap(), texts);
    }

    #[test]
    fn no_bytes_make_the_parser_panic(pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..20)) {
        let mut parser = SseParser::default();
        for piece in pieces {
            let _ = parser.feed(&piece, |_| Ok::<_, EventTooLong>(()));
        }
    }
}
