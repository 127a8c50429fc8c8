//! The RPCs of the codegen service: they validate a request, pass it to the pipeline, and return the events as a stream
//! or collected into one reply.

use std::pin::Pin;
use std::sync::Arc;

use futures_util::stream::{Stream, StreamExt as _, poll_fn};
use hapa_core::call::Call;
use hapa_proto::codegen::v1::codegen_service_server::CodegenService;
use hapa_proto::codegen::v1::{
    CompleteCodeRequest, CompleteCodeResponse, GenerateCodeRequest, GenerateCodeResponse,
    GetCodeHealthRequest, GetCodeHealthResponse, ListModelsRequest, ListModelsResponse,
    StreamCompleteCodeResponse, StreamGenerateCodeResponse, ValidateCodeRequest,
    ValidateCodeResponse,
};
use tonic::{Request, Response, Status};

use crate::complete::Completions;
use crate::error::Error;
use crate::generate::Generations;
use crate::idempotency::Idempotency;
use crate::request::model::ModelCatalog;
use crate::validate::{self, ValidationPool};

pub(crate) struct Codegen {
    pub(crate) models: Arc<ModelCatalog>,
    pub(crate) generations: Generations,
    pub(crate) completions: Completions,
    pub(crate) validation_pool: ValidationPool,
    pub(crate) idempotency: Idempotency,
}

type Frames<T = StreamGenerateCodeResponse> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl CodegenService for Codegen {
    type StreamGenerateCodeStream = Frames;
    type StreamCompleteCodeStream = Frames<StreamCompleteCodeResponse>;

    async fn generate_code(
        &self,
        request: Request<GenerateCodeRequest>,
    ) -> Result<Response<GenerateCodeResponse>, Status> {
        self.idempotency.run_once(request, |request| Box::pin(self.generate(request))).await
    }

    async fn stream_generate_code(
        &self,
        request: Request<GenerateCodeRequest>,
    ) -> Result<Response<Frames>, Status> {
        let mut response = self.generations.start(request).await?;
        let events = poll_fn(move |cx| response.poll_next(cx));
        Ok(frames(events, |sequence, event| StreamGenerateCodeResponse {
            sequence,
            event: Some(event),
        }))
    }

    async fn complete_code(
        &self,
        request: Request<CompleteCodeRequest>,
    ) -> Result<Response<CompleteCodeResponse>, Status> {
        self.idempotency
            .run_once(request, |request| Box::pin(self.completions.complete(request)))
            .await
    }

    async fn stream_complete_code(
        &self,
        request: Request<CompleteCodeRequest>,
    ) -> Result<Response<Frames<StreamCompleteCodeResponse>>, Status> {
        let mut response = self.completions.start(request).await?;
        let events = poll_fn(move |cx| response.poll_next(cx));
        Ok(frames(events, |sequence, event| StreamCompleteCodeResponse {
            sequence,
            event: Some(event),
        }))
    }

    async fn validate_code(
        &self,
        request: Request<ValidateCodeRequest>,
    ) -> Result<Response<ValidateCodeResponse>, Status> {
        let call = Call::from_extensions(request.extensions())?;
        let request = request.into_inner();
        let language = validate::validate_request(&request).map_err(Error::from)?;
        if !request.request_id.is_empty() {
            call.set_client_request_id(&request.request_id);
        }
        Ok(Response::new(self.validation_pool.validate(request, language).await?))
    }

    async fn list_models(
        &self,
        request: Request<ListModelsRequest>,
    ) -> Result<Response<ListModelsResponse>, Status> {
        let call = Call::from_extensions(request.extensions())?;
        Ok(Response::new(self.models.list(&call).await?))
    }

    async fn get_code_health(
        &self,
        _: Request<GetCodeHealthRequest>,
    ) -> Result<Response<GetCodeHealthResponse>, Status> {
        Ok(Response::new(self.models.health().await))
    }
}

impl Codegen {
    /// The unary RPC without its idempotency key.
    async fn generate(
        &self,
        request: Request<GenerateCodeRequest>,
    ) -> Result<GenerateCodeResponse, Status> {
        self.generations.start(request).await?.collect().await
    }
}

/// The messages of a stream: its events, with their sequence numbers.
fn frames<E: 'static, M: 'static>(
    events: impl Stream<Item = Result<E, Status>> + Send + 'static,
    message: fn(u32, E) -> M,
) -> Response<Frames<M>> {
    let mut sequence = 0..;
    Response::new(Box::pin(
        events.map(move |event| {
            event.map(|event| message(sequence.next().unwrap_or_default(), event))
        }),
    ))
}
