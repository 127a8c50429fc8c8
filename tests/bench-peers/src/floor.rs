//! The floor: the least that a tonic service can do to turn an event stream into a gRPC stream. It has the
//! messages of HAPA, and no routing, retries, limits or telemetry.

use std::borrow::Cow;
use std::net::Ipv4Addr;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Bytes, BytesMut};
use futures_util::Stream;
use futures_util::stream::Empty;
use hapa_proto::codegen::v1::codegen_service_server::{CodegenService, CodegenServiceServer};
use hapa_proto::codegen::v1::stream_generate_code_response::{Delta, Event, Finished};
use hapa_proto::codegen::v1::{
    CompleteCodeRequest, CompleteCodeResponse, GenerateCodeRequest, GenerateCodeResponse,
    GetCodeHealthRequest, GetCodeHealthResponse, ListModelsRequest, ListModelsResponse,
    StreamCompleteCodeResponse, StreamGenerateCodeResponse, ValidateCodeRequest,
    ValidateCodeResponse,
};
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Body as _, Incoming};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde::Deserialize;
use tonic::{Request, Response, Status};

struct Floor {
    client: Client<HttpConnector, Full<Bytes>>,
    uri: http::Uri,
}

#[derive(Deserialize)]
struct UpstreamMessage<'a> {
    #[serde(borrow, default)]
    choices: Vec<UpstreamChoice<'a>>,
}

#[derive(Deserialize)]
struct UpstreamChoice<'a> {
    #[serde(borrow, alias = "message")]
    delta: Option<UpstreamContent<'a>>,
}

#[derive(Deserialize)]
struct UpstreamContent<'a> {
    #[serde(borrow)]
    content: Option<Cow<'a, str>>,
}

impl UpstreamMessage<'_> {
    fn text(&self) -> &str {
        let content =
            self.choices.first().and_then(|choice| choice.delta.as_ref()?.content.as_ref());
        content.map_or("", |text| text.as_ref())
    }
}

impl Floor {
    async fn ask(&self, request: GenerateCodeRequest, stream: bool) -> Result<Incoming, Status> {
        let mut body = serde_json::json!({
            "model": "base", "max_tokens": request.max_tokens, "stream": stream,
            "messages": [{"role": "user", "content": request.user_question}],
        });
        if stream {
            body["stream_options"] = serde_json::json!({"include_usage": true});
        }
        let request = http::Request::post(self.uri.clone())
            .header("content-type", "application/json")
            .body(Full::from(body.to_string()))
            .map_err(|error| Status::internal(error.to_string()))?;
        let response = self.client.request(request).await.map_err(unavailable)?;
        if response.status() != 200 {
            return Err(Status::unavailable(response.status().to_string()));
        }
        Ok(response.into_body())
    }
}

fn unavailable(error: impl std::fmt::Display) -> Status {
    Status::unavailable(error.to_string())
}

/// Reads events from the body of the upstream, and yields one message for each.
struct Relay {
    body: Incoming,
    unread: BytesMut,
    sequence: u32,
    is_done: bool,
}

impl Relay {
    fn next_message(&mut self) -> Option<Result<StreamGenerateCodeResponse, Status>> {
        while let Some(end) = memchr::memchr(b'\n', &self.unread) {
            let line = self.unread.split_to(end + 1);
            let Some(data) = line.strip_prefix(b"data: ") else { continue };
            let event = if data.starts_with(b"[DONE]") {
                self.is_done = true;
                Event::Finished(Finished::default())
            } else {
                let message = serde_json::from_slice::<UpstreamMessage<'_>>(data);
                match message.as_ref().map(UpstreamMessage::text) {
                    Ok("") => continue,
                    Ok(text) => Event::Delta(Delta { text: text.to_owned(), ..Delta::default() }),
                    Err(error) => return Some(Err(Status::internal(error.to_string()))),
                }
            };
            let sequence = self.sequence;
            self.sequence += 1;
            return Some(Ok(StreamGenerateCodeResponse { sequence, event: Some(event) }));
        }
        None
    }
}

impl Stream for Relay {
    type Item = Result<StreamGenerateCodeResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if self.is_done {
                return Poll::Ready(None);
            }
            if let Some(message) = self.next_message() {
                return Poll::Ready(Some(message));
            }
            match Pin::new(&mut self.body).poll_frame(context) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Some(Ok(frame))) => {
                    self.unread.extend_from_slice(&frame.into_data().unwrap_or_default());
                }
                Poll::Ready(ended) => {
                    self.is_done = true;
                    let reason = ended.and_then(Result::err);
                    let reason =
                        reason.map_or("it ended early".to_owned(), |error| error.to_string());
                    return Poll::Ready(Some(Err(Status::unavailable(reason))));
                }
            }
        }
    }
}

#[tonic::async_trait]
impl CodegenService for Floor {
    type StreamGenerateCodeStream = Relay;
    type StreamCompleteCodeStream = Empty<Result<StreamCompleteCodeResponse, Status>>;

    async fn stream_generate_code(
        &self,
        request: Request<GenerateCodeRequest>,
    ) -> Result<Response<Relay>, Status> {
        let body = self.ask(request.into_inner(), true).await?;
        let unread = BytesMut::with_capacity(4096);
        Ok(Response::new(Relay { body, unread, sequence: 0, is_done: false }))
    }

    async fn generate_code(
        &self,
        request: Request<GenerateCodeRequest>,
    ) -> Result<Response<GenerateCodeResponse>, Status> {
        let body = self.ask(request.into_inner(), false).await?;
        let body = body.collect().await.map_err(unavailable)?.to_bytes();
        let message = serde_json::from_slice::<UpstreamMessage<'_>>(&body);
        let message = message.map_err(|error| Status::internal(error.to_string()))?;
        let generated_code = message.text().to_owned();
        Ok(Response::new(GenerateCodeResponse {
            generated_code,
            ..GenerateCodeResponse::default()
        }))
    }

    async fn validate_code(
        &self,
        _: Request<ValidateCodeRequest>,
    ) -> Result<Response<ValidateCodeResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn complete_code(
        &self,
        _: Request<CompleteCodeRequest>,
    ) -> Result<Response<CompleteCodeResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn stream_complete_code(
        &self,
        _: Request<CompleteCodeRequest>,
    ) -> Result<Response<Self::StreamCompleteCodeStream>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn list_models(
        &self,
        _: Request<ListModelsRequest>,
    ) -> Result<Response<ListModelsResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn get_code_health(
        &self,
        _: Request<GetCodeHealthRequest>,
    ) -> Result<Response<GetCodeHealthResponse>, Status> {
        Err(Status::unimplemented(""))
    }
}

/// Serves until the process ends.
pub(crate) async fn serve(port: u16, upstream: u16) -> anyhow::Result<()> {
    let mut connector = HttpConnector::new();
    connector.set_nodelay(true);
    let floor = Floor {
        client: Client::builder(TokioExecutor::new()).build(connector),
        uri: format!("http://127.0.0.1:{upstream}/v1/chat/completions").parse()?,
    };
    let server = tonic::transport::Server::builder().add_service(CodegenServiceServer::new(floor));
    Ok(server.serve((Ipv4Addr::LOCALHOST, port).into()).await?)
}
