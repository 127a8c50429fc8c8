//! Recognizes an answer that is code without any fence.

use std::time::Duration;

use crate::validate::{Language, is_program};

/// Time for one answer. An answer with the maximum number of tokens takes a few milliseconds.
const PARSE_TIMEOUT: Duration = Duration::from_millis(25);
/// Longer answers are not parsed.
const MAX_ANSWER_BYTES: usize = 64 * 1024;

/// Whether a complete answer without fences is code in the language that was asked for: all of it parses without
/// errors, and it is no prose that parses by chance. `false` for languages without a grammar.
pub(crate) fn looks_like_code(answer: &str, language: &str) -> bool {
    if answer.len() > MAX_ANSWER_BYTES {
        return false;
    }
    if language.eq_ignore_ascii_case("json") {
        let is_json = serde_json::from_str::<serde::de::IgnoredAny>(answer).is_ok();
        return is_json && answer.trim_start().starts_with(['{', '[']);
    }
    Language::from_name(language)
        .is_some_and(|language| is_program(answer, language, PARSE_TIMEOUT))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LANGUAGES: [&str; 7] = ["python", "js", "ts", "tsx", "java", "cpp", "csharp"];

    #[test]
    fn programs_are_code() {
        for (language, code) in [
            ("python", "def f(x):\n    return x\n"),
            ("python", "import os\n\n\nclass A:\n    pass\n"),
            ("python", "# adds\ntotal = a + b"),
            ("python", "@cache\ndef f(): ...\n"),
            ("python", "for x in y:\n    print(x)\n"),
            ("python", "print(\"안녕하세요\")"),
            ("js", "const f = (x) => x + 1;\nconsole.log(f(1));\n"),
            ("js", "export default function f() {}\n"),
            ("js", "app.get('/', (req, res) => res.send('a'));"),
            ("ts", "interface A { b: string }\ntype C = A | null;\n"),
            ("tsx", "const A = () => <div>한글</div>;\n"),
            ("java", "public class A {\n    public static void main(String[] a) {}\n}\n"),
            ("java", "import java.util.List;\nrecord A(int b) {}\n"),
            ("cpp", "#include <vector>\nint main() { return 0; }\n"),
            ("cpp", "std::vector<int> v = {1, 2};\n"),
            ("csharp", "using System;\nConsole.WriteLine(\"a\");\n"),
            ("csharp", "var a = 1;\n"),
            ("csharp", "namespace A { class B { } }\n"),
            ("json", "{\"a\": [1, null]}\n"),
        ] {
            assert!(looks_like_code(code, language), "{language}: {code}");
        }
    }

    #[test]
    fn prose_is_not_code_in_any_language() {
        for prose in [
            "",
            "안녕하세요",
            "안녕하세요(반갑습니다)",
            "이 함수는 리스트에서 중복을 제거합니다.",
            "Hello",
            "Hello (world)",
            "Sure, here",
            "Note: this",
            "Answer: yes\nReason: obvious",
            "let me",
            "pass",
            "global warming",
            "return",
            "The function returns x. Use `f(1)` to call it.",
            "- first\n- second\n",
            "* first\n* second\n",
            "1. first\n2. second\n",
            "# Heading\n\ntext\n",
            "# Heading\n",
            "42",
            "\"a\"",
            "Here it is:\n\ndef f(x):\n    return x\n",
            "{\"a\": 1}",
            "[1, 2]",
            "x + y",
        ] {
            for language in LANGUAGES {
                assert!(!looks_like_code(prose, language), "{language}: {prose}");
            }
        }
        assert!(!looks_like_code("42", "json") && !looks_like_code("{a", "json"));
        assert!(!looks_like_code("fn main() {}", "rust"));
    }

    #[test]
    fn broken_code_and_long_answers_are_not_parsed_as_code() {
        assert!(!looks_like_code("def f(:\n", "python"));
        assert!(!looks_like_code("x = 1\nprint x\n", "python"));
        assert!(!looks_like_code(&"x = 1\n".repeat(MAX_ANSWER_BYTES), "python"));
        let deep = format!("x = {}", "(".repeat(MAX_ANSWER_BYTES / 2));
        assert!(!looks_like_code(&deep, "python"));
    }
}
