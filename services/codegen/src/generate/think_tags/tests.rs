//! Tests of the separation of reasoning from the answer.

use proptest::prelude::*;

use super::*;
use crate::generate::pieces::cut;

/// The reasoning, the answer, and whether the text was reclassified.
type Split = (String, String, bool);

/// Most bytes that may be held back.
const MAX_PENDING_BYTES: usize = 128;

fn split<'a>(expect: Expect, pieces: impl IntoIterator<Item = &'a str>) -> Split {
    let mut splitter = ThinkTagSplitter::new(expect);
    let (mut reasoning, mut answer, mut is_reclassified) = Split::default();
    let mut emit = |part: OutputPart, text: &str| match part {
        OutputPart::Reasoning => reasoning.push_str(text),
        OutputPart::Answer => answer.push_str(text),
        OutputPart::Reclassified => {
            is_reclassified = true;
            reasoning.push_str(&std::mem::take(&mut answer));
        }
    };
    for piece in pieces {
        splitter.push(piece, &mut emit);
        assert!(splitter.pending.len() <= MAX_PENDING_BYTES, "{}", splitter.pending);
    }
    splitter.end(&mut emit);
    (reasoning, answer, is_reclassified)
}

fn check(expect: Expect, output: &str, expected: (&str, &str, bool)) {
    let expected = (expected.0.to_owned(), expected.1.to_owned(), expected.2);
    assert_eq!(split(expect, [output]), expected, "{output:?}");
    let letters = output.split_inclusive(|_| true);
    assert_eq!(split(expect, letters), expected, "by letters: {output:?}");
}

#[test]
fn reasoning_at_the_start_is_separated() {
    for (output, reasoning, answer) in [
        (
            "<think>\na\n```py\nx\n```\n</think>\n\n```py\ny\n```",
            "\na\n```py\nx\n```\n",
            "\n```py\ny\n```",
        ),
        (" \n<think>a</think>b", "a", "b"),
        ("<think></think>\r\nb", "", "b"),
        ("<Thinking>a</thinking>\nb", "a", "b"),
        ("<reasoning>a</think></reasoning>b", "a</think>", "b"),
        ("<thought>a</thought> b", "a", " b"),
        ("◁think▷a 한◁/think▷b", "a 한", "b"),
        ("[THINK]a[0][/THINK]b", "a[0]", "b"),
        ("<seed:think>a</seed:think>b", "a", "b"),
        ("<|channel>thought\na<channel|>b", "\na", "b"),
        ("<think>never closed </thin", "never closed </thin", ""),
        ("<think>a</think>\nb\n</think>\nc", "a", "b\n</think>\nc"),
        ("</think>\n\nb", "", "\nb"),
    ] {
        check(Expect::Detect, output, (reasoning, answer, false));
        check(Expect::Open, output, (reasoning, answer, false));
    }
}

#[test]
fn harmony_messages_before_the_final_one_are_reasoning() {
    let header = "<|channel|>analysis<|message|>";
    let last = "<|start|>assistant<|channel|>final<|message|>";
    let call =
        "<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>";
    for (output, reasoning, answer) in [
        (format!("{header}a < b<|end|>{last}c<|return|>"), "a < b", "c<|return|>"),
        (format!("<|start|>assistant{header}a<|end|>\n<|channel|>final<|message|>c"), "a", "c"),
        (format!("{header}a<|end|>{call}{{}}<|call|>{last}c"), "a{}", "c"),
        (format!("{header}a<|channel|>final<|message|>c"), "a", "c"),
        (format!("{header}a<|end|>c"), "a", "c"),
        (format!("{header}a<|end|>{}", &last[..20]), "a<|start|>assistant<|", ""),
        ("<|channel|>final<|message|>c".to_owned(), "", "c"),
    ] {
        check(Expect::Detect, &output, (reasoning, answer, false));
    }
}

#[test]
fn output_that_begins_inside_of_reasoning_is_reclassified_or_expected() {
    let output = "a\n```py\nx\n```\n  </think>  \n\nb";
    check(Expect::Detect, output, ("a\n```py\nx\n```\n  ", "  \n\nb", true));
    check(Expect::Open, output, ("a\n```py\nx\n```\n  ", "  \n\nb", false));
    check(Expect::Detect, "a\n</think>", ("a\n", "", true));
    check(Expect::Open, "a.</think>\n\nb", ("a.", "\nb", false));
    check(Expect::Open, "only reasoning", ("only reasoning", "", false));
}

#[test]
fn tags_within_an_answer_are_text() {
    for answer in [
        "use the `<think>` tag and </think> too",
        "a <think>b</think> c\n",
        "Example:\n<think>\nx\n</think>\ny",
        "```\n</think>\n```\n",
        "print('<b>' + '</think>')\n",
        "s = \"</think>\"\n",
        "It writes \"a </think> b\" and 'c </think> d'.\n",
        "`a </think> b` and (</think>)\n",
        "```py\ns = 1\n</think>\n```\n",
        "analysis of the code",
        "analysisWe add.assistantfinalUse `+`.",
        "a\n</thin",
        "  \n  x < y[0] ◁ “한”\n",
    ] {
        check(Expect::Detect, answer, ("", answer, false));
    }
}

#[test]
fn reasoning_without_an_opening_tag_ends_anywhere_in_a_line() {
    for (output, reasoning, answer) in [
        ("We need a loop. Simple.</think>Here:\n", "We need a loop. Simple.", "Here:\n"),
        ("briefly.</think>391", "briefly.", "391"),
        ("plan.\n</think>```python\nx\n```\n", "plan.\n", "```python\nx\n```\n"),
        ("a\n</think> b\n", "a\n", " b\n"),
        ("It's \"x\" and `y`.</think>\n\nb", "It's \"x\" and `y`.", "\nb"),
        ("a\n```\nx\n```</think>b", "a\n```\nx\n```", "b"),
        ("a[/THINK]b", "a", "b"),
    ] {
        check(Expect::Detect, output, (reasoning, answer, true));
    }
}

#[test]
fn tags_have_no_meaning_in_an_answer_only() {
    let mut splitter = ThinkTagSplitter::new(Expect::Open);
    splitter.set_answer_only();
    let mut parts = Vec::new();
    splitter.push("<think>a</think>", &mut |part, text| parts.push((part, text.to_owned())));
    assert_eq!(parts, [(OutputPart::Answer, "<think>a</think>".to_owned())]);
    assert!(!splitter.has_closed());
}

#[test]
fn a_closing_tag_is_remembered() {
    let has_closed = |output: &str| {
        let mut splitter = ThinkTagSplitter::new(Expect::Detect);
        splitter.push(output, &mut |_, _| ());
        splitter.has_closed()
    };
    assert!(has_closed("<think>a</think>b") && has_closed("a</think>b"));
    assert!(has_closed("<|channel|>final<|message|>"));
    assert!(!has_closed("<think>a") && !has_closed("a `</think>`"));
}

#[test]
fn the_state_shows_unclosed_reasoning() {
    let state = |expect, output: &str| {
        let mut splitter = ThinkTagSplitter::new(expect);
        splitter.push(output, &mut |_, _| ());
        splitter.is_in_reasoning()
    };
    assert!(state(Expect::Open, "a") && state(Expect::Detect, "<think>a"));
    assert!(!state(Expect::Detect, "a") && !state(Expect::Open, "a</think>b"));
}

proptest! {
    #[test]
    fn the_split_does_not_depend_on_the_pieces(
        parts in prop::collection::vec("</?think>|\\[/?THINK\\]|◁/?think▷|<\\|channel\\|>|<\\|start\\|>|<\\|message\\|>|<\\|end\\|>|final|assistant|analysis|A|['`]|\"|```|[a한<◁ ]{1,3}|\r?\n| {33}", 0..14),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..8),
        is_open in any::<bool>(),
    ) {
        let expect = if is_open { Expect::Open } else { Expect::Detect };
        let output = parts.concat();
        let whole = split(expect, [output.as_str()]);
        prop_assert_eq!(&split(expect, output.split_inclusive(|_| true)), &whole);
        let pieces = cut(&output, &cuts);
        prop_assert_eq!(&split(expect, pieces), &whole);
    }

    #[test]
    fn an_answer_without_tags_passes_through_unchanged(answer in "[^<\\[◁]{0,80}") {
        let answer = answer.as_str();
        prop_assert_eq!(split(Expect::Detect, [answer]), (String::new(), answer.to_owned(), false));
        prop_assert_eq!(split(Expect::Open, [answer]), (answer.to_owned(), String::new(), false));
    }
}
