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

/// Words of frequent languages and formats. Only where a fence could also be prose, its word must be one of them.
#[rustfmt::skip]
const LANGUAGES: &[&str] = &[
    "asm", "awk", "bash", "bat", "c", "c#", "c++", "cc", "clojure", "cmake", "console", "cpp", "cs", "csharp", "css",
    "csv", "cuda", "dart", "diff", "dockerfile", "elixir", "erlang", "f#", "fortran", "fsharp", "go", "golang",
    "graphql", "groovy", "haskell", "hcl", "html", "http", "ini", "java", "javascript", "jinja", "js", "json", "json5",
    "jsx", "julia", "kotlin", "latex", "lua", "makefile", "markdown", "md", "nginx", "objective-c", "ocaml", "perl",
    "php", "plaintext", "powershell", "proto", "protobuf", "py", "python", "python3", "r", "rb", "rs", "ruby", "rust",
    "scala", "scss", "sh", "shell", "sql", "svelte", "swift", "text", "toml", "ts", "tsx", "typescript", "txt", "vb",
    "verilog", "vim", "vue", "xml", "yaml", "yml", "zig",
];

/// Whether a word names a language.
pub(super) fn is_language(word: &str) -> bool {
    LANGUAGES.iter().any(|language| language.eq_ignore_ascii_case(word))
}

/// Whether an info string may contain this character.
pub(super) fn is_info_char(letter: char) -> bool {
    letter.is_ascii_alphanumeric() || "_.+#{}=:\"'/, \t-".contains(letter)
}

/// Whether a text is "", one word, or a word and attributes.
pub(super) fn is_info(text: &str) -> bool {
    let text = text.trim();
    let mut words = text.split_whitespace();
    let Some(first) = words.next() else { return true };
    if text.starts_with('{') {
        return text.ends_with('}') && text.chars().all(is_info_char);
    }
    let is_name = first.starts_with(|letter: char| letter.is_ascii_alphabetic())
        && !first.ends_with(['.', ':', ','])
        && text.chars().all(is_info_char);
    is_name && words.all(|word| word.contains(['=', ':', '{', '}']))
}

/// Whether a text after a fence in a block is the info string of another block, and no prose.
pub(super) fn is_nested_info(text: &str) -> bool {
    let has_capital = |word: &str| word.contains(|letter: char| letter.is_ascii_uppercase());
    is_info(text) && (is_language(&info_word(text)) || !text.split_whitespace().any(has_capital))
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
