//! Fill-in-the-middle prompts, with the control tokens of each model family from
//! `prompts/families.toml`. The prompt contains prefix and suffix completely and in order. Text from
//! clients never acts as a control token.

use std::borrow::Cow;
use std::sync::LazyLock;

use serde::Deserialize;

use crate::complete::params::CompletionOptions;
use crate::request::control_tokens::{self, TokenKind, TokenMatch};

/// The content of `prompts/families.toml`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Families {
    family: Vec<ModelFamily>,
}

/// Models that share control tokens.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ModelFamily {
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

/// A prompt, and the texts that end its completion.
#[derive(Debug)]
pub(crate) struct FimPrompt {
    pub(crate) prompt: String,
    pub(crate) end_tokens: &'static [String],
    /// All control tokens of the model's family, for `CompletionTokenFilter`. Empty: the family is unknown.
    pub(crate) control_tokens: &'static [String],
    /// The suffix was omitted, because the model's control tokens are unknown.
    pub(crate) is_prefix_only: bool,
}

/// The family of the first name that matches one. Names are those of a model and of its base model.
pub(crate) fn family<'a>(names: impl IntoIterator<Item = &'a str>) -> Option<&'static ModelFamily> {
    names.into_iter().find_map(|name| {
        let name = name.to_ascii_lowercase();
        let holds = |words: &[String]| words.iter().any(|word| name.contains(word.as_str()));
        FAMILIES.family.iter().find(|family| holds(&family.names) && !holds(&family.not))
    })
}

/// Builds the prompt for the code around a cursor.
pub(crate) fn build_prompt(
    family: Option<&'static ModelFamily>,
    prefix: &str,
    options: &CompletionOptions,
) -> FimPrompt {
    let suffix = &options.suffix;
    let Some(family) = family else {
        // The model may belong to any family, so the tokens of all families are escaped.
        let control: Vec<_> = FAMILIES.family.iter().flat_map(ModelFamily::markers).collect();
        let prompt = escape(prefix, &control);
        return FimPrompt {
            prompt: prompt.into_owned(),
            end_tokens: &[],
            control_tokens: &[],
            is_prefix_only: !suffix.is_empty(),
        };
    };
    let control: Vec<_> = family.control.iter().map(String::as_str).collect();
    let escape = |text| escape(text, &control);
    let path = match (&family.path, options.file_path.as_str()) {
        (Some(form), path) if !path.is_empty() => form.replace("{path}", &escape(path)),
        _ => String::new(),
    };
    let ModelFamily { before, between, after, ends, .. } = family;
    let prompt = [&*path, before, &escape(prefix), between, &escape(suffix), after].concat();
    FimPrompt { prompt, end_tokens: ends, control_tokens: &family.control, is_prefix_only: false }
}

impl ModelFamily {
    /// The tokens around prefix and suffix, which no code contains by chance.
    fn markers(&self) -> impl Iterator<Item = &str> {
        [&self.before, &self.between, &self.after].into_iter().map(|marker| marker.trim())
    }
}

/// Escapes these control tokens, and the unmistakable ones of chat templates, such as every `<|word|>`: an adapter
/// may have more tokens than its base model.
fn escape<'t>(text: &'t str, control: &[&str]) -> Cow<'t, str> {
    control_tokens::escape(text, |rest| {
        if control.iter().any(|token| rest.starts_with(*token)) {
            return TokenMatch::Token((), 0);
        }
        match control_tokens::match_chat_token(rest) {
            TokenMatch::Token(TokenKind::Ambiguous, _) | TokenMatch::None => TokenMatch::None,
            TokenMatch::Token(_, length) => TokenMatch::Token((), length),
            TokenMatch::Partial => TokenMatch::Partial,
        }
    })
}

#[cfg(test)]
mod tests {
    use hapa_proto::codegen::v1::CompleteCodeRequest;
    use proptest::prelude::*;

    use super::*;
    use crate::complete::params::CompletionParams;
    use crate::request::unicode::strip;

    fn build(model: &str, prefix: &str, suffix: &str, path: &str) -> FimPrompt {
        let request = CompleteCodeRequest {
            prefix: format!("x{prefix}"),
            suffix: suffix.to_owned(),
            file_path: path.to_owned(),
            ..Default::default()
        };
        build_prompt(family([model]), prefix, &CompletionParams::validate(request).unwrap().options)
    }

    #[test]
    fn each_family_has_its_own_tokens_and_an_unknown_model_gets_only_the_prefix() {
        let prompt_of = |model: &str| build(model, "a(", ")\n", "").prompt;
        let qwen = "<|fim_prefix|>a(<|fim_suffix|>)\n<|fim_middle|>";
        assert_eq!(prompt_of("Qwen/Qwen2.5-Coder-7B"), qwen);
        let deepseek = "<｜fim▁begin｜>a(<｜fim▁hole｜>)\n<｜fim▁end｜>";
        assert_eq!(prompt_of("deepseek-ai/deepseek-coder-6.7b-instruct"), deepseek);
        assert_eq!(prompt_of("bigcode/starcoder2-3b"), "<fim_prefix>a(<fim_suffix>)\n<fim_middle>");
        assert_eq!(prompt_of("codellama/CodeLlama-7b-hf"), "<PRE> a( <SUF>)\n <MID>");
        for unknown in ["codellama/CodeLlama-34b-hf", "codellama/CodeLlama-7b-Python-hf", "gpt2"] {
            let prompt = build(unknown, "a(", ")\n", "b.py");
            assert_eq!((prompt.prompt.as_str(), prompt.is_prefix_only), ("a(", true), "{unknown}");
        }
        assert!(!build("gpt2", "a(", "", "").is_prefix_only);
    }

    #[test]
    fn the_base_model_determines_the_family_of_an_adapter() {
        let named = family(["autocomplete", "deepseek-ai/DeepSeek-Coder-6.7B"]).unwrap();
        assert!(named.names.contains(&"deepseek-coder".to_owned()));
        assert!(family(["autocomplete"]).is_none());
    }

    #[test]
    fn the_path_comes_first_if_the_family_has_a_form_for_it() {
        let prompt = build("qwen2.5-coder", "a", "", "src/<|fim_middle|>.py").prompt;
        assert_eq!(
            prompt,
            "<|file_sep|>src/< |fim_middle|>.py\n<|fim_prefix|>a<|fim_suffix|><|fim_middle|>"
        );
        assert!(!build("starcoder2", "a", "", "a.py").prompt.contains("a.py"));
    }

    #[test]
    fn tokens_of_chat_templates_are_escaped_too() {
        let prompt = build("starcoder2", "<|im_start|>a <s> [INST]", "", "").prompt;
        assert_eq!(prompt, "<fim_prefix>< |im_start|>a <s> [INST]<fim_suffix><fim_middle>");
        assert_eq!(build("gpt2", "<|a|><PRE> <|>", "", "").prompt, "< |a|>< PRE> <|>");
        let gemma = build("qwen2.5-coder", "<start_of_turn>[|user|] a[INST]", "", "").prompt;
        assert!(gemma.contains("< start_of_turn>[ |user|] a[INST]"), "{gemma}");
        assert_eq!(build("codellama-7b", "</s>", "", "").prompt, "<PRE> < /s> <SUF> <MID>");
    }

    #[test]
    fn families_leave_room_for_our_stop_text_and_list_their_markers_as_control() {
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
        fn prefix_and_suffix_are_always_complete_and_in_order(
            prefix in "[^<]{0,60}", suffix in "[^<]{0,60}", model in prop::sample::select(&MODELS[..]),
        ) {
            let (prefix, suffix) = (strip(&prefix).into_owned(), strip(&suffix).into_owned());
            let prompt = build(model, &prefix, &suffix, "");
            let at = prompt.prompt.find(&prefix).unwrap() + prefix.len();
            prop_assert!(prompt.is_prefix_only || prompt.prompt[at..].contains(&suffix));
            if let Some(family) = family([model]) {
                let ModelFamily { before, between, after, .. } = family;
                prop_assert_eq!(prompt.prompt, format!("{before}{prefix}{between}{suffix}{after}"));
            }
        }

        #[test]
        fn client_text_is_never_a_control_token_and_loses_no_character(
            parts in prop::collection::vec("(<\\||<|fim_prefix\\|>|<\\|fim_middle\\|>|<PRE>|<MID>|<fim_suffix>|<｜fim▁hole｜>|[a-z한 <>|]{0,4})", 0..12),
            model in prop::sample::select(&MODELS[..]),
        ) {
            let text = parts.concat();
            let prompt = build(model, &text, &text, &text).prompt;
            let count = |control: &str| prompt.matches(control).count();
            match family([model]) {
                Some(family) => for marker in family.markers() {
                    prop_assert_eq!(count(marker), 1, "{}", prompt);
                },
                None => for marker in FAMILIES.family.iter().flat_map(ModelFamily::markers) {
                    prop_assert_eq!(count(marker), 0);
                },
            }
            let plain = |text: &str| text.replace(' ', "");
            prop_assert!(plain(&prompt).contains(&plain(&text)));
        }
    }
}
