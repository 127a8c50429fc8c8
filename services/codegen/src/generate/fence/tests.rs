//! Tests of the separation of code from explanation.

use proptest::prelude::*;

use super::*;
use crate::generate::pieces::cut;

fn split<'a>(pieces: impl IntoIterator<Item = &'a str>) -> Vec<(Kind, String)> {
    let (mut splitter, mut parts) = (FenceSplitter::default(), Vec::<(Kind, String)>::new());
    let mut emit = |segment: Segment<'_>, text: &str| match parts.last_mut() {
        Some((last, joined)) if *last == segment.kind => joined.push_str(text),
        _ => parts.push((segment.kind, text.to_owned())),
    };
    for piece in pieces {
        splitter.push(piece, &mut emit);
    }
    splitter.end(&mut emit);
    parts
}

fn check(answer: &str, expected: &[(Kind, &str)]) {
    let expected: Vec<_> =
        expected.iter().map(|(kind, text)| (*kind, (*text).to_owned())).collect();
    assert_eq!(split([answer]), expected, "{answer:?}");
    assert_eq!(split(answer.split_inclusive(|_| true)), expected, "by letters: {answer:?}");
}

#[test]
fn fences_switch_the_kind_and_are_removed() {
    use Kind::{Code, Explanation};
    check(
        "a\n```python\nx = 1\n```\nb",
        &[(Explanation, "a\n"), (Code, "x = 1\n"), (Explanation, "b")],
    );
    check("```\nx\n```", &[(Code, "x\n")]);
    check("~~~ py\n```\n~~~~\nz", &[(Code, "```\n"), (Explanation, "z")]);
    check("````\n```\n````\n", &[(Code, "```\n")]);
    check("  ```py\r\nx\r\n  ```  \r\ny", &[(Code, "x\r\n"), (Explanation, "y")]);
    check("```py\nnever closed", &[(Code, "never closed")]);
}

#[test]
fn blocks_have_their_number_and_the_word_of_their_fence() {
    let (mut splitter, mut seen) = (FenceSplitter::default(), Vec::new());
    let answer = "a\n``` py title=x\n1\n```\n```\n2\n```\nb\n~~~js\n3\n";
    splitter.push(answer, &mut |segment, text| {
        seen.push((segment.block, segment.info_word.to_owned(), text.to_owned()));
    });
    let seen: Vec<_> =
        seen.iter().map(|(block, word, text)| (*block, word.as_str(), text.as_str())).collect();
    let expected =
        [(0, "", "a\n"), (1, "py", "1\n"), (2, "", "2\n"), (2, "", "b\n"), (3, "js", "3\n")];
    assert_eq!(seen, expected);
}

#[test]
fn lines_similar_to_a_fence_pass_through() {
    use Kind::{Code, Explanation};
    check("```inline``` code\n", &[(Explanation, "```inline``` code\n")]);
    check("use `x` or ``y``\n``\n", &[(Explanation, "use `x` or ``y``\n``\n")]);
    check("    ```\n", &[(Explanation, "    ```\n")]);
    check("```\n```x``` not the end\n```\n", &[(Code, "```x``` not the end\n")]);
    check("  ~~~~~~^~~~~~~\nx\n", &[(Explanation, "  ~~~~~~^~~~~~~\nx\n")]);
    check("1. a\n       ~~~~^\n   b\n", &[(Explanation, "1. a\n       ~~~~^\n   b\n")]);
    check("   \n\n  한글\n", &[(Explanation, "   \n\n  한글\n")]);
}

#[test]
fn fences_in_lists_and_quotes_lose_their_indentation_and_prefixes() {
    use Kind::{Code, Explanation};
    check(
        "1. a\n   ```py\n   if x:\n       y\n   ```\n2. b\n",
        &[(Explanation, "1. a\n"), (Code, "if x:\n    y\n"), (Explanation, "2. b\n")],
    );
    check(
        "- a\n\n      ```py\n      x\n\n  y\n      ```\nb",
        &[(Explanation, "- a\n\n"), (Code, "x\n\ny\n"), (Explanation, "b")],
    );
    check(
        "* a\n\t```go\n\tif x {\n\t\ty\n\t```\n",
        &[(Explanation, "* a\n"), (Code, "if x {\n\ty\n")],
    );
    check("1. ```py\n   x\n     y\n   ```\n", &[(Code, "x\n  y\n")]);
    check("10) - ~~~\n      x\n~~~\nb", &[(Code, "x\n"), (Explanation, "b")]);
    check("- a\n    ```py\nx\n    y\n```\n", &[(Explanation, "- a\n"), (Code, "x\ny\n")]);
    check(
        "> ```py\n> >>> x\n>y\n>\n> ```\n> b\n",
        &[(Code, ">>> x\ny\n\n"), (Explanation, "> b\n")],
    );
    check("> - ```\n>   x\n>   ```\n", &[(Code, "x\n")]);
    check("> ```\n> x\nb\n```\ny\n```\n", &[(Code, "x\n"), (Explanation, "b\n"), (Code, "y\n")]);
    check("- a\n\nb\n\n    ```\n", &[(Explanation, "- a\n\nb\n\n    ```\n")]);
    check("- a\n# b\n    ```\n", &[(Explanation, "- a\n# b\n    ```\n")]);
}

#[test]
fn the_first_bare_fence_closes_and_so_does_one_before_a_control_token() {
    use Kind::{Code, Explanation};
    check("```markdown\n# a\n```python\nx\n```\nb\n", &[(Code, "# a\n```python\nx\n```\nb\n")]);
    check("````md\n```py\nx\n```\n````\nb", &[(Code, "```py\nx\n```\n"), (Explanation, "b")]);
    check("```\nx\n```<|im_end|>", &[(Code, "x\n")]);
    check("```\nx\n``` </s>\nb", &[(Code, "x\n"), (Explanation, "b")]);
    check("```\nx\n```</a>\n", &[(Code, "x\n"), (Explanation, "</a>\n")]);
    let far = format!("```\n```{}\n", " ".repeat(MAX_FENCE_LINE_LEN));
    check(&far, &[(Code, &far[4..])]);
}

#[test]
fn a_fence_after_text_opens_and_one_before_text_or_after_code_closes() {
    use Kind::{Code, Explanation};
    for before in ["Here:", "Here: ", "1. **A**:", "**b**"] {
        let answer = format!("{before}```python\nif x:\n    y\n```\nb\n");
        let before = format!("{before}\n");
        check(&answer, &[(Explanation, &before), (Code, "if x:\n    y\n"), (Explanation, "b\n")]);
    }
    check("1. A:```\r\n   x\r\n   ```\r\n", &[(Explanation, "1. A:\r\n"), (Code, "x\r\n")]);
    check("> a ```py {1}\n> x\n> ```\n", &[(Explanation, "> a \n"), (Code, "x\n")]);
    check("```py\nx\n```This is x.\n\nb\n", &[(Code, "x\n"), (Explanation, "This is x.\n\nb\n")]);
    check("```py\nf(1)```\nb\n", &[(Code, "f(1)\n"), (Explanation, "b\n")]);
    check("```py\nf(1)```", &[(Code, "f(1)")]);
    check("```js\n});```\n```js\nb\n", &[(Code, "});\nb\n")]);
    for kept in [
        "a `b` ```\n",
        "a ```b c d\n",
        "a ```py\u{e9}\n",
        "| ```a``` |\n",
        "/// ```rust\n/// x\n/// ```\n",
        "a ```",
    ] {
        check(kept, &[(Explanation, kept)]);
    }
    for code in
        ["/// ```\n/// x\n", "# a: ```\n", " * ```\n", "s = '''```\n", "`a` + b```\n", "\"```\"\n"]
    {
        check(&format!("```rust\n{code}```\nb"), &[(Code, code), (Explanation, "b")]);
    }
}

#[test]
fn blocks_in_blocks_follow_the_word_of_the_outer_one() {
    use Kind::{Code, Explanation};
    check(
        "```markdown\n# T\n\n```bash\nx\n```\n\nMore\n```\nDone.\n",
        &[(Code, "# T\n\n```bash\nx\n```\n\nMore\n"), (Explanation, "Done.\n")],
    );
    check("```md\na```\n```Done it.\n", &[(Code, "a```\n"), (Explanation, "Done it.\n")]);
    check("```\n```py\nx\n```\nb", &[(Code, "```py\nx\n"), (Explanation, "b")]);
    let (mut splitter, mut seen) = (FenceSplitter::default(), Vec::new());
    splitter.push("```py\na\n```js\nb\n```\n", &mut |segment, text| {
        seen.push((segment.block, segment.info_word.to_owned(), text.to_owned()));
    });
    let expected = [(1, "py", "a\n"), (2, "js", "b\n")]
        .map(|(block, word, text)| (block, word.to_owned(), text.to_owned()));
    assert_eq!(seen, expected);
}

#[test]
fn attributes_with_backticks_and_long_ones_belong_to_the_fence_of_a_language() {
    use Kind::{Code, Explanation};
    check("```python {title=\"`a`\"}\nx\n```\nb", &[(Code, "x\n"), (Explanation, "b")]);
    let long = format!("```python {}\nx\n```\nb", "x".repeat(MAX_FENCE_LINE_LEN));
    check(&long, &[(Code, "x\n"), (Explanation, "b")]);
}

#[test]
fn html_blocks_are_code_with_decoded_entities() {
    use Kind::{Code, Explanation};
    check(
        "a\n<pre><code class=\"language-py\">\nif a &lt; b &amp;&amp; c:\n    d = &quot;&#39;\n</code></pre>\nb",
        &[(Explanation, "a\n"), (Code, "if a < b && c:\n    d = \"'\n"), (Explanation, "b")],
    );
    check(
        "<PRE class='x'> <code>x &amp;lt; &copy; <b></b></CODE> </pre> and `b`\n",
        &[(Code, "x &lt; &copy; <b></b>"), (Explanation, " and `b`\n")],
    );
    check("<pre><code>x</code>y</pre>z", &[(Code, "x</code>y"), (Explanation, "z")]);
    check("<pre><code>x &am", &[(Code, "x &am")]);
    check("<pre>x</pre>\n<p>\n<pre\n", &[(Explanation, "<pre>x</pre>\n<p>\n<pre\n")]);
    check("```\n<pre><code>&lt;\n```\n", &[(Code, "<pre><code>&lt;\n")]);
    let (mut splitter, mut words) = (FenceSplitter::default(), Vec::new());
    splitter.push("<pre lang=\"ts\"><code>x</code></pre>", &mut |segment, _| {
        words.push((segment.block, segment.info_word.to_owned()));
    });
    assert_eq!(words, [(1, "ts".to_owned())]);
}

#[test]
fn only_a_possible_fence_is_held_back() {
    let (mut splitter, mut given) = (FenceSplitter::default(), String::new());
    splitter.push("word", &mut |_, text| given.push_str(text));
    assert_eq!(given, "word");
    splitter.push(" `a\n``", &mut |_, text| given.push_str(text));
    assert_eq!(given, "word `a\n");
    splitter.push("b", &mut |_, text| given.push_str(text));
    assert_eq!(given, "word `a\n``b");
    splitter.push("\n```", &mut |_, text| given.push_str(text));
    splitter.push(&"x".repeat(MAX_FENCE_LINE_LEN), &mut |_, text| given.push_str(text));
    assert!(given.len() > MAX_FENCE_LINE_LEN, "a long line is not held back for ever");
}

proptest! {
    #[test]
    fn the_split_does_not_depend_on_the_pieces(
        answer in "([`~]{1,5}| {1,5}|[a-z한&<]|\r?\n|```py\n|\n```\n|```md\n|a```\n|A b|\\^|- |1\\. |> |\t|<pre><code>|</code></pre>|&lt;| {90}){0,40}",
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..20),
    ) {
        let pieces = cut(&answer, &cuts);
        prop_assert_eq!(split(pieces), split([answer.as_str()]));
    }

    #[test]
    fn text_without_fence_characters_passes_through_unchanged(answer in "[^`~]{0,80}") {
        let joined: String = split([answer.as_str()]).into_iter().map(|(_, text)| text).collect();
        prop_assert_eq!(joined, answer);
    }
}
