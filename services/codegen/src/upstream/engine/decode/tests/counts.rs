//! Usage and log probabilities in the forms that engines send.

use super::*;

fn usage(events: &[&str]) -> Option<Usage> {
    let delta = read(events);
    let mut total = delta.usage;
    for piece in delta.pieces {
        merge_usage(&mut total, piece.usage);
    }
    total
}

#[test]
fn counts_are_read_in_any_form() {
    for (value, expected) in [
        ("7", 7),
        ("7.0", 7),
        ("4e9", 4_000_000_000),
        ("8000000000", u32::MAX),
        ("1e300", u32::MAX),
        ("1e999", u32::MAX),
        ("\"12\"", 12),
        ("\" 12.0 \"", 12),
        ("-3", 0),
        ("\"x\"", 0),
        ("null", 0),
        ("true", 0),
        ("[7]", 0),
    ] {
        let event = format!(
            r#"{{"choices":[],"usage":{{"prompt_tokens":{value},"completion_tokens":1}}}}"#
        );
        let usage = usage(&[&event]).unwrap();
        let total = u32::saturating_add(expected, 1);
        assert_eq!((usage.prompt_tokens, usage.total_tokens), (expected, total), "{value}");
    }
    for none in
        ["null", "{}", "[]", "[1,2,3]", "7", "\"x\"", r#"{"prompt_tokens":0,"total_tokens":null}"#]
    {
        let event = format!(r#"{{"choices":[],"usage":{none},"timings":{{"prompt_n":5}}}}"#);
        assert_eq!(usage(&[&event]), None, "{none}");
    }
}

#[test]
fn details_and_other_names_are_read() {
    let full = Usage {
        prompt_tokens: 10,
        completion_tokens: 20,
        total_tokens: 30,
        reasoning_tokens: 7,
        cached_tokens: 4,
    };
    for fields in [
        r#""prompt_tokens":10,"completion_tokens":20,"prompt_tokens_details":{"cached_tokens":4},"completion_tokens_details":{"reasoning_tokens":7}"#,
        r#""prompt_tokens":10.0,"completion_tokens":20,"prompt_tokens_details":{"cached_tokens":4},"completion_tokens_details":{"reasoning_tokens":7}"#,
        r#""prompt_tokens":10,"completion_tokens":20,"total_tokens":3,"reasoning_tokens":7,"prompt_tokens_details":{"cached_tokens":4}"#,
        r#""input_tokens":10,"output_tokens":20,"reasoning_tokens":7,"prompt_cache_hit_tokens":4"#,
    ] {
        let event = format!(r#"{{"choices":[],"usage":{{{fields}}}}}"#);
        assert_eq!(usage(&[&event]), Some(full), "{fields}");
        let groq = format!(r#"{{"choices":[],"x_groq":{{"usage":{{{fields}}}}}}}"#);
        assert_eq!(usage(&[&groq]), Some(full), "{fields}");
    }
    let odd = r#"{"choices":[],"usage":{"prompt_tokens":1,"prompt_tokens_details":null,"completion_tokens_details":[9]}}"#;
    assert_eq!(usage(&[odd]).unwrap().total_tokens, 1);
}

#[test]
fn later_zeros_do_not_replace_a_usage() {
    let first =
        r#"{"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":3,"total_tokens":8}}"#;
    let zeros =
        r#"{"choices":[],"usage":{"prompt_tokens":0,"completion_tokens":0,"total_tokens":0}}"#;
    let lower =
        r#"{"choices":[],"usage":{"prompt_tokens":4,"completion_tokens":9,"total_tokens":null}}"#;
    let none = r#"{"choices":[],"usage":null}"#;
    let usage = usage(&[first, zeros, none, "{}", lower]).unwrap();
    assert_eq!((usage.prompt_tokens, usage.completion_tokens, usage.total_tokens), (5, 9, 14));
}

#[test]
fn a_usage_beside_one_choice_belongs_to_it() {
    let one =
        r#"{"choices":[{"index":1,"text":"a"}],"usage":{"prompt_tokens":5,"completion_tokens":1}}"#;
    let next =
        r#"{"choices":[{"index":1,"text":"b"}],"usage":{"prompt_tokens":5,"completion_tokens":2}}"#;
    let delta = read(&[one, next]);
    assert_eq!(delta.usage, None);
    assert_eq!((delta.pieces.len(), delta.pieces[0].events), (1, 2));
    assert_eq!(delta.pieces[0].usage.unwrap().total_tokens, 7);
    let empty = r#"{"choices":[{"index":1,"text":""}],"usage":{"prompt_tokens":5}}"#;
    assert_eq!(read(&[empty]).pieces[0].content, Content::None);
    let two = r#"{"choices":[{"index":0,"text":"a"},{"index":1,"text":"b"}],"usage":{"prompt_tokens":5}}"#;
    let delta = read(&[two]);
    assert!(delta.usage.is_some() && delta.pieces.iter().all(|piece| piece.usage.is_none()));
    let own = r#"{"choices":[{"index":0,"delta":{},"finish_reason":"stop","usage":{"prompt_tokens":5}}]}"#;
    assert_eq!(read(&[own]).pieces[0].usage.unwrap().prompt_tokens, 5);
}

#[test]
fn log_probabilities_are_read_in_any_form() {
    for (logprobs, sum, tokens) in [
        (r#"{"token_logprobs":[-0.5,null,-0.25],"tokens":["a","b","c"]}"#, -0.75, 2),
        (r#"{"content":[{"token":"a","logprob":-0.5},{"logprob":null},{}]}"#, -0.5, 1),
        (r#"{"content":[{"logprob":"NaN"},null,7,"x",{"logprob":-0.5}]}"#, -0.5, 1),
        (r#"{"content":[{"logprob":NaN},{"logprob":-Infinity},{"logprob":-0.5}]}"#, -0.5, 1),
        (r#"{"token_logprobs":[0.001,-0.5,"NaN",[]]}"#, -0.5, 2),
        (r#"{"token_logprobs":[-0.5],"content":[{"logprob":-0.5}]}"#, -0.5, 1),
        (r#"{"token_logprobs":[],"content":[{"logprob":-0.5}]}"#, -0.5, 1),
        (r#"{"token_logprobs":{},"content":7}"#, 0.0, 0),
        ("null", 0.0, 0),
        ("[]", 0.0, 0),
        ("[-0.5]", 0.0, 0),
        ("true", 0.0, 0),
    ] {
        let event = choice_event(&format!(r#""text":"a","logprobs":{logprobs}"#));
        let delta = read(&[&event, &choice_event(r#""text":"b""#)]);
        let piece = &delta.pieces[0];
        assert!((piece.logprob - sum).abs() < 1e-9, "{logprobs}: {}", piece.logprob);
        assert_eq!(piece.logprob_tokens, tokens, "{logprobs}");
        assert_eq!(delta.pieces.len(), if tokens == 0 { 1 } else { 2 }, "{logprobs}");
    }
    // A token without text, such as a part of a character.
    let empty = choice_event(r#""text":"","logprobs":{"token_logprobs":[-0.5]}"#);
    let delta = read(&[&empty]);
    assert_eq!((&delta.pieces[0].content, delta.pieces[0].events), (&Content::None, 0));
}

#[test]
fn reasoning_that_only_the_total_contains_counts_as_completion() {
    for (counts, expected) in [
        (r#""prompt_tokens":32,"completion_tokens":9,"total_tokens":135"#, (32, 103, 135)),
        (r#""prompt_tokens":32,"completion_tokens":null,"total_tokens":135"#, (32, 103, 135)),
        (r#""prompt_tokens":"32","completion_tokens":9,"total_tokens":135"#, (32, 103, 135)),
        (r#""prompt_tokens":32,"completion_tokens":9,"total_tokens":40"#, (32, 9, 41)),
        (r#""prompt_tokens":0,"completion_tokens":9,"total_tokens":40"#, (0, 9, 40)),
        (r#""prompt_tokens":4294967295,"completion_tokens":9"#, (u32::MAX, 9, u32::MAX)),
    ] {
        let event = format!(r#"{{"choices":[],"usage":{{{counts}}}}}"#);
        let usage = usage(&[&event]).unwrap();
        let found = (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens);
        assert_eq!(found, expected, "{counts}");
    }
}
