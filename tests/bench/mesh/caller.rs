//! The callers: the same request to the engine itself and on each path to it. The answers are counted in
//! tokens.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use hapa_proto::codegen::v1::codegen_service_client::CodegenServiceClient;
use hapa_proto::codegen::v1::stream_generate_code_response::Event;
use hapa_proto::codegen::v1::{GenerateCodeRequest, StreamGenerateCodeResponse};
use hapa_transport::peer::MESH_TOKEN;
use secrecy::ExposeSecret as _;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Streaming};

use crate::engine::{MAX_TOKENS, TOKEN_BYTES};
use crate::http::{Ask, Connection};
use crate::stage::{Stage, loopback};

const QUESTION: &str = "Write a function that greets by name.";
/// Streams that share a connection: below what the mesh allows on one.
const STREAMS_A_CHANNEL: usize = 100;

/// A way to the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Direct,
    PlainEnvoy,
    Mesh,
    /// As a service of the mesh: past credential, scope and limit.
    MeshToken,
    Gateway,
    GatewayJson,
}

impl Way {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Way::Direct => "the engine directly, SSE",
            Way::PlainEnvoy => "plain Envoy, SSE",
            Way::Mesh => "the mesh, gRPC",
            Way::MeshToken => "the mesh with its own token, gRPC",
            Way::Gateway => "the gateway, gRPC",
            Way::GatewayJson => "the gateway, JSON as SSE",
        }
    }
}

/// A caller with at most one open stream.
pub(crate) struct Caller(Kind);

enum Kind {
    Http { connection: Connection, ask: Ask },
    Grpc { client: Client, stream: Option<Box<Streaming<StreamGenerateCodeResponse>>> },
}

#[derive(Clone)]
struct Client {
    service: CodegenServiceClient<Channel>,
    /// Name and value of the header.
    credential: (&'static str, MetadataValue<Ascii>),
    answers: Answers,
}

/// Whether an answer may be one that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answers {
    Fresh,
    Known,
}

impl Caller {
    /// `n` callers, each ready for a request.
    pub(crate) async fn many(stage: &Stage, way: Way, n: usize) -> anyhow::Result<Vec<Self>> {
        let mut callers = Vec::with_capacity(n);
        let mut client = None;
        for index in 0..n {
            if let Way::Mesh | Way::MeshToken | Way::Gateway = way {
                if index % STREAMS_A_CHANNEL == 0 {
                    client = Some(Client::connect(stage, way, Answers::Fresh).await?);
                }
                let client = client.clone().context("no client")?;
                callers.push(Caller(Kind::Grpc { client, stream: None }));
            } else {
                callers.push(Self::http(stage, way, Answers::Fresh).await?);
            }
        }
        Ok(callers)
    }

    pub(crate) async fn one(stage: &Stage, way: Way) -> anyhow::Result<Self> {
        Self::many(stage, way, 1).await?.pop().context("no caller")
    }

    /// A caller of questions that the mesh may have cached. The others request fresh ones.
    pub(crate) async fn who_takes_known(stage: &Stage, way: Way) -> anyhow::Result<Self> {
        if way == Way::GatewayJson {
            return Self::http(stage, way, Answers::Known).await;
        }
        let client = Client::connect(stage, way, Answers::Known).await?;
        Ok(Caller(Kind::Grpc { client, stream: None }))
    }

    async fn http(stage: &Stage, way: Way, answers: Answers) -> anyhow::Result<Self> {
        let address = match way {
            Way::PlainEnvoy => stage.plain.address(),
            Way::GatewayJson => stage.gateway.address(),
            _ => loopback(stage.engine.port),
        };
        let ask = if way == Way::GatewayJson {
            let no_cache = answers == Answers::Fresh;
            let body = format!(
                r#"{{"user_question":"{QUESTION}","max_tokens":{MAX_TOKENS},"no_cache":{no_cache}}}"#
            );
            Ask::post("/api/v1/enhanced-stream-generate", &stage.key, &body)
        } else {
            let body = format!(
                r#"{{"messages":[{{"role":"user","content":"{QUESTION}"}}],"stream":true,"max_tokens":{MAX_TOKENS},"stream_options":{{"include_usage":true}}}}"#
            );
            Ask::post("/v1/chat/completions", "", &body)
        };
        Ok(Caller(Kind::Http { connection: Connection::open(address).await?, ask }))
    }

    /// One like this: over the same connection where it carries many streams.
    pub(crate) async fn another(&self) -> anyhow::Result<Self> {
        Ok(Caller(match &self.0 {
            Kind::Http { connection, ask } => {
                Kind::Http { connection: connection.another().await?, ask: ask.clone() }
            }
            Kind::Grpc { client, .. } => Kind::Grpc { client: client.clone(), stream: None },
        }))
    }

    /// Asks, and waits until the answer begins.
    pub(crate) async fn ask(&mut self) -> anyhow::Result<()> {
        match &mut self.0 {
            Kind::Http { connection, ask } => {
                let status = connection.ask(ask).await?;
                ensure!(status == 200, "the answer was {status}");
            }
            Kind::Grpc { client, stream } => {
                // The drop comes last: a drop before the end makes the mesh stop the generation.
                *stream = None;
                *stream = Some(Box::new(client.ask().await?));
            }
        }
        Ok(())
    }

    /// The number of tokens that come next, none at the stream's end.
    pub(crate) async fn tokens(&mut self) -> anyhow::Result<Option<u32>> {
        let stream = match &mut self.0 {
            Kind::Http { connection, .. } => return connection.tokens().await,
            Kind::Grpc { stream, .. } => stream.as_mut().context("nothing was asked")?,
        };
        while let Some(frame) = stream.message().await? {
            match frame.event {
                Some(Event::Delta(delta)) => {
                    return Ok(Some(u32::try_from(delta.text.len() / TOKEN_BYTES)?));
                }
                Some(Event::Failed(failed)) => anyhow::bail!("it failed: {}", failed.message),
                _ => {}
            }
        }
        Ok(None)
    }

    /// Reads to the end, after which the connection is free.
    pub(crate) async fn drain(&mut self) -> anyhow::Result<()> {
        while self.tokens().await?.is_some() {}
        Ok(())
    }
}

impl Client {
    async fn connect(stage: &Stage, way: Way, answers: Answers) -> anyhow::Result<Self> {
        let part = if way == Way::Gateway { &stage.gateway } else { &stage.hapa };
        let credential = match way {
            Way::MeshToken => (MESH_TOKEN, stage.mesh_token.expose_secret().parse()?),
            _ => ("x-api-key", stage.key.parse()?),
        };
        let endpoint = Endpoint::from_shared(format!("http://{}", part.address()))?;
        let endpoint = endpoint.connect_timeout(Duration::from_secs(5)).tcp_nodelay(true);
        // What a client of token streams should set: with h2's defaults unread small frames end the
        // connection before flow control can slow the sender.
        let endpoint = endpoint.initial_stream_window_size(16 * 1024);
        let endpoint = endpoint.initial_connection_window_size(64 * 1024 * 1024);
        let service = CodegenServiceClient::new(endpoint.connect().await?);
        Ok(Client { service, credential, answers })
    }

    async fn ask(&mut self) -> anyhow::Result<Streaming<StreamGenerateCodeResponse>> {
        let mut request = Request::new(GenerateCodeRequest {
            user_question: QUESTION.to_owned(),
            max_tokens: Some(i32::try_from(MAX_TOKENS)?),
            no_cache: self.answers == Answers::Fresh,
            ..GenerateCodeRequest::default()
        });
        let (header, value) = &self.credential;
        request.metadata_mut().insert(*header, value.clone());
        Ok(self.service.stream_generate_code(request).await?.into_inner())
    }
}
