//! The usual form of events: structs that borrow from the JSON. Fields that are rarely set must be null
//! or absent, so that an event that has one is read field by field.

use std::borrow::Cow;
use std::fmt;

use hapa_proto::codegen::v1::Usage;
use serde::de::{Error as _, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

use crate::upstream::engine::decode::counts::{LogprobSum, complete_usage};
use crate::upstream::engine::decode::oddity::Oddity;
use crate::upstream::engine::decode::{ChoiceEvent, MAX_ENTRIES, StreamedChoices, finish_reason};
use crate::upstream::engine::delta::{EngineDelta, merge_usage};

/// One event of a stream of chat or text completions.
#[derive(Debug, Deserialize)]
pub(super) struct UsualEvent<'a> {
    #[serde(default, rename = "")]
    _not_a_list: NotAList,
    #[serde(borrow, default)]
    model: Option<JsonText<'a>>,
    #[serde(borrow, default)]
    object: Option<JsonText<'a>>,
    #[serde(borrow, default)]
    choices: UsualChoices<'a>,
    #[serde(default)]
    usage: Option<UsualUsage>,
    #[serde(default, rename = "error")]
    _error: Null,
    #[serde(default, rename = "detail")]
    _detail: Null,
    #[serde(default, rename = "message")]
    _message: Null,
    #[serde(default, rename = "x_groq")]
    _x_groq: Null,
}

/// A string borrowed from the JSON. serde needs the `borrow` attribute on the field itself, which
/// `Option` hides.
#[derive(Debug, Deserialize)]
#[serde(transparent)]
struct JsonText<'a>(#[serde(borrow)] Cow<'a, str>);

/// The list of choices. The first one needs no allocation.
#[derive(Debug, Default)]
struct UsualChoices<'a> {
    first: Option<UsualChoice<'a>>,
    others: Vec<UsualChoice<'a>>,
}

#[derive(Debug, Deserialize)]
struct UsualChoice<'a> {
    #[serde(default, rename = "")]
    _not_a_list: NotAList,
    #[serde(default)]
    index: Option<u32>,
    #[serde(borrow, default)]
    delta: Option<UsualDelta<'a>>,
    #[serde(borrow, default)]
    text: Option<JsonText<'a>>,
    #[serde(default)]
    logprobs: Option<UsualLogprobs>,
    #[serde(borrow, default)]
    finish_reason: Option<JsonText<'a>>,
    #[serde(default, rename = "message")]
    _message: Null,
    #[serde(default, rename = "content")]
    _content: Null,
    #[serde(default, rename = "error")]
    _error: Null,
    #[serde(default, rename = "usage")]
    _usage: Null,
}

#[derive(Debug, Deserialize)]
struct UsualDelta<'a> {
    #[serde(default, rename = "")]
    _not_a_list: NotAList,
    #[serde(borrow, default)]
    content: Option<JsonText<'a>>,
    #[serde(borrow, default)]
    reasoning_content: Option<JsonText<'a>>,
    #[serde(borrow, default)]
    reasoning: Option<JsonText<'a>>,
    #[serde(default, rename = "thinking")]
    _thinking: Null,
    #[serde(default, rename = "thinking_blocks")]
    _thinking_blocks: Null,
    #[serde(default, rename = "reasoning_details")]
    _reasoning_details: Null,
    #[serde(default, rename = "finish_reason")]
    _finish_reason: Null,
    #[serde(default, rename = "refusal")]
    _refusal: Null,
    #[serde(default, rename = "tool_calls")]
    _tool_calls: Null,
    #[serde(default, rename = "function_call")]
    _function_call: Null,
}

/// Log probabilities in the form of vLLM's text completions, or in that of OpenAI's chat.
#[derive(Debug, Deserialize)]
struct UsualLogprobs {
    #[serde(default, rename = "")]
    _not_a_list: NotAList,
    #[serde(default)]
    token_logprobs: Option<Vec<Option<f64>>>,
    #[serde(default)]
    content: Option<Vec<UsualTokenLogprob>>,
}

#[derive(Debug, Deserialize)]
struct UsualTokenLogprob {
    #[serde(default, rename = "")]
    _not_a_list: NotAList,
    #[serde(default)]
    logprob: Option<f64>,
}

#[derive(Debug, Deserialize)]
struct UsualUsage {
    #[serde(default, rename = "")]
    _not_a_list: NotAList,
    #[serde(default)]
    prompt_tokens: Option<u32>,
    #[serde(default)]
    completion_tokens: Option<u32>,
    #[serde(default)]
    total_tokens: Option<u32>,
    #[serde(default)]
    reasoning_tokens: Option<u32>,
    #[serde(default)]
    prompt_tokens_details: Option<UsualTokenDetails>,
    #[serde(default)]
    completion_tokens_details: Option<UsualTokenDetails>,
    #[serde(default, rename = "input_tokens")]
    _input_tokens: Null,
    #[serde(default, rename = "output_tokens")]
    _output_tokens: Null,
    #[serde(default, rename = "prompt_cache_hit_tokens")]
    _prompt_cache_hit_tokens: Null,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
struct UsualTokenDetails {
    #[serde(default, rename = "")]
    _not_a_list: NotAList,
    #[serde(default)]
    cached_tokens: Option<u32>,
    #[serde(default)]
    reasoning_tokens: Option<u32>,
}

/// A field that must be null.
#[derive(Debug, Default, Deserialize)]
struct Null;

/// serde reads structs from lists too. This first field refuses them.
#[derive(Clone, Copy, Debug, Default)]
struct NotAList;

impl<'de> Deserialize<'de> for NotAList {
    fn deserialize<D: Deserializer<'de>>(_: D) -> Result<NotAList, D::Error> {
        Err(D::Error::custom("a list in place of an object"))
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for UsualChoices<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<UsualChoices<'a>, D::Error> {
        deserializer.deserialize_any(UsualChoices::default())
    }
}

impl<'de: 'a, 'a> Visitor<'de> for UsualChoices<'a> {
    type Value = UsualChoices<'a>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of choices or null")
    }

    fn visit_unit<E>(self) -> Result<UsualChoices<'a>, E> {
        Ok(self)
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut list: A) -> Result<UsualChoices<'a>, A::Error> {
        self.first = list.next_element()?;
        while let Some(choice) = list.next_element()? {
            if self.others.len() + 1 == MAX_ENTRIES {
                return Err(A::Error::custom("too many choices"));
            }
            self.others.push(choice);
        }
        Ok(self)
    }
}

impl<'a> UsualEvent<'a> {
    /// Parses the value at the start, and returns its length. `None` if it has another form.
    pub(super) fn parse(data: &'a [u8]) -> Option<(UsualEvent<'a>, usize)> {
        if !data.starts_with(b"{") {
            return None;
        }
        let mut values = serde_json::Deserializer::from_slice(data).into_iter::<UsualEvent<'a>>();
        let event = values.next()?.ok()?;
        let is_error = event.object.as_ref().is_some_and(|JsonText(object)| object == "error");
        (!is_error).then(|| (event, values.byte_offset()))
    }
}

impl<'a> UsualEvent<'a> {
    /// Its text, if it contains nothing else but counts, and the text is borrowed.
    pub(super) fn only_text(&self) -> Option<OnlyText<'a, '_>> {
        let choice = self.choices.first.as_ref().filter(|_| self.choices.others.is_empty())?;
        if choice.logprobs.is_some() || choice.finish_reason.is_some() {
            return None;
        }
        let index = usize::try_from(choice.index.unwrap_or_default()).ok();
        let index = index.filter(|index| *index < MAX_ENTRIES)?;
        let delta = choice.delta.as_ref();
        let used = |text: &Option<JsonText<'a>>| match text {
            Some(JsonText(Cow::Borrowed(text))) if !text.is_empty() => Some(*text),
            _ => None,
        };
        let answers = [used(&choice.text), delta.and_then(|delta| used(&delta.content))];
        let reasonings = [
            delta.and_then(|delta| used(&delta.reasoning_content)),
            delta.and_then(|delta| used(&delta.reasoning)),
        ];
        let mut texts = answers.into_iter().chain(reasonings).flatten();
        let (text, None) = (texts.next()?, texts.next()) else { return None };
        Some(OnlyText {
            text,
            choice: index,
            is_reasoning: reasonings.iter().any(Option::is_some),
            usage: self.usage.as_ref().and_then(UsualUsage::read),
            model: self.model.as_ref().map_or("", |JsonText(model)| model),
        })
    }
}

/// The contents of an event that has one text.
pub(super) struct OnlyText<'a, 'e> {
    /// A part of the event's bytes.
    pub(super) text: &'a str,
    pub(super) choice: usize,
    pub(super) is_reasoning: bool,
    pub(super) usage: Option<Usage>,
    pub(super) model: &'e str,
}

impl EngineDelta {
    pub(super) fn push_usual(&mut self, event: UsualEvent<'_>, streamed: &mut StreamedChoices) {
        if let Some(JsonText(model)) = &event.model {
            self.push_model(model);
        }
        let mut usage = event.usage.as_ref().and_then(UsualUsage::read);
        let is_single = event.choices.others.is_empty();
        let choices = event.choices.first.into_iter().chain(event.choices.others);
        for mut choice in choices.zip(0..).filter_map(|(choice, position)| choice.read(position)) {
            if is_single {
                choice.usage = usage.take();
            }
            streamed.record(&choice);
            self.push_choice(choice);
        }
        merge_usage(&mut self.usage, usage);
    }
}

impl<'a> UsualChoice<'a> {
    /// `None` if its index exceeds the limit. Without an index, its position counts.
    fn read(self, position: u32) -> Option<ChoiceEvent<'a>> {
        let choice = usize::try_from(self.index.unwrap_or(position)).ok();
        let Some(choice) = choice.filter(|choice| *choice < MAX_ENTRIES) else {
            Oddity::OverLimit.count();
            return None;
        };
        let mut event = ChoiceEvent { choice, ..ChoiceEvent::default() };
        let used = |text: Option<JsonText<'a>>| {
            text.map(|JsonText(text)| text).filter(|text| !text.is_empty())
        };
        if let Some(delta) = self.delta {
            event.text = used(delta.content).unwrap_or_default();
            let reasoning = used(delta.reasoning_content).or_else(|| used(delta.reasoning));
            event.reasoning = reasoning.unwrap_or_default();
        }
        if event.text.is_empty() {
            event.text = used(self.text).unwrap_or_default();
        }
        event.logprobs = self.logprobs.map(UsualLogprobs::read).unwrap_or_default();
        event.finish_reason = self.finish_reason.and_then(|JsonText(text)| finish_reason(&text));
        Some(event)
    }
}

impl UsualLogprobs {
    /// Some engines send both lists for the same tokens.
    fn read(self) -> LogprobSum {
        let tokens = self.token_logprobs.into_iter().flatten().flatten();
        let sum: LogprobSum = tokens.collect();
        if sum.tokens > 0 {
            return sum;
        }
        self.content.into_iter().flatten().filter_map(|token| token.logprob).collect()
    }
}

impl UsualUsage {
    fn read(&self) -> Option<Usage> {
        let prompt = self.prompt_tokens_details.unwrap_or_default();
        let completion = self.completion_tokens_details.unwrap_or_default();
        let reasoning_tokens = completion.reasoning_tokens.or(self.reasoning_tokens);
        complete_usage(Usage {
            prompt_tokens: self.prompt_tokens.unwrap_or_default(),
            completion_tokens: self.completion_tokens.unwrap_or_default(),
            total_tokens: self.total_tokens.unwrap_or_default(),
            reasoning_tokens: reasoning_tokens.unwrap_or_default(),
            cached_tokens: prompt.cached_tokens.unwrap_or_default(),
        })
    }
}
