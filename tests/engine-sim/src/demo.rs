//! The demo engine: canned answers that depend on the question and on nothing else.

use std::time::Duration;

use serde_json::Value;

use crate::Script;

/// An answer, with a word in the question that selects it.
struct Answer {
    topics: &'static [&'static str],
    summary: &'static str,
    language: &'static str,
    code: &'static str,
}

/// The last one has no topics and answers all other questions.
const ANSWERS: &[Answer] = &[
    Answer {
        topics: &["sort", "정렬"],
        summary: "This function sorts a list by merging sorted halves.",
        language: "python",
        code: "def merge_sort(items: list[int]) -> list[int]:\n    if len(items) <= 1:\n        return items\n    \
               middle = len(items) // 2\n    left, right = merge_sort(items[:middle]), merge_sort(items[middle:])\n    \
               merged = []\n    while left and right:\n        \
               merged.append(left.pop(0) if left[0] <= right[0] else right.pop(0))\n    return merged + left + right\n",
    },
    Answer {
        topics: &["fibonacci", "피보나치"],
        summary: "This function computes Fibonacci numbers without recursion.",
        language: "python",
        code: "def fibonacci(n: int) -> int:\n    a, b = 0, 1\n    for _ in range(n):\n        \
               a, b = b, a + b\n    return a\n",
    },
    Answer {
        topics: &["typescript", "javascript", "debounce"],
        summary: "This function delays calls until no further call has arrived for a while.",
        language: "typescript",
        code: "export function debounce<T extends unknown[]>(call: (...args: T) => void, ms: number) {\n  \
               let timer: ReturnType<typeof setTimeout> | undefined;\n  return (...args: T) => {\n    \
               clearTimeout(timer);\n    timer = setTimeout(() => call(...args), ms);\n  };\n}\n",
    },
    Answer {
        topics: &["java"],
        summary: "This class counts words in a text.",
        language: "java",
        code: "import java.util.*;\n\nclass WordCount {\n    static Map<String, Integer> count(String text) {\n        \
               Map<String, Integer> counts = new TreeMap<>();\n        \
               for (String word : text.split(\"\\\\s+\")) {\n            \
               counts.merge(word, 1, Integer::sum);\n        }\n        return counts;\n    }\n}\n",
    },
    Answer {
        topics: &["test"],
        summary: "This test covers the usual case and the empty one.",
        language: "python",
        code: "def test_greet():\n    assert greet(\"Ada\") == \"Hello, Ada!\"\n    \
               assert greet(\"\") == \"Hello, !\"\n",
    },
    Answer {
        topics: &[],
        summary: "This function returns a greeting.",
        language: "python",
        code: "def greet(name: str) -> str:\n    \"\"\"Return a greeting.\"\"\"\n    return f\"Hello, {name}!\"\n",
    },
];

/// The ends of a prefix, each with the text that completes it.
const COMPLETIONS: &[(&str, &str)] = &[
    ("):", "\n    return None\n"),
    (":", "\n    pass\n"),
    ("{", "\n    return;\n}\n"),
    ("=", " None\n"),
    ("return", " result\n"),
    ("import", " os\n"),
    ("(", ")\n"),
];

/// The completion of every other prefix.
const DEFAULT_COMPLETION: &str = "  # demo engine\n";

/// Marks of the common formats for prompts with a suffix; the prefix stands before the first of them.
const PREFIX_ENDS: &[&str] = &["<|fim_suffix|>", "<fim_suffix>", "<SUF>", "[SUFFIX]"];

/// The script for a request: an answer to the last message, or a completion of the prompt.
pub fn answer(body: &Value, token_gap: Duration) -> Script {
    let text = match body["prompt"].as_str() {
        Some(prompt) => complete(prompt).to_owned(),
        None => reply(&last_message(body)),
    };
    Script::text(&text).gap(token_gap)
}

fn reply(question: &str) -> String {
    let question = question.to_lowercase();
    let is_about = |answer: &&Answer| {
        answer.topics.is_empty() || answer.topics.iter().any(|topic| question.contains(topic))
    };
    let Some(answer) = ANSWERS.iter().find(is_about) else { return String::new() };
    let Answer { summary, language, code, .. } = answer;
    format!("{summary}\n\n```{language}\n{code}```\n\nThe demo engine sent this canned answer.\n")
}

fn complete(prompt: &str) -> &'static str {
    let end = PREFIX_ENDS.iter().filter_map(|mark| prompt.find(mark)).min();
    let prefix = prompt[..end.unwrap_or(prompt.len())].trim_end();
    let found = COMPLETIONS.iter().find(|(end, _)| prefix.ends_with(end));
    found.map_or(DEFAULT_COMPLETION, |(_, text)| text)
}

/// The content of the last message, which is a string or a list of parts.
fn last_message(body: &Value) -> String {
    let message = body["messages"].as_array().and_then(|messages| messages.last());
    match message.map(|message| &message["content"]) {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(parts)) => {
            parts.iter().filter_map(|part| part["text"].as_str()).collect::<Vec<_>>().join("\n")
        }
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn text(body: &Value) -> String {
        answer(body, Duration::ZERO).full_text()
    }

    fn ask(question: &str) -> String {
        text(&json!({ "messages": [
            { "role": "system", "content": "sort" }, { "role": "user", "content": question },
        ] }))
    }

    #[test]
    fn an_answer_depends_on_the_last_message_alone() {
        assert!(ask("Sort a list").contains("def merge_sort"));
        assert!(ask("Greet").contains("def greet"));
        assert!(ask("debounce").contains("```typescript\n"));
        assert_eq!(ask("Sort a list"), ask("Sort a list"));
        let parts = json!([{ "type": "text", "text": "the Fibonacci numbers" }]);
        let body = json!({ "messages": [{ "role": "user", "content": parts }] });
        assert!(text(&body).contains("def fibonacci"));
    }

    #[test]
    fn a_completion_depends_on_the_end_of_the_prefix() {
        assert_eq!(text(&json!({ "prompt": "def f():" })), "\n    return None\n");
        assert_eq!(text(&json!({ "prompt": "<|fim_prefix|>x =<|fim_suffix|>y" })), " None\n");
        assert_eq!(text(&json!({ "prompt": "" })), DEFAULT_COMPLETION);
    }
}
