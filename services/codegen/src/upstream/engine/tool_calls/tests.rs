//! Tests of the assembly of tool calls.

use proptest::prelude::*;

use super::*;

fn part(index: usize, id: &str, name: &str, arguments: &str) -> ToolCallDelta {
    let text = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    ToolCallDelta { index, id: text(id), name: text(name), arguments: arguments.to_owned() }
}

fn assemble(parts: &[ToolCallDelta]) -> Vec<(String, String, String)> {
    let mut calls = ToolCalls::default();
    for part in parts {
        calls.push(0, part).unwrap();
    }
    let rows = calls.into_calls().into_iter();
    rows.map(|call| (call.id, call.name, call.arguments)).collect()
}

fn row(id: &str, name: &str, arguments: &str) -> (String, String, String) {
    (id.to_owned(), name.to_owned(), arguments.to_owned())
}

#[test]
fn parts_are_assembled_by_index() {
    let parts = [
        part(0, "a", "first", ""),
        part(1, "b", "second", "{"),
        part(0, "", "", r#"{"x":"#),
        part(1, "", "", "}"),
        part(0, "", "", "1}"),
    ];
    assert_eq!(assemble(&parts), [row("a", "first", r#"{"x":1}"#), row("b", "second", "{}")]);
}

#[test]
fn a_repeated_id_or_name_is_not_appended() {
    let repeated = [part(0, "a", "name", "{"), part(0, "a", "name", "}")];
    assert_eq!(assemble(&repeated), [row("a", "name", "{}")]);
    let late = [part(0, "", "", "{"), part(0, "a", "name", "}")];
    assert_eq!(assemble(&late), [row("a", "name", "{}")]);
    // A new id for each part, as from older vLLM.
    let changing = [part(0, "a", "name", "{"), part(0, "b", "", "}")];
    assert_eq!(assemble(&changing), [row("a", "name", "{}")]);
}

#[test]
fn calls_with_the_same_index_are_separated_by_their_ids() {
    let parts = [
        part(0, "a", "first", "{"),
        part(0, "", "", "}"),
        part(0, "b", "second", "["),
        part(0, "", "", "]"),
        part(0, "a", "", " "),
    ];
    assert_eq!(assemble(&parts), [row("a", "first", "{} "), row("b", "second", "[]")]);
    // The same id at another index is the same call.
    let moved = [part(0, "a", "first", "{"), part(3, "a", "", "}")];
    assert_eq!(assemble(&moved), [row("a", "first", "{}")]);
}

#[test]
fn answers_have_calls_of_their_own() {
    let mut calls = ToolCalls::default();
    assert!(calls.is_empty());
    calls.push(1, &part(0, "a", "one", "1")).unwrap();
    calls.push(0, &part(0, "a", "zero", "0")).unwrap();
    calls.push(1, &part(0, "", "", "1")).unwrap();
    let arguments = |choice| -> Vec<_> {
        calls.of_choice(choice).map(|call| call.arguments.as_str()).collect()
    };
    assert_eq!((arguments(0), arguments(1), arguments(2)), (vec!["0"], vec!["11"], vec![]));
    assert!(!calls.is_empty());
}

#[test]
fn number_and_size_are_limited() {
    let mut calls = ToolCalls::default();
    for index in 0..MAX_TOOL_CALLS {
        calls.push(0, &part(index, "", "name", "")).unwrap();
    }
    assert_eq!(calls.push(0, &part(MAX_TOOL_CALLS, "", "name", "")), Err(ToolCallsTooLarge));
    calls.push(0, &part(5, "", "", "{}")).unwrap();
    let large = part(5, "", "", &"x".repeat(MAX_TOOL_CALL_BYTES - 4 * MAX_TOOL_CALLS - 2));
    calls.push(0, &large).unwrap();
    assert_eq!(calls.push(0, &part(5, "", "", "x")), Err(ToolCallsTooLarge));
    assert_eq!(calls.into_calls().len(), MAX_TOOL_CALLS);
}

proptest! {
    #[test]
    fn calls_are_the_same_however_their_arguments_are_cut(
        calls in prop::collection::vec(("[a-z]{1,8}", "\\PC{0,30}"), 1..5),
        order in prop::collection::vec((0..5_usize, 1..6_usize), 0..200),
        repeats in any::<bool>(),
    ) {
        let id = |index: usize| format!("call_{index}");
        let mut rests: Vec<Vec<char>> =
            calls.iter().map(|(_, arguments)| arguments.chars().collect()).collect();
        let mut parts: Vec<_> = calls.iter().enumerate()
            .map(|(index, (name, _))| part(index, &id(index), name, "")).collect();
        let mut cut = |index: usize, len: usize| {
            let rest = &mut rests[index];
            let text: String = rest.drain(..len.min(rest.len())).collect();
            let name = if repeats { calls[index].0.as_str() } else { "" };
            parts.push(part(index, if repeats { id(index) } else { String::new() }.as_str(), name, &text));
        };
        for (index, len) in order {
            cut(index % calls.len(), len);
        }
        for index in 0..calls.len() {
            cut(index, usize::MAX);
        }
        let expected: Vec<_> = calls.iter().enumerate()
            .map(|(index, (name, arguments))| row(&id(index), name, arguments)).collect();
        prop_assert_eq!(assemble(&parts), expected);
    }
}
