//! Every fault, as the bytes or the silence that a client receives.

use std::io::ErrorKind;
use std::time::{Duration, Instant};

use serde_json::json;
use tokio::net::TcpStream;

use super::super::{Engine, Fault, Script};
use super::client::{Client, ask};

fn abc() -> Script {
    Script::tokens(["a", "b", "c"])
}

#[tokio::test]
async fn a_status_comes_instead_of_an_answer_and_the_connection_stays() {
    let engine = Engine::start();
    let mut client = Client::to(&engine).await;
    for code in [500, 503] {
        engine.once(Fault::status(code));
        client.post(&ask()).await;
        let reply = client.reply().await;
        assert_eq!((reply.status, &reply.json()["error"]["code"]), (code, &json!(code)));
        assert!(!reply.head.contains("retry-after"));
    }
    engine.once(Fault::too_many_requests(7));
    client.post(&ask()).await;
    let reply = client.reply().await;
    assert_eq!(reply.status, 429);
    assert!(reply.head.contains("\r\nretry-after: 7\r\n"));
    engine.once(Fault::status(401));
    client.post(&ask()).await;
    assert_eq!(client.reply().await.json(), json!({"error": "Unauthorized"}));
    client.post(&ask()).await;
    assert_eq!(client.reply().await.status, 200, "once means once");
}

#[tokio::test]
async fn hanging_is_silence_before_or_after_the_headers() {
    let engine = Engine::start();
    engine.once(Fault::HangBeforeHeaders);
    let mut client = Client::streaming(&engine).await;
    assert_eq!(engine.wait_for_started(1).await.waiting, 1);
    assert!(client.silent().await);

    engine.once(Fault::HangAfterHeaders);
    let mut client = Client::streaming(&engine).await;
    assert!(client.head().await.starts_with("HTTP/1.1 200 OK"));
    assert!(client.silent().await);
    assert_eq!(engine.in_flight(), 2);
}

#[tokio::test]
async fn a_stall_is_silence_after_some_tokens() {
    let engine = Engine::start();
    engine.once(abc().batch(100).fault(Fault::StallAfter(2)));
    let mut client = Client::streaming(&engine).await;
    client.head().await;
    client.read_until(r#""content":"b""#).await;
    assert!(client.silent().await);
    assert_eq!(engine.counts().tokens_sent, 2);
}

#[tokio::test]
async fn a_cut_closes_the_connection_within_the_body() {
    let engine = Engine::start();
    for (after, said) in [(0, ""), (2, "ab"), (9, "abc")] {
        engine.once(abc().fault(Fault::CutAfter(after)));
        let reply = Client::streaming(&engine).await.reply().await;
        assert!(!reply.complete);
        assert_eq!(reply.said(), said);
        assert!(!reply.text().contains("stop"));
    }
    engine.once(Fault::CutBeforeHeaders);
    let mut client = Client::streaming(&engine).await;
    assert!(!client.more().await);
    assert!(client.buffered().is_empty());
    let counts = engine.wait_until(|counts| counts.cut == 4).await;
    assert_eq!((counts.finished, counts.aborted, counts.in_flight()), (0, 0, 0));
}

#[tokio::test]
async fn a_clean_end_lacks_the_reason_and_done() {
    let engine = Engine::start();
    engine.once(abc().fault(Fault::EndAfter(2)));
    let reply = Client::streaming(&engine).await.reply().await;
    assert!(reply.complete);
    assert_eq!(reply.said(), "ab");
    assert!(!reply.text().contains("DONE"));
    engine.wait_until(|counts| counts.finished == 1).await;
}

#[tokio::test]
async fn an_error_inside_the_stream_is_followed_by_done() {
    let engine = Engine::start();
    engine.once(abc().fault(Fault::ErrorAfter(1)));
    let reply = Client::streaming(&engine).await.reply().await;
    let events = reply.events();
    assert!(reply.complete);
    assert_eq!(reply.said(), "a");
    assert_eq!(events[2]["error"]["code"], 500);
    assert_eq!(events[2]["error"]["type"], "InternalServerError");
    assert_eq!(events[3], "[DONE]");
}

#[tokio::test]
async fn an_endless_line_goes_on_until_the_client_leaves() {
    let engine = Engine::start();
    engine.once(abc().fault(Fault::EndlessLineAfter(1)));
    let mut client = Client::streaming(&engine).await;
    client.head().await;
    client.read_until(r#"data: {"id":"x"#).await;
    let mut line = 0;
    while line < 2 << 20 {
        let piece = client.chunk().await.unwrap();
        assert!(!piece.contains(&b'\n'));
        line += piece.len();
    }
    drop(client);
    engine.wait_for_aborted(1).await;
}

#[tokio::test]
async fn a_slow_drip_takes_its_time() {
    let engine = Engine::start();
    let wait = Duration::from_millis(2);
    engine.once(Script::tokens(["a"]).batch(9).pieces(100).piece_gap(wait));
    let before = Instant::now();
    let reply = Client::streaming(&engine).await.reply().await;
    let gaps = u32::try_from(reply.pieces.len()).unwrap() - 1;
    assert!(gaps > 5 && before.elapsed() >= wait * gaps);
}

#[tokio::test]
async fn a_whole_answer_fails_in_its_own_ways() {
    let engine = Engine::start();
    let body = json!({"messages": []});
    engine.once(Fault::CutAfter(1));
    let mut client = Client::to(&engine).await;
    client.post(&body).await;
    let reply = client.reply().await;
    assert!(reply.status == 200 && !reply.complete);

    engine.once(Fault::ErrorAfter(1));
    let mut client = Client::to(&engine).await;
    client.post(&body).await;
    assert_eq!(client.reply().await.status, 500);

    engine.once(Fault::StallAfter(1));
    client.post(&body).await;
    assert!(client.silent().await);
    drop(client);
    engine.wait_for_aborted(1).await;
}

#[tokio::test]
async fn a_stopped_engine_cuts_refuses_and_comes_back_on_its_port() {
    let engine = Engine::start();
    engine.script(abc().fault(Fault::StallAfter(1)));
    let mut client = Client::streaming(&engine).await;
    client.head().await;
    client.read_until(r#""content":"a""#).await;
    engine.stop().await;
    assert_eq!(engine.counts().cut, 1);
    assert!(!client.more().await);
    for _ in 0..3 {
        let refused = TcpStream::connect(engine.address()).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
        engine.stop().await;
    }
    engine.script(abc());
    engine.resume();
    engine.resume();
    assert_eq!(Client::streaming(&engine).await.reply().await.said(), "abc");
    assert_eq!(engine.counts().started, 2);
}

#[tokio::test]
async fn a_dropped_engine_is_gone() {
    let engine = Engine::start();
    engine.script(Fault::HangBeforeHeaders);
    let address = engine.address();
    let mut client = Client::streaming(&engine).await;
    engine.wait_for_started(1).await;
    drop(engine);
    assert!(!client.more().await);
    assert!(TcpStream::connect(address).await.is_err());
}
