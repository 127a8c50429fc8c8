//! Events that differ from an earlier one only in their text and their token counts, as most events of a stream do. They
//! are recognised by comparing bytes, which takes a tenth of the time for parsing JSON.

use std::borrow::Cow;

use hapa_proto::codegen::v1::Usage;
use memchr::memmem;

use crate::upstream::engine::decode::counts::complete_usage;
use crate::upstream::engine::decode::usual::{OnlyText, UsualEvent};
use crate::upstream::engine::decode::{ChoiceEvent, StreamedChoices};
use crate::upstream::engine::delta::EngineDelta;

/// The counts that may differ between two events, by the bytes in front of each.
const COUNTERS: [(Counter, &[u8]); 3] = [
    (Counter::Prompt, b"\"prompt_tokens\":"),
    (Counter::Completion, b"\"completion_tokens\":"),
    (Counter::Total, b"\"total_tokens\":"),
];
/// Maximum number of digits of a count, so that it fits into a `u32`.
const MAX_DIGITS: usize = 9;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Counter {
    Prompt,
    Completion,
    Total,
}

/// An event without its text and its counts.
#[derive(Debug)]
pub(super) struct EventPattern {
    /// The bytes in front of the text.
    prefix: Vec<u8>,
    /// The bytes in front of each count, up to it.
    counts: Vec<(Vec<u8>, Counter)>,
    /// The bytes after the last count.
    suffix: Vec<u8>,
    choice: usize,
    is_reasoning: bool,
    model: String,
    usage: Option<Usage>,
}

impl EventPattern {
    /// From an event that was parsed from these bytes. `None` if it contains more than a text and counts.
    pub(super) fn learn(data: &[u8], event: &UsualEvent<'_>) -> Option<EventPattern> {
        let OnlyText { text, choice, is_reasoning, usage, model } = event.only_text()?;
        // The text is a part of the data, because it is borrowed.
        let start = (text.as_ptr() as usize).checked_sub(data.as_ptr() as usize)?;
        let mut rest = data.get(start + text.len()..)?;
        let mut found: Vec<_> = COUNTERS
            .iter()
            .filter_map(|(counter, name)| Some((memmem::find(rest, name)? + name.len(), *counter)))
            .collect();
        found.sort_unstable_by_key(|(position, _)| *position);
        let (mut counts, mut offset) = (Vec::new(), 0);
        for (position, counter) in found {
            counts.push((rest.get(..position - offset)?.to_vec(), counter));
            rest = skip_number(rest.get(position - offset..)?)?.1;
            offset = data.len() - start - text.len() - rest.len();
        }
        let prefix = data.get(..start)?.to_vec();
        let model = model.to_owned();
        let pattern = EventPattern {
            prefix,
            counts,
            suffix: rest.to_vec(),
            choice,
            is_reasoning,
            model,
            usage,
        };
        pattern.is_confirmed().then_some(pattern)
    }

    /// Adds an event, if it has this pattern.
    pub(super) fn push(
        &self,
        data: &[u8],
        delta: &mut EngineDelta,
        streamed: &mut StreamedChoices,
    ) -> bool {
        let Some((text, usage)) = self.read(data) else { return false };
        let mut event = ChoiceEvent { choice: self.choice, usage, ..ChoiceEvent::default() };
        *(if self.is_reasoning { &mut event.reasoning } else { &mut event.text }) =
            Cow::Borrowed(text);
        delta.push_model(&self.model);
        streamed.record(&event);
        delta.push_choice(event);
        true
    }

    /// The text and the usage of an event with this pattern.
    fn read<'a>(&self, data: &'a [u8]) -> Option<(&'a str, Option<Usage>)> {
        let rest = data.strip_prefix(self.prefix.as_slice())?;
        let (text, mut rest) = rest.split_at(memchr::memchr(b'"', rest)?);
        if text.is_empty() || text.iter().any(|byte| *byte < b' ' || *byte == b'\\') {
            return None;
        }
        let mut usage = self.usage;
        for (literal, counter) in &self.counts {
            let (count, after) = skip_number(rest.strip_prefix(literal.as_slice())?)?;
            rest = after;
            let usage = usage.get_or_insert_default();
            *match counter {
                Counter::Prompt => &mut usage.prompt_tokens,
                Counter::Completion => &mut usage.completion_tokens,
                Counter::Total => &mut usage.total_tokens,
            } = count;
        }
        if rest != self.suffix {
            return None;
        }
        if self.counts.iter().all(|(_, counter)| *counter != Counter::Total)
            && let Some(usage) = &mut usage
        {
            // The sum, unless the event has it.
            usage.total_tokens = 0;
        }
        Some((str::from_utf8(text).ok()?, usage.and_then(complete_usage)))
    }

    /// Whether an event that is made from the pattern is parsed as the pattern reads it.
    fn is_confirmed(&self) -> bool {
        let mut data = self.prefix.clone();
        data.push(b't');
        for (number, (literal, _)) in (7_u8..).zip(&self.counts) {
            data.extend_from_slice(literal);
            data.extend_from_slice(number.to_string().as_bytes());
        }
        data.extend_from_slice(&self.suffix);
        let Some((event, len)) = UsualEvent::parse(&data) else { return false };
        let (mut parsed, mut read) = (EngineDelta::default(), EngineDelta::default());
        let (mut parsed_choices, mut read_choices) = Default::default();
        parsed.push_usual(event, &mut parsed_choices);
        self.push(&data, &mut read, &mut read_choices)
            && len == data.len()
            && (parsed.pieces, parsed.usage, parsed.model) == (read.pieces, read.usage, read.model)
            && parsed_choices == read_choices
    }
}

/// A number at the start, and the bytes after it. `None` for a number that JSON does not allow, or a large one.
fn skip_number(bytes: &[u8]) -> Option<(u32, &[u8])> {
    let len = bytes.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let (digits, rest) = bytes.split_at(len);
    let is_valid = (1..=MAX_DIGITS).contains(&len) && (len == 1 || digits[0] != b'0');
    // More of a number, such as a fraction, belongs to the bytes between two counts and would differ.
    is_valid.then(|| {
        (digits.iter().fold(0, |number, digit| number * 10 + u32::from(digit - b'0')), rest)
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use crate::upstream::engine::decode::StreamDecoder;

    use super::*;

    fn learn(data: &str) -> Option<EventPattern> {
        let (event, _) = UsualEvent::parse(data.as_bytes())?;
        EventPattern::learn(data.as_bytes(), &event)
    }

    const CHAT: &str = r#"{"id":"c","model":"m","choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}],"usage":{"prompt_tokens":5,"total_tokens":6,"completion_tokens":1}}"#;

    #[test]
    fn an_event_with_another_text_and_other_counts_has_the_pattern() {
        let pattern = learn(CHAT).unwrap();
        let other = CHAT.replace(r#""a""#, r#""한 b""#).replace(":6,", ":12345,");
        let (text, usage) = pattern.read(other.as_bytes()).unwrap();
        assert_eq!((text, usage.unwrap().total_tokens), ("한 b", 12_345));
        for (from, to) in [
            (r#""a""#, r#""""#),
            (r#""a""#, r#""\n""#),
            (r#""a""#, "null"),
            ("null", r#""stop""#),
            (r#""m""#, r#""n""#),
            (":0,", ":1,"),
            (":6,", ":06,"),
            (":6,", ":6.5,"),
            (":6,", ":9999999999,"),
            ("}}", "}} "),
            (r#""id""#, r#""error""#),
        ] {
            let other = CHAT.replacen(from, to, 1);
            assert_ne!(other, CHAT);
            assert_eq!(pattern.read(other.as_bytes()), None, "{other}");
        }
    }

    #[test]
    fn only_events_with_one_plain_text_are_learned() {
        for (from, to) in [
            (r#""a""#, r#""\u0061""#),
            (r#"{"content":"a"}"#, r#"{"content":"a","reasoning":"b"}"#),
            (r#"{"content":"a"}"#, "{}"),
            ("null", r#""stop""#),
            (
                r#""finish_reason":null}"#,
                r#""finish_reason":null},{"index":1,"delta":{"content":"b"}}"#,
            ),
            (r#""usage":{"#, r#""x":{"prompt_tokens":1},"usage":{"#),
        ] {
            let other = CHAT.replacen(from, to, 1);
            assert_ne!(other, CHAT);
            assert!(learn(&other).is_none(), "{other}");
        }
        let reasoning = CHAT.replace("content", "reasoning_content");
        assert!(learn(&reasoning).is_some_and(|pattern| pattern.is_reasoning));
        assert!(learn(&CHAT.replace(r#","usage""#, r#","x""#)).is_none_or(|p| p.usage.is_none()));
    }

    proptest! {
        #[test]
        fn a_stream_reads_the_same_with_and_without_patterns(
            events in prop::collection::vec(("\\PC{0,4}|[a-z\"\\\\]{0,3}", 0_u32..20_000, 0_usize..2), 0..20),
            is_counted in any::<bool>(),
        ) {
            let (mut with, mut without) = (EngineDelta::default(), EngineDelta::default());
            let mut decoder = StreamDecoder::default();
            for (text, count, name) in &events {
                let name = ["content", "reasoning"][*name];
                let usage = is_counted.then(|| json!({"prompt_tokens": 3, "completion_tokens": count}));
                let data = json!({
                    "choices": [{"index": 0, "delta": {name: text}, "finish_reason": null}],
                    "model": "m",
                    "usage": usage,
                }).to_string();
                decoder.push_event(data.as_bytes(), &mut with).unwrap();
                StreamDecoder::default().push_event(data.as_bytes(), &mut without).unwrap();
            }
            prop_assert_eq!(with.pieces, without.pieces);
            prop_assert_eq!((with.usage, with.model), (without.usage, without.model));
        }
    }
}
