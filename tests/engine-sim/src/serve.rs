//! One connection: it reads requests, writes answers, and always watches for a disconnect.
//!
//! Invariant: every answer runs against [`Reader::disconnected`] in one `select!`, whether it waits, writes or
//! hangs. An abort is therefore detected without a write.

use std::sync::Arc;
use std::time::Instant;

use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::net::tcp::WriteHalf;

use super::http::{Reader, Request, Response};
use super::ledger::{Outcome, Recorded};
use super::play::Player;
use super::request::{CHAT, COMPLETE, GenerationRequest, authorized};
use super::{Shared, lock, shapes};

pub(super) async fn connection(mut stream: TcpStream, shared: Arc<Shared>) {
    // A token must not wait for the next one to fill a packet.
    let _ = stream.set_nodelay(true);
    let (read, mut write) = stream.split();
    let mut reader = Reader::new(read);
    while let Some(request) = reader.request().await {
        let last = request.has("connection", "close");
        let generates = matches!(request.path.as_str(), CHAT | COMPLETE);
        let served = if request.method == "POST" && generates {
            generate(&shared, request, &mut reader, &mut write).await
        } else {
            shared.wait_while_frozen().await;
            write.write_all(&answer_other(&shared, &request).bytes()).await.is_ok()
        };
        if last || !served {
            break;
        }
    }
}

/// Returns whether the connection can serve another request.
async fn generate(
    shared: &Shared,
    request: Request,
    reader: &mut Reader<'_>,
    write: &mut WriteHalf<'_>,
) -> bool {
    let body: Value = serde_json::from_slice(&request.body).unwrap_or(Value::Null);
    // A request takes its script before it counts as started: a test that waits for the count sets the next script then.
    let parsed = GenerationRequest::read(shared, &request, &body)
        .map(|parsed| (parsed, shared.next_script(&body)));
    let recorded = Recorded { at: Instant::now(), headers: request.headers, body: body.clone() };
    let mut generation = shared.ledger.begin(recorded);
    let play = async {
        match parsed {
            Ok((request, script)) => {
                Player::new(shared, &script, write, &mut generation).answer(&request).await
            }
            Err(refusal) => {
                write.write_all(&refusal.bytes()).await?;
                Ok(Outcome::Finished(None))
            }
        }
    };
    let end = tokio::select! {
        // A complete answer counts as finished, even if the client disconnects at the same time.
        biased;
        played = play => played.unwrap_or(Outcome::Aborted),
        () = reader.disconnected() => Outcome::Aborted,
    };
    generation.settle(end);
    matches!(end, Outcome::Finished(_))
}

/// Answers requests other than generations.
fn answer_other(shared: &Shared, request: &Request) -> Response {
    if request.path.starts_with("/v1/") && !authorized(shared, request) {
        return Response::json(401, &shapes::unauthorized());
    }
    let known = ["/v1/models", "/health", "/metrics", "/version"];
    match request.path.as_str() {
        CHAT | COMPLETE => Response::json(405, &json!({"detail": "Method Not Allowed"})),
        path if known.contains(&path) && request.method != "GET" => {
            Response::json(405, &json!({"detail": "Method Not Allowed"}))
        }
        "/v1/models" => {
            Response::json(200, &shapes::models(&shared.setup, &lock(&shared.adapters)))
        }
        "/health" => Response::new(200, "text/plain; charset=utf-8", ""),
        "/version" => Response::json(200, &json!({"version": "0.32.0"})),
        "/metrics" => {
            let (counts, totals) = (shared.ledger.counts(), shared.ledger.totals());
            let page = shapes::metrics(&shared.setup.model, counts, &totals);
            Response::new(200, "text/plain; version=1.0.0; charset=utf-8", page)
        }
        _ => Response::json(404, &json!({"detail": "Not Found"})),
    }
}
