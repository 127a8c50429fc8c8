//! The language in the info string of a fence.

/// Longer words are cut to this length, in characters. Names of languages are shorter.
const MAX_INFO_WORD_LEN: usize = 40;

/// The language that an info string names, as in `py`, `python title="a.py" {1,3}`, `py:app.py` and
/// `{.python .numberLines}`. "": there is none.
pub(super) fn info_word(info: &str) -> String {
    let info = info.trim();
    let word = match info.strip_prefix('{') {
        Some(attributes) => attributes
            .split(|letter: char| letter.is_whitespace() || matches!(letter, ',' | '}'))
            .find(|word| !word.is_empty() && !word.starts_with('#'))
            .unwrap_or_default(),
        None => info.split_whitespace().next().unwrap_or_default(),
    };
    let word = word.split([':', ',', ';', '{', '(', '[', '<']).next().unwrap_or_default();
    if word.contains('=') {
        return String::new();
    }
    language_of_class(word.trim_start_matches('.')).chars().take(MAX_INFO_WORD_LEN).collect()
}

/// The language in a class such as `language-python`.
pub(super) fn language_of_class(class: &str) -> &str {
    let class = class.strip_prefix("language-").unwrap_or(class);
    class.strip_prefix("lang-").unwrap_or(class)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_language_comes_first_in_an_info_string() {
        for (info, word) in [
            (" py title=x", "py"),
            ("python title=\"a.py\" {1,3}", "python"),
            ("python{1,3}", "python"),
            ("py:app.py", "py"),
            ("rust,ignore", "rust"),
            ("{.python .numberLines}", "python"),
            ("{#id .c++}", "c++"),
            ("{r, echo=FALSE}", "r"),
            ("language-c#", "c#"),
            ("title=\"a.py\"", ""),
            ("<|im_end|>", ""),
            ("{}", ""),
            ("", ""),
        ] {
            assert_eq!(info_word(info), word, "{info}");
        }
        assert_eq!(info_word(&"x".repeat(100)).len(), MAX_INFO_WORD_LEN);
    }
}
