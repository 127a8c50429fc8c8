//! The callers: the same request on each path to the engine. The answers are counted in tokens.

use std::time::Duration;

use anyhow::Context as _;
use hapa_proto::codegen::v1::codegen_service_client::CodegenServiceClient;
use hapa_proto::codegen::v1::stream_generate_code_response::Event;
use hapa_proto::codegen::v1::{GenerateCodeRequest, StreamGenerateCodeResponse};
use hapa_transport::peer::MESH_TOKEN;
use secrecy::ExposeSecret as _;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Streaming};

use crate::engine::{MAX_TOKENS, TOKEN_BYTES};
use crate::stage::Stage;

const QUESTION: &str = "Write a function that greets by name.";
/// Streams that share a connection: below what the mesh allows on one.
const STREAMS_A_CHANNEL: usize = 100;

/// A way to the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Mesh,
    /// As a service of the mesh: past credential, scope and limit.
    MeshToken,
    Gateway,
}

impl Way {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Way::Mesh => "the mesh, gRPC",
            Way::MeshToken => "the mesh with its own token, gRPC",
            Way::Gateway => "the gateway, gRPC",
        }
    }
}

/// A caller with at most one open stream.
pub(crate) struct Caller {
    client: Client,
    stream: Option<Box<Streaming<StreamGenerateCodeResponse>>>,
}

#[derive(Clone)]
struct Client {
    service: CodegenServiceClient<Channel>,
    /// Name and value of the header.
    credential: (&'static str, MetadataValue<Ascii>),
}

impl Caller {
    /// `n` callers, each ready for a request.
    pub(crate) async fn many(stage: &Stage, way: Way, n: usize) -> anyhow::Result<Vec<Self>> {
        let mut callers = Vec::with_capacity(n);
        let mut client = None;
        for index in 0..n {
            if index % STREAMS_A_CHANNEL == 0 {
                client = Some(Client::connect(stage, way).await?);
            }
            let client = client.clone().context("no client")?;
            callers.push(Caller { client, stream: None });
        }
        Ok(callers)
    }

    pub(crate) async fn one(stage: &Stage, way: Way) -> anyhow::Result<Self> {
        Self::many(stage, way, 1).await?.pop().context("no caller")
    }

    /// Asks, and waits until the answer begins.
    pub(crate) async fn ask(&mut self) -> anyhow::Result<()> {
        // A drop before the end makes the mesh stop the generation.
        self.stream = None;
        self.stream = Some(Box::new(self.client.ask().await?));
        Ok(())
    }

    /// The number of tokens that come next, none at the stream's end.
    pub(crate) async fn tokens(&mut self) -> anyhow::Result<Option<u32>> {
        let stream = self.stream.as_mut().context("nothing was asked")?;
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
    async fn connect(stage: &Stage, way: Way) -> anyhow::Result<Self> {
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
        Ok(Client { service, credential })
    }

    async fn ask(&mut self) -> anyhow::Result<Streaming<StreamGenerateCodeResponse>> {
        let mut request = Request::new(GenerateCodeRequest {
            user_question: QUESTION.to_owned(),
            max_tokens: Some(i32::try_from(MAX_TOKENS)?),
            no_cache: true,
            ..GenerateCodeRequest::default()
        });
        let (header, value) = &self.credential;
        request.metadata_mut().insert(*header, value.clone());
        Ok(self.service.stream_generate_code(request).await?.into_inner())
    }
}
