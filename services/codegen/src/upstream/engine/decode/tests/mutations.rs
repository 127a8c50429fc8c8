//! Recorded streams with one changed field: the rest of the answer stays readable. An independent
//! reference reader states which texts are still there.

use std::sync::LazyLock;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::fixtures::{self, Fixture};
use super::*;

static FIXTURES: LazyLock<Vec<Fixture>> = LazyLock::new(|| {
    let all = fixtures::load().into_iter();
    all.filter(|fixture| fixture.expected.get("error").is_none()).collect()
});

/// A change to one field or one element of a list.
#[derive(Clone, Debug)]
enum Mutation {
    Remove,
    Replace(Value),
    /// The key twice; the last one counts.
    DuplicateBefore(Value),
    DuplicateAfter(Value),
    /// A new field with this name beside it.
    Add(&'static str, Value),
}

fn mutation() -> impl Strategy<Value = Mutation> {
    let values = vec![
        Value::Null,
        json!(7),
        json!(-1),
        json!(0.5),
        json!(300),
        json!("x"),
        json!(""),
        json!(true),
        json!([]),
        json!([1]),
        json!([0, "y"]),
        json!({}),
        json!({"k": 1}),
        json!({"content": "z", "text": "z"}),
    ];
    let value = || prop::sample::select(values.clone());
    prop_oneof![
        1 => Just(Mutation::Remove),
        4 => value().prop_map(Mutation::Replace),
        1 => value().prop_map(Mutation::DuplicateBefore),
        1 => value().prop_map(Mutation::DuplicateAfter),
        2 => (prop::sample::select(vec!["unknown", "error"]), value())
            .prop_map(|(name, value)| Mutation::Add(name, value)),
    ]
}

/// Writes JSON with one mutation.
struct MutatedJson {
    /// Number of fields and elements before the one that changes.
    countdown: usize,
    mutation: Mutation,
    /// Path of the changed field, after it was written.
    path: Option<String>,
    /// Number of fields and elements.
    nodes: usize,
}

impl MutatedJson {
    fn write(&mut self, value: &Value, path: &str) -> String {
        match value {
            Value::Object(fields) => {
                let rows = fields.iter().flat_map(|(name, value)| {
                    self.entries(value, &format!("{path}.{name}"), Some(name))
                });
                format!("{{{}}}", rows.collect::<Vec<_>>().join(","))
            }
            Value::Array(values) => {
                let rows =
                    values.iter().flat_map(|value| self.entries(value, &format!("{path}[]"), None));
                format!("[{}]", rows.collect::<Vec<_>>().join(","))
            }
            other => other.to_string(),
        }
    }

    /// The texts of one field or element.
    fn entries(&mut self, value: &Value, path: &str, name: Option<&String>) -> Vec<String> {
        let key = |name: Option<&str>| name.map(|name| format!("{}:", json!(name)));
        let entry = |name: Option<&str>, value: &str| key(name).unwrap_or_default() + value;
        let name = name.map(String::as_str);
        let is_target = self.nodes == self.countdown;
        self.nodes += 1;
        let same = self.write(value, path);
        let same = entry(name, &same);
        if !is_target {
            return vec![same];
        }
        self.path = Some(path.to_owned());
        match &self.mutation {
            Mutation::Remove => vec![],
            Mutation::Replace(value) => vec![entry(name, &value.to_string())],
            Mutation::DuplicateBefore(value) => vec![entry(name, &value.to_string()), same],
            Mutation::DuplicateAfter(value) => vec![same, entry(name, &value.to_string())],
            Mutation::Add(added, value) => {
                let added = name.map(|_| entry(Some(added), &value.to_string()));
                added.into_iter().chain([same]).collect()
            }
        }
    }
}

fn number_of_nodes(value: &Value) -> usize {
    let mut writer =
        MutatedJson { countdown: usize::MAX, mutation: Mutation::Remove, path: None, nodes: 0 };
    writer.write(value, "");
    writer.nodes
}

/// The JSON of an event, if a line of a body has one.
fn event_of(line: &str) -> Option<Value> {
    let data = line.strip_prefix("data:")?;
    serde_json::from_str(data).ok().filter(Value::is_object)
}

fn reference_content(value: &Value) -> String {
    let is_text = |fields: &serde_json::Map<String, Value>| {
        let kind = fields.get("type").and_then(Value::as_str).unwrap_or_default();
        !["thinking", "reasoning", "refusal"].iter().any(|other| kind.contains(other))
    };
    let part = |part: &Value| match part {
        Value::String(text) => text.clone(),
        Value::Object(fields) if is_text(fields) => {
            fields.get("text").and_then(Value::as_str).unwrap_or_default().to_owned()
        }
        _ => String::new(),
    };
    match value {
        Value::Number(number) => number.to_string(),
        Value::Array(parts) => parts.iter().map(part).collect(),
        other => part(other),
    }
}

/// Whether a delta without text may have other content. No recorded stream has a message beside one.
fn has_content(delta: &serde_json::Map<String, Value>) -> bool {
    delta.keys().any(|name| !["role", "content"].contains(&name.as_str()))
}

/// The texts of an event by choice, read as simply as possible.
fn reference_texts(event: &Value) -> Vec<(usize, String)> {
    let choices = match &event["choices"] {
        Value::Array(choices) => choices.clone(),
        choice @ Value::Object(_) => vec![choice.clone()],
        _ => vec![],
    };
    let read = |(position, choice): (usize, &Value)| {
        choice.as_object()?;
        let index = choice["index"].as_u64().map_or(Some(position), |index| index.try_into().ok());
        let index = index.filter(|index| *index < 128)?;
        let delta = &choice["delta"];
        let in_delta =
            delta.as_str().map_or_else(|| reference_content(&delta["content"]), str::to_owned);
        let texts =
            [in_delta, reference_content(&choice["text"]), reference_content(&choice["content"])];
        let text = texts.into_iter().find(|text| !text.is_empty());
        // A delta without text may have other content.
        let was_streamed = text.is_some() || delta.as_object().is_some_and(has_content);
        let message = &choice["message"];
        let whole = || {
            message.as_str().map_or_else(|| reference_content(&message["content"]), str::to_owned)
        };
        Some((index, text.unwrap_or_else(|| if was_streamed { String::new() } else { whole() })))
    };
    choices.iter().enumerate().filter_map(read).collect()
}

/// Whether an event or one of its choices has an error.
fn reference_error(event: &Value) -> bool {
    let is_error = |holder: &Value| match &holder["error"] {
        Value::String(text) => !text.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
        _ => false,
    };
    let choices = &event["choices"];
    let own = std::slice::from_ref(choices);
    let choices = choices.as_array().map_or(own, Vec::as_slice);
    is_error(event) || choices.iter().any(is_error)
}

fn reference(lines: &[String]) -> (BTreeMap<usize, String>, bool) {
    let mut all = BTreeMap::<usize, String>::new();
    for event in lines.iter().filter_map(|line| event_of(line)) {
        for (choice, text) in reference_texts(&event) {
            all.entry(choice).or_default().push_str(&text);
        }
        if reference_error(&event) {
            return (all, true);
        }
    }
    (all, false)
}

/// Whether a field has an influence on the texts.
fn is_related(path: &str) -> bool {
    let exact = [".choices", ".choices[]", ".choices[].index", ".choices[].delta"];
    let inside = [".choices[].delta.content", ".choices[].message", ".choices[].text"];
    exact.contains(&path) || inside.iter().any(|begin| path.starts_with(begin))
}

fn non_empty(texts: impl Iterator<Item = (usize, String)>) -> Vec<(usize, String)> {
    texts.filter(|(_, text)| !text.is_empty()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn a_changed_field_changes_nothing_else(
        fixture in any::<prop::sample::Index>(),
        line in any::<prop::sample::Index>(),
        node in any::<prop::sample::Index>(),
        mutation in mutation(),
        cut in 1..300_usize,
    ) {
        let Fixture { name, body, .. } = fixture.get(&FIXTURES);
        let mut lines: Vec<_> = body.lines().map(str::to_owned).collect();
        let (original, _) = reference(&lines);
        let events: Vec<_> = lines.iter().enumerate()
            .filter_map(|(number, line)| Some((number, event_of(line)?))).collect();
        prop_assume!(!events.is_empty());
        let (number, event) = line.get(&events);
        let countdown = node.index(number_of_nodes(event));
        let mut writer = MutatedJson { countdown, mutation: mutation.clone(), path: None, nodes: 0 };
        lines[*number] = format!("data: {}", writer.write(event, ""));
        let path = writer.path.unwrap();

        let (expected, is_error) = reference(&lines);
        let mutated = lines.join("\n") + "\n";
        let pieces: Vec<_> = mutated.as_bytes().chunks(cut).collect();
        let (delta, error) = read_body(&pieces);
        let context = format!("{name} {path} {mutation:?}: {}", lines[*number]);
        prop_assert_eq!(error.is_some(), is_error, "{}", context);
        let found = texts(&delta).into_iter().map(|(choice, texts)| (choice, texts.text));
        let found = non_empty(found);
        prop_assert_eq!(&found, &non_empty(expected.into_iter()), "{}", context);
        if !is_error && (!is_related(&path) || matches!(mutation, Mutation::Add(..))) {
            prop_assert_eq!(&found, &non_empty(original.into_iter()), "{}", context);
            prop_assert!(delta.is_done || !body.contains("[DONE]"), "{}", context);
        }
    }
}
