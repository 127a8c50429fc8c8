//! A disconnect is detected at once in every state, and holds release as many streams as they should.

use std::time::{Duration, Instant};

use super::super::{Engine, Fault, Script};
use super::client::Client;

/// Shorter than any timer or poll interval, and longer than a busy machine needs to wake a task.
const ABORT_TIMEOUT: Duration = Duration::from_secs(2);

fn abc() -> Script {
    Script::tokens(["a", "b", "c"])
}

/// Lets a client read up to `mark`, drops it, and checks the one abort.
async fn leave(script: Script, mark: Option<&str>, tokens: u64) {
    let engine = Engine::start();
    engine.script(script);
    let mut client = Client::streaming(&engine).await;
    engine.wait_for_started(1).await;
    if let Some(mark) = mark {
        client.head().await;
        client.read_until(mark).await;
    }
    let left_at = Instant::now();
    drop(client);
    let noticed_at = engine.wait_for_aborted(1).await;
    assert!(noticed_at.duration_since(left_at) < ABORT_TIMEOUT);
    assert_eq!(engine.aborts()[0].tokens_sent, tokens);
    let counts = engine.counts();
    assert_eq!((counts.aborted, counts.in_flight()), (1, 0));
    assert_eq!((counts.waiting, counts.held, counts.finished), (0, 0, 0));
}

#[tokio::test]
async fn leaving_before_the_headers_is_noticed() {
    leave(abc().fault(Fault::HangBeforeHeaders), None, 0).await;
}

#[tokio::test]
async fn leaving_after_the_headers_is_noticed() {
    leave(abc().fault(Fault::HangAfterHeaders), None, 0).await;
}

#[tokio::test]
async fn leaving_before_the_first_token_is_noticed() {
    leave(abc().first_after(Duration::from_hours(1)), None, 0).await;
}

#[tokio::test]
async fn leaving_a_stalled_stream_is_noticed() {
    leave(abc().fault(Fault::StallAfter(2)), Some(r#""content":"b""#), 2).await;
}

#[tokio::test]
async fn leaving_a_held_stream_is_noticed() {
    leave(abc().hold(1), Some(r#""content":"a""#), 1).await;
}

#[tokio::test]
async fn leaving_between_two_tokens_is_noticed() {
    leave(abc().gap(Duration::from_hours(1)), Some(r#""content":"a""#), 1).await;
}

#[tokio::test]
async fn leaving_while_the_engine_cannot_write_is_noticed() {
    let engine = Engine::start();
    // One write is larger than the loopback buffers and no client reads it, so it never completes.
    let tokens = std::iter::repeat_n("x".repeat(10_000), 2000);
    engine.script(Script::tokens(tokens).batch(usize::MAX));
    let client = Client::streaming(&engine).await;
    engine.wait_until(|counts| counts.tokens_sent == 2000).await;
    drop(client);
    engine.wait_for_aborted(1).await;
}

#[tokio::test]
async fn an_abort_takes_no_release_with_it() {
    let engine = Engine::start();
    engine.script(abc().hold(1));
    let first = Client::streaming(&engine).await;
    engine.wait_until(|counts| counts.held == 1).await;
    drop(first);
    engine.wait_for_aborted(1).await;
    engine.release();
    assert_eq!(Client::streaming(&engine).await.reply().await.said(), "abc");
}

#[tokio::test]
async fn a_release_may_come_before_the_stream_reaches_the_hold() {
    let engine = Engine::start();
    engine.script(abc().hold(2));
    engine.release();
    assert_eq!(Client::streaming(&engine).await.reply().await.said(), "abc");
    let _second = Client::streaming(&engine).await;
    engine.wait_until(|counts| counts.held == 1).await;
}

#[tokio::test]
async fn a_release_after_it_lets_exactly_one_step_happen() {
    let engine = Engine::start();
    engine.script(abc().batch(100).hold(0).hold(1).hold(99).fault(Fault::CutAfter(99)));
    let mut client = Client::streaming(&engine).await;
    client.head().await;
    client.read_until("assistant").await;
    for (text, sent) in [(r#""content":"a""#, 1), (r#""content":"c""#, 3)] {
        let before = engine.wait_until(|counts| counts.held == 1).await;
        assert!(before.tokens_sent < sent);
        engine.release();
        client.read_until(text).await;
        assert_eq!(engine.counts().tokens_sent, sent);
    }
    engine.wait_until(|counts| counts.held == 1).await;
    engine.release();
    assert_eq!(client.chunk().await, None);
    engine.wait_until(|counts| counts.cut == 1).await;
}

#[tokio::test]
async fn scripts_set_once_are_used_in_order_and_then_the_default() {
    let engine = Engine::start();
    engine.script(Script::text("c"));
    engine.once(Script::text("a"));
    engine.once(Script::text("b"));
    let mut said = String::new();
    for _ in 0..4 {
        said += &Client::streaming(&engine).await.reply().await.said();
    }
    assert_eq!(said, "abcc");
}
