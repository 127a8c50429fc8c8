//! A simulator of vLLM's OpenAI interface that costs as little as possible. The comparison changes its settings
//! between loads. It records when each dropped stream was aborted.

mod answer;
mod counters;

use std::borrow::Cow;
use std::convert::Infallible;
use std::net::Ipv4Addr;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::task::TaskTracker;

use crate::sim_text;
use crate::spec::SimSettings;
use crate::upstream::answer::{SimBody, TokenStream};
pub(crate) use crate::upstream::counters::UpstreamState;
use crate::upstream::counters::{Counters, RequestGuard};

/// The only model.
const MODEL: &str = "base";

#[derive(Default)]
struct Upstream {
    settings: RwLock<SimSettings>,
    counters: Arc<Counters>,
}

#[derive(Deserialize)]
struct ChatRequest<'a> {
    #[serde(borrow, default)]
    model: Cow<'a, str>,
    #[serde(default)]
    stream: bool,
    #[serde(alias = "max_completion_tokens")]
    max_tokens: u64,
    stream_options: Option<StreamOptions>,
}

#[derive(Deserialize)]
struct StreamOptions {
    #[serde(default)]
    include_usage: bool,
}

type Reply = Response<SimBody>;

fn json(status: StatusCode, body: impl Into<Bytes>) -> Reply {
    let mut reply = Response::new(SimBody::Whole(Some(body.into()), None));
    *reply.status_mut() = status;
    let json = header::HeaderValue::from_static("application/json");
    reply.headers_mut().insert(header::CONTENT_TYPE, json);
    reply
}

/// Serves until the process ends.
pub(crate) async fn serve(port: u16) -> anyhow::Result<()> {
    let upstream = Arc::new(Upstream::default());
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await?;
    let tasks = TaskTracker::new();
    loop {
        // It fails if file descriptors run out; streams that end return some.
        match listener.accept().await {
            Ok((socket, _)) => drop(tasks.spawn(connection(Arc::clone(&upstream), socket))),
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
}

async fn connection(upstream: Arc<Upstream>, socket: TcpStream) {
    let _ = socket.set_nodelay(true);
    let service = service_fn(|request| {
        let upstream = Arc::clone(&upstream);
        async move { Ok::<_, Infallible>(upstream.reply(request).await) }
    });
    let server = hyper::server::conn::http1::Builder::new();
    // A client that disconnects is the purpose of some loads.
    let _ = server.serve_connection(TokioIo::new(socket), service).await;
}

impl Upstream {
    async fn reply(&self, request: Request<Incoming>) -> Reply {
        let (head, body) = request.into_parts();
        match (&head.method, head.uri.path()) {
            (&Method::POST, "/v1/chat/completions") => self.chat(body).await,
            (&Method::POST, "/settings") => self.set(body).await,
            (&Method::POST, "/end") => {
                self.counters.epoch.fetch_add(1, Relaxed);
                json(StatusCode::OK, "{}")
            }
            (&Method::GET, "/state") => {
                json(StatusCode::OK, serde_json::json!(self.counters.state()).to_string())
            }
            (&Method::GET, "/v1/models") => {
                let model = serde_json::json!({
                    "id": MODEL, "object": "model", "created": 1, "owned_by": "vllm", "root": MODEL,
                    "parent": null, "max_model_len": 32_768, "permission": [],
                });
                let list = serde_json::json!({"object": "list", "data": [model]});
                json(StatusCode::OK, list.to_string())
            }
            (&Method::GET, "/metrics") => self.metrics(),
            (&Method::GET, "/health") => json(StatusCode::OK, ""),
            // Routers that also serve SGLang ask for these.
            (
                &Method::GET,
                "/server_info" | "/get_server_info" | "/model_info" | "/get_model_info",
            ) => {
                let info = serde_json::json!({
                    "model_path": MODEL, "served_model_name": MODEL, "is_generation": true,
                    "tp_size": 1, "dp_size": 1,
                });
                json(StatusCode::OK, info.to_string())
            }
            _ => json(StatusCode::NOT_FOUND, r#"{"detail":"Not Found"}"#),
        }
    }

    /// Sets how requests are answered from now on, and forgets the aborts.
    async fn set(&self, body: Incoming) -> Reply {
        let body = body.collect().await.map(http_body_util::Collected::to_bytes);
        match serde_json::from_slice(&body.unwrap_or_default()) {
            Ok(settings) => {
                *self.settings.write().unwrap_or_else(PoisonError::into_inner) = settings;
                self.counters.forget_aborts();
                json(StatusCode::OK, "{}")
            }
            Err(error) => json(StatusCode::BAD_REQUEST, error.to_string()),
        }
    }

    async fn chat(&self, body: Incoming) -> Reply {
        let body = body.collect().await.map(http_body_util::Collected::to_bytes);
        let body = body.unwrap_or_default();
        let request = match serde_json::from_slice::<ChatRequest<'_>>(&body) {
            Ok(request) if request.model.is_empty() || request.model == MODEL => request,
            Ok(_) => {
                return json(StatusCode::NOT_FOUND, r#"{"error":{"message":"no such model"}}"#);
            }
            Err(error) => return json(StatusCode::BAD_REQUEST, error.to_string()),
        };
        let settings = *self.settings.read().unwrap_or_else(PoisonError::into_inner);
        let guard = RequestGuard::new(Arc::clone(&self.counters), sim_text::request_id(&body));
        let prompt_tokens = u64::try_from(body.len() / 4).unwrap_or_default();
        if !request.stream {
            let answer = answer::whole(request.max_tokens, prompt_tokens);
            let mut reply = json(StatusCode::OK, "");
            *reply.body_mut() = SimBody::Whole(Some(answer.into()), Some(guard));
            return reply;
        }
        let has_usage = request.stream_options.is_some_and(|options| options.include_usage);
        let usage = has_usage.then_some(prompt_tokens);
        let stream = TokenStream::new(settings, guard, request.max_tokens, usage);
        let mut reply = Response::new(SimBody::Stream(Box::new(stream)));
        let events = header::HeaderValue::from_static("text/event-stream; charset=utf-8");
        reply.headers_mut().insert(header::CONTENT_TYPE, events);
        reply
    }

    /// The metrics of vLLM by which gateways balance.
    fn metrics(&self) -> Reply {
        let running = self.counters.in_flight.load(Relaxed);
        let label = format!("{{engine=\"0\",model_name=\"{MODEL}\"}}");
        let text = format!(
            "# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running{label} {running}.0\n\
             # TYPE vllm:num_requests_waiting gauge\nvllm:num_requests_waiting{label} 0.0\n\
             # TYPE vllm:kv_cache_usage_perc gauge\nvllm:kv_cache_usage_perc{label} 0.1\n"
        );
        let mut reply = json(StatusCode::OK, text);
        let plain = header::HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
        reply.headers_mut().insert(header::CONTENT_TYPE, plain);
        reply
    }
}
