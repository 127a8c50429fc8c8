//! The list of models of an engine.

use serde::Deserialize;

use crate::request::generate_params::MAX_MODEL_NAME_LEN;
use crate::request::unicode::{is_bidi, is_invisible};

/// GET /models.
#[derive(Debug, Deserialize)]
pub(crate) struct ModelList {
    pub(crate) data: Vec<ListedModel>,
}

#[derive(Clone, Debug, Deserialize)]
pub(crate) struct ListedModel {
    pub(crate) id: String,
    #[serde(default)]
    pub(crate) parent: Option<String>,
    #[serde(default)]
    pub(crate) max_model_len: Option<u32>,
    /// Origin of the weights.
    #[serde(default)]
    pub(crate) root: Option<String>,
}

impl ListedModel {
    /// `None` if no request could name the model. Names appear in lists, logs and traces, so they must
    /// be visible text and no longer than a request allows.
    pub(super) fn validated(self) -> Option<ListedModel> {
        let parent = self.parent.filter(|parent| is_valid_model_name(parent));
        is_valid_model_name(&self.id).then_some(ListedModel { parent, ..self })
    }
}

fn is_valid_model_name(name: &str) -> bool {
    let is_visible = |letter: char| {
        !letter.is_control() && !letter.is_whitespace() && !is_invisible(letter) && !is_bidi(letter)
    };
    (1..=MAX_MODEL_NAME_LEN).contains(&name.chars().count()) && name.chars().all(is_visible)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_that_no_request_could_name_is_not_listed() {
        let listed = |id: &str, parent: Option<&str>| {
            let model = ListedModel {
                id: id.to_owned(),
                parent: parent.map(str::to_owned),
                max_model_len: None,
                root: None,
            };
            model.validated().map(|model| (model.id, model.parent))
        };
        let own = listed("Qwen/Qwen2.5-Coder-7B@main:fp8", Some("기본"));
        assert_eq!(own.unwrap().1.as_deref(), Some("기본"));
        assert_eq!(listed("m", Some("a\nb")).unwrap().1, None);
        let long = "m".repeat(201);
        for odd in ["", "a b", "a\nb", "a\u{1b}[31m", "a\u{200b}", "a\u{202e}b", long.as_str()] {
            assert!(listed(odd, None).is_none(), "{odd:?}");
        }
    }
}
