//! An engine that fails in many ways and repeats its input in each: the prompt, its key and the name of its
//! host. Tests check that none of it is exposed.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// The host name in its errors.
pub const ECHOING_HOST: &str = "gpu-7.internal";
/// The model that it serves.
pub const ECHOING_MODEL: &str = "parrot";

/// The kinds of its failures. A question selects one with "way=NAME;".
pub const ECHO_CASES: [&str; 12] = [
    "status-400",
    "status-401",
    "status-422",
    "status-500",
    "status-503",
    "reason-500",
    "late-event",
    "event",
    "shape",
    "syntax",
    "no-http",
    "cut",
];

/// Its reply to a request for the list of models.
#[derive(Clone, Debug)]
pub enum EchoedModels {
    /// 401 with the key.
    Refused,
    /// These models, as JSON.
    Listed(Value),
    /// This text in place of JSON.
    Text(String),
}

impl EchoedModels {
    /// One model.
    pub fn one() -> EchoedModels {
        EchoedModels::Listed(json!([{ "id": ECHOING_MODEL, "max_model_len": 4_096 }]))
    }
}

/// A running engine. Dropping it stops it.
#[derive(Debug)]
pub struct EchoingEngine {
    address: SocketAddr,
    keys: Arc<Mutex<Vec<String>>>,
    _serving: JoinSet<()>,
}

impl EchoingEngine {
    /// Starts an engine with this reply to a request for its models.
    pub async fn start(models: EchoedModels) -> EchoingEngine {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("a bound port");
        let keys = Arc::<Mutex<Vec<String>>>::default();
        let mut serving = JoinSet::new();
        let shown = Arc::clone(&keys);
        serving.spawn(async move {
            let mut open = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                while open.try_join_next().is_some() {}
                open.spawn(answer(stream, models.clone(), Arc::clone(&shown)));
            }
        });
        EchoingEngine { address, keys, _serving: serving }
    }

    /// The value for AI_MODEL_ENDPOINT.
    pub fn url(&self) -> String {
        format!("http://{}/v1", self.address)
    }

    /// The last key that it received.
    pub fn last_key(&self) -> Option<String> {
        self.keys.lock().expect("no panic").last().cloned()
    }
}

struct Asked {
    path: String,
    key: String,
    body: String,
}

async fn read(stream: &mut TcpStream) -> Option<Asked> {
    let mut bytes = Vec::new();
    let end = loop {
        if let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
            break end + 4;
        }
        if stream.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
    };
    let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
    let header = |name: &str| {
        head.lines().find_map(|line| {
            let (found, value) = line.split_once(':')?;
            found.eq_ignore_ascii_case(name).then(|| value.trim().to_owned())
        })
    };
    let length: usize = header("content-length").and_then(|text| text.parse().ok()).unwrap_or(0);
    while bytes.len() < end + length {
        if stream.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
    }
    let key = header("authorization").unwrap_or_default();
    let key = key.trim_start_matches("Bearer ").to_owned();
    let path = head.split(' ').nth(1)?.to_owned();
    Some(Asked { path, key, body: String::from_utf8_lossy(&bytes[end..]).into_owned() })
}

async fn answer(mut stream: TcpStream, models: EchoedModels, keys: Arc<Mutex<Vec<String>>>) {
    let Some(asked) = read(&mut stream).await else { return };
    keys.lock().expect("no panic").push(asked.key.clone());
    let reply = match asked.path.as_str() {
        "/v1/models" => match models {
            EchoedModels::Refused => refusal(401, "Unauthorized", &asked, &[]),
            EchoedModels::Listed(data) => whole(200, "OK", &json!({ "data": data }).to_string()),
            EchoedModels::Text(text) => whole(200, "OK", &text),
        },
        "/v1/chat/completions" | "/v1/completions" => generate(&asked),
        _ => refusal(404, "Not Found", &asked, &[]),
    };
    let _ = stream.write_all(reply.as_bytes()).await;
    let _ = stream.shutdown().await;
}

fn generate(asked: &Asked) -> String {
    let chat = asked.path.contains("chat");
    let has = |way: &str| asked.body.contains(&format!("way={way};"));
    let said = format!("{} {} {ECHOING_HOST}", asked.body, asked.key);
    let way = ECHO_CASES.into_iter().find(|way| has(way)).unwrap_or_default();
    let error = event(&json!({ "error": { "message": said, "type": said, "code": 500 } }));
    match way {
        "reason-500" => {
            let plain: String = said.chars().filter(char::is_ascii_graphic).collect();
            refusal(500, &plain[..plain.len().min(1_000)], asked, &[])
        }
        "event" => stream(&error),
        "late-event" => stream(&(text(chat, "a = 1", None) + &error)),
        "shape" => stream(&event(&json!({ "choices": said }))),
        "syntax" => stream(&format!("data: {{\"choices\": [{}\n\n", json!(said))),
        "no-http" => said,
        "cut" => {
            format!("HTTP/1.1 200 OK\r\ncontent-length: 99999\r\nx-said: {ECHOING_HOST}\r\n\r\n")
        }
        way if way.starts_with("status-") => {
            refusal(way["status-".len()..].parse().unwrap_or(500), "Said", asked, &[])
        }
        _ if asked.body.contains("retry-after=") => {
            let value = asked.body.split("retry-after=").nth(1).unwrap_or_default();
            let value = value.split(';').next().unwrap_or_default();
            refusal(429, "Too Many Requests", asked, &[("retry-after", value)])
        }
        // A complete answer with invalid names and an invalid reason.
        _ => {
            let mut odd = json!({ "model": said, "choices": [{ "index": 0 }] });
            odd["choices"][0][if chat { "delta" } else { "text" }] =
                if chat { json!({ "content": "a = 1" }) } else { json!("a = 1") };
            stream(&(event(&odd) + &text(chat, "", Some(&said)) + "data: [DONE]\n\n"))
        }
    }
}

fn text(chat: bool, text: &str, reason: Option<&str>) -> String {
    let mut choice = json!({ "index": 0, "finish_reason": reason });
    if chat {
        choice["delta"] = json!({ "content": text });
    } else {
        choice["text"] = json!(text);
    }
    event(&json!({ "model": ECHOING_MODEL, "choices": [choice] }))
}

fn event(data: &Value) -> String {
    format!("data: {data}\n\n")
}

fn stream(events: &str) -> String {
    format!(
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{events}",
        events.len()
    )
}

fn refusal(status: u16, reason: &str, asked: &Asked, headers: &[(&str, &str)]) -> String {
    let words = format!("no: {} by {} on {ECHOING_HOST}", asked.body, asked.key);
    let body = json!({ "error": { "message": words, "type": words, "param": words } }).to_string();
    let mut more = format!("x-key: {}\r\n", asked.key);
    for (name, value) in headers {
        more.extend([name, ": ", value, "\r\n"]);
    }
    let length = body.len();
    format!(
        "HTTP/1.1 {status} {reason}\r\ncontent-type: application/json\r\nconnection: close\r\n{more}content-length: {length}\r\n\r\n{body}"
    )
}

fn whole(status: u16, reason: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "HTTP/1.1 {status} {reason}\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}"
    )
}
