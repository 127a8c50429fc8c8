//! Prompts that ask a model to fill in the middle, with the tokens of its own family, which are data
//! (`prompts/families.toml`). Prefix and suffix are always in the prompt whole and in order, and no
//! text of a caller's is a control token in it.

use std::sync::LazyLock;

use serde::Deserialize;

use crate::completion::question::Terms;

/// `prompts/families.toml`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Families {
    family: Vec<Family>,
}

/// Models that share their tokens.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Family {
    names: Vec<String>,
    not: Vec<String>,
    before: String,
    between: String,
    after: String,
    path: Option<String>,
    ends: Vec<String>,
    control: Vec<String>,
}

#[expect(clippy::expect_used, reason = "the file is part of the binary and a test reads it")]
static FAMILIES: LazyLock<Families> = LazyLock::new(|| {
    toml::from_str(include_str!("../../prompts/families.toml")).expect("families.toml")
});

/// A prompt, and what stops its answer.
#[derive(Debug)]
pub(crate) struct Filled {
    pub(crate) prompt: String,
    pub(crate) ends: &'static [String],
    /// The suffix was left out, since nobody knows how this model is told about it.
    pub(crate) without_suffix: bool,
}

/// The family that one of these names (a model's, its base model's) is of.
pub(crate) fn family<'a>(names: impl IntoIterator<Item = &'a str>) -> Option<&'static Family> {
    names.into_iter().find_map(|name| {
        let name = name.to_ascii_lowercase();
        let holds = |words: &[String]| words.iter().any(|word| name.contains(word.as_str()));
        FAMILIES.family.iter().find(|family| holds(&family.names) && !holds(&family.not))
    })
}

/// The prompt for the code around a cursor.
pub(crate) fn fill(family: Option<&'static Family>, prefix: &str, terms: &Terms) -> Filled {
    let suffix = &terms.suffix;
    let Some(family) = family else {
        // Any family may have made this model.
        let control: Vec<_> = FAMILIES.family.iter().flat_map(Family::markers).collect();
        let prompt = broken(prefix, &control);
        return Filled { prompt, ends: &[], without_suffix: !suffix.is_empty() };
    };
    let control: Vec<_> = family.control.iter().map(String::as_str).collect();
    let path = match (&family.path, terms.file_path.as_str()) {
        (Some(form), path) if !path.is_empty() => form.replace("{path}", &broken(path, &control)),
        _ => String::new(),
    };
    let Family { before, between, after, ends, .. } = family;
    let (prefix, suffix) = (broken(prefix, &control), broken(suffix, &control));
    let prompt = [&path, before, &prefix, between, &suffix, after].map(String::as_str).concat();
    Filled { prompt, ends, without_suffix: false }
}

impl Family {
    /// What no code holds by chance.
    fn markers(&self) -> impl Iterator<Item = &str> {
        [&self.before, &self.between, &self.after].into_iter().map(|marker| marker.trim())
    }
}

/// The text with a space behind the first letter of each control token in it: a tokenizer reads
/// those as text, and a model nearly as what they were.
fn broken(text: &str, control: &[&str]) -> String {
    let mut whole = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(letter) = rest.chars().next() {
        let (first, after) = rest.split_at(letter.len_utf8());
        whole.push_str(first);
        if control.iter().any(|token| rest.starts_with(token)) {
            whole.push(' ');
        }
        rest = after;
    }
    whole
}

#[cfg(test)]
mod tests {
    use hapa_proto::codegen::v1::CompleteCodeRequest;
    use proptest::prelude::*;

    use super::*;
    use crate::completion::question::Question;
    use crate::unicode::strip;

    fn filled(model: &str, prefix: &str, suffix: &str, path: &str) -> Filled {
        let request = CompleteCodeRequest {
            prefix: format!("x{prefix}"),
            suffix: suffix.to_owned(),
            file_path: path.to_owned(),
            ..Default::default()
        };
        fill(family([model]), prefix, &Question::check(request).unwrap().terms)
    }

    #[test]
    fn each_family_is_asked_in_its_own_tokens_and_an_unknown_one_with_the_prefix_alone() {
        let prompt = |model: &str| filled(model, "a(", ")\n", "").prompt;
        let qwen = "<|fim_prefix|>a(<|fim_suffix|>)\n<|fim_middle|>";
        assert_eq!(prompt("Qwen/Qwen2.5-Coder-7B"), qwen);
        let deepseek = "<｜fim▁begin｜>a(<｜fim▁hole｜>)\n<｜fim▁end｜>";
        assert_eq!(prompt("deepseek-ai/deepseek-coder-6.7b-instruct"), deepseek);
        assert_eq!(prompt("bigcode/starcoder2-3b"), "<fim_prefix>a(<fim_suffix>)\n<fim_middle>");
        assert_eq!(prompt("codellama/CodeLlama-7b-hf"), "<PRE> a( <SUF>)\n <MID>");
        for unknown in ["codellama/CodeLlama-34b-hf", "codellama/CodeLlama-7b-Python-hf", "gpt2"] {
            let filled = filled(unknown, "a(", ")\n", "b.py");
            assert_eq!((filled.prompt.as_str(), filled.without_suffix), ("a(", true), "{unknown}");
        }
        assert!(!filled("gpt2", "a(", "", "").without_suffix);
    }

    #[test]
    fn the_base_model_tells_the_family_of_an_adapter() {
        let named = family(["autocomplete", "deepseek-ai/DeepSeek-Coder-6.7B"]).unwrap();
        assert!(named.names.contains(&"deepseek-coder".to_owned()));
        assert!(family(["autocomplete"]).is_none());
    }

    #[test]
    fn the_path_comes_first_where_the_family_has_a_place_for_it() {
        let prompt = filled("qwen2.5-coder", "a", "", "src/<|fim_middle|>.py").prompt;
        assert_eq!(
            prompt,
            "<|file_sep|>src/< |fim_middle|>.py\n<|fim_prefix|>a<|fim_suffix|><|fim_middle|>"
        );
        assert!(!filled("starcoder2", "a", "", "a.py").prompt.contains("a.py"));
    }

    #[test]
    fn families_leave_room_for_a_stop_of_ours_and_list_their_markers_as_control() {
        for family in &FAMILIES.family {
            assert!(family.ends.len() <= 3, "{family:?}");
            for marker in family.markers() {
                assert!(family.control.iter().any(|token| token == marker), "{marker}");
            }
            let lower = |name: &String| name.to_ascii_lowercase() == *name;
            assert!(family.names.iter().all(lower) && family.not.iter().all(lower));
        }
    }

    const MODELS: [&str; 5] =
        ["qwen2.5-coder", "deepseek-coder", "starcoder2", "codellama", "none"];

    proptest! {
        #[test]
        fn prefix_and_suffix_are_always_whole_and_in_order(
            prefix in "[^<]{0,60}", suffix in "[^<]{0,60}", model in prop::sample::select(&MODELS[..]),
        ) {
            let (prefix, suffix) = (strip(&prefix).into_owned(), strip(&suffix).into_owned());
            let filled = filled(model, &prefix, &suffix, "");
            let at = filled.prompt.find(&prefix).unwrap() + prefix.len();
            prop_assert!(filled.without_suffix || filled.prompt[at..].contains(&suffix));
            if let Some(family) = family([model]) {
                let Family { before, between, after, .. } = family;
                prop_assert_eq!(filled.prompt, format!("{before}{prefix}{between}{suffix}{after}"));
            }
        }

        #[test]
        fn what_a_caller_writes_is_never_a_control_token_and_loses_nothing(
            parts in prop::collection::vec("(<\\||<|fim_prefix\\|>|<\\|fim_middle\\|>|<PRE>|<MID>|<fim_suffix>|<｜fim▁hole｜>|[a-z한 <>|]{0,4})", 0..12),
            model in prop::sample::select(&MODELS[..]),
        ) {
            let text = parts.concat();
            let prompt = filled(model, &text, &text, &text).prompt;
            let count = |control: &str| prompt.matches(control).count();
            match family([model]) {
                Some(family) => for marker in family.markers() {
                    prop_assert_eq!(count(marker), 1, "{}", prompt);
                },
                None => for marker in FAMILIES.family.iter().flat_map(Family::markers) {
                    prop_assert_eq!(count(marker), 0);
                },
            }
            let plain = |text: &str| text.replace(' ', "");
            prop_assert!(plain(&prompt).contains(&plain(&text)));
        }
    }
}
