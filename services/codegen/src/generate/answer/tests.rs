//! Tests of the fold of a generation.

use super::*;
use crate::upstream::engine::ToolCallDelta;

const OWNER: &str = "ann";

fn fold(learned: &Arc<InlineReasoning>, owner: &str) -> GenerateFold {
    GenerateFold::new((owner.to_owned(), "m".to_owned()), "python", Arc::clone(learned))
}

fn piece(choice: usize, content: Content) -> Piece {
    Piece { choice, content, events: 1, ..Piece::default() }
}

fn text(text: &str) -> Piece {
    piece(0, Content::Text(text.to_owned()))
}

fn reasoning(text: &str) -> Piece {
    piece(0, Content::Reasoning(text.to_owned()))
}

fn end(reason: &str) -> Piece {
    Piece { finish_reason: Some(reason.into()), ..Piece::default() }
}

/// The reasoning and the other text. What was reclassified is reasoning.
fn run(mut fold: GenerateFold, pieces: Vec<Piece>) -> (String, String, AnswerEnd) {
    let mut items = Vec::new();
    for piece in pieces {
        fold.push(EngineDelta { pieces: vec![piece], ..EngineDelta::default() }, &mut items);
    }
    let is_complete = fold.is_complete();
    fold.flush(is_complete, &mut items);
    let (mut reasoning, mut answer) = (String::new(), String::new());
    for item in items {
        match item {
            StreamItem::Delta(delta) if delta.track == Track::Reasoning => reasoning += &delta.text,
            StreamItem::Delta(delta) => answer += &delta.text,
            StreamItem::Reclassified => reasoning += &std::mem::take(&mut answer),
            _ => {}
        }
    }
    (reasoning, answer, fold.finish())
}

/// Remembers that the model begins inside of its reasoning.
fn teach(learned: &Arc<InlineReasoning>) {
    let (reasoning, answer, end) =
        run(fold(learned, OWNER), vec![text("a\n</think>\nb"), end("stop")]);
    assert_eq!((reasoning.as_str(), answer.as_str()), ("a\n", "b"));
    assert_eq!(end.warnings.len(), 1);
}

#[test]
fn a_model_that_begins_in_its_reasoning_is_learned_for_one_owner_only() {
    let learned = Arc::default();
    teach(&learned);
    let (reasoning, answer, _) =
        run(fold(&learned, OWNER), vec![text("c\n</think>\nd"), end("stop")]);
    assert_eq!((reasoning.as_str(), answer.as_str()), ("c\n", "d"));
    let (reasoning, answer, end) = run(fold(&learned, "bob"), vec![text("hello"), end("stop")]);
    assert_eq!((reasoning.as_str(), answer.as_str()), ("", "hello"));
    assert!(end.warnings.is_empty() && end.is_reusable);
}

#[test]
fn an_expected_reasoning_that_never_ends_is_the_answer_and_the_expectation_is_dropped() {
    let learned = Arc::default();
    teach(&learned);
    let (_, answer, end_of_answer) =
        run(fold(&learned, OWNER), vec![text("only "), text("text"), end("stop")]);
    assert_eq!(answer, "only text");
    assert!(end_of_answer.warnings.is_empty(), "{:?}", end_of_answer.warnings);
    let (reasoning, answer, _) = run(fold(&learned, OWNER), vec![text("text"), end("stop")]);
    assert_eq!((reasoning.as_str(), answer.as_str()), ("", "text"));
}

#[test]
fn an_answer_that_ends_within_its_reasoning_changes_no_expectation() {
    let learned = Arc::default();
    teach(&learned);
    for last in [vec![end("length")], vec![]] {
        let pieces = std::iter::once(text("thinking")).chain(last).collect();
        let (reasoning, answer, _) = run(fold(&learned, OWNER), pieces);
        assert_eq!((reasoning.as_str(), answer.as_str()), ("thinking", ""));
    }
}

#[test]
fn tags_have_no_meaning_if_the_engine_separates_reasoning() {
    let learned = Arc::default();
    teach(&learned);
    let pieces = vec![reasoning("r"), text("First:\n</think>\nthen"), end("stop")];
    let (reasoning, answer, end) = run(fold(&learned, OWNER), pieces);
    assert_eq!((reasoning.as_str(), answer.as_str()), ("r", "First:\n</think>\nthen"));
    assert!(end.warnings.is_empty());
}

#[test]
fn reasoning_and_text_with_different_indices_are_one_answer() {
    let learned = Arc::default();
    let answer_piece = |text: &str| piece(1, Content::Text(text.to_owned()));
    let pieces = vec![reasoning("r"), answer_piece("x"), answer_piece("y"), text("z"), end("stop")];
    let (reasoning, answer, _) = run(fold(&learned, OWNER), pieces);
    assert_eq!((reasoning.as_str(), answer.as_str()), ("r", "xy"));
}

#[test]
fn an_answer_that_answers_nothing_is_reported_and_not_reused() {
    for (pieces, reason) in [
        (vec![end("stop")], "without any text"),
        (vec![reasoning("r"), end("length")], "raise max_tokens"),
        (vec![reasoning("r"), end("stop")], "after its reasoning"),
        (vec![end("content_filter")], "content filter"),
        (vec![piece(0, Content::Refusal("no".to_owned())), end("stop")], "refused"),
        (
            vec![piece(0, Content::ToolCall(ToolCallDelta::default())), end("tool_calls")],
            "tool call",
        ),
    ] {
        let (_, _, end) = run(fold(&Arc::default(), OWNER), pieces);
        assert!(end.warnings[0].contains(reason), "{:?}", end.warnings);
        assert!(!end.is_reusable);
    }
}

#[test]
fn a_token_that_can_belong_to_no_tag_is_never_held_back() {
    for first in ["a", "analysis", "x = 1", "Here", "한", "assistant", "s"] {
        let (mut fold, mut items) = (fold(&Arc::default(), OWNER), Vec::new());
        let delta = EngineDelta { pieces: vec![text(first)], ..EngineDelta::default() };
        fold.push(delta, &mut items);
        let [StreamItem::Delta(delta)] = &items[..] else { panic!("{first:?}: {items:?}") };
        assert_eq!(delta.text, first);
    }
}

#[test]
fn a_closing_tag_at_the_very_end_makes_all_of_it_reasoning() {
    let (reasoning, answer, end) =
        run(fold(&Arc::default(), OWNER), vec![text("a\n"), text("</think>"), end("stop")]);
    assert_eq!((reasoning.as_str(), answer.as_str()), ("a\n", ""));
    assert!(end.warnings.iter().any(|warning| warning.contains("empty")), "{:?}", end.warnings);
}
