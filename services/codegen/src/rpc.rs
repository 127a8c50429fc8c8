//! The RPCs of the codegen service: they validate a request, start its generation, and return the events
//! as a stream or collected into one reply.

use std::pin::Pin;
use std::sync::Arc;

use futures_util::stream::{Stream, StreamExt as _, iter, unfold};
use hapa_core::call::Call;
use hapa_core::call_stats::CallStats;
use hapa_proto::codegen::v1::codegen_service_server::CodegenService;
use hapa_proto::codegen::v1::stream_generate_code_response::{Event, Kind};
use hapa_proto::codegen::v1::{
    CompleteCodeRequest, CompleteCodeResponse, GenerateCodeRequest, GenerateCodeResponse,
    GetCodeHealthRequest, GetCodeHealthResponse, ListModelsRequest, ListModelsResponse,
    StreamCompleteCodeResponse, StreamGenerateCodeResponse, ValidateCodeRequest,
    ValidateCodeResponse,
};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};
use tracing::Instrument as _;

use crate::cache::{self, Asked, Cache, Guest, Key, Said, Seat};
use crate::complete::Completions;
use crate::error::Error;
use crate::generation::Generation;
use crate::idempotency::Idempotency;
use crate::order::Order;
use crate::request::generate_params::GenerateParams;
use crate::request::model::ModelCatalog;
use crate::request::task::ModelChoice;
use crate::schedule::budget::{Budgets, Estimate};
use crate::schedule::fair_queue::{FairQueue, WorkKind};
use crate::share::Source;
use crate::upstream::pool::{EnginePool, balancer};
use crate::validate::{self, CodeInspector, ValidationPool};
use crate::watch::{Patience, millis};

pub(crate) struct Codegen {
    pub(crate) pool: EnginePool,
    pub(crate) models: Arc<ModelCatalog>,
    pub(crate) queue: FairQueue,
    pub(crate) budgets: Budgets,
    pub(crate) cache: Cache,
    pub(crate) patience: Patience,
    pub(crate) validation_pool: ValidationPool,
    pub(crate) streams_end: CancellationToken,
    pub(crate) completions: Completions,
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
        // Boxed: the state moves with every frame.
        let seat = Box::new(self.start_generation(request).await?);
        let events = unfold(seat, |mut seat| async { Some((seat.next().await?, seat)) });
        let frames = events.zip(iter(0..)).map(|(event, sequence)| {
            event.map(|event| StreamGenerateCodeResponse { sequence, event: Some(event) })
        });
        Ok(Response::new(Box::pin(frames)))
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
        Ok(Response::new(Box::pin(self.completions.stream(request).await?)))
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
        _: Request<ListModelsRequest>,
    ) -> Result<Response<ListModelsResponse>, Status> {
        Ok(Response::new(self.models.list().await?))
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
        let arrived = Call::from_extensions(request.extensions())?.arrived;
        let mut seat = self.start_generation(request).await?;
        let mut builder = ReplyBuilder::default();
        while let Some(event) = seat.next().await {
            builder.push(event?);
        }
        builder.reply.response_time_ms = millis(arrived.elapsed());
        Ok(builder.build())
    }

    async fn start_generation(
        &self,
        request: Request<GenerateCodeRequest>,
    ) -> Result<Seat, Status> {
        let call = Call::from_extensions(request.extensions())?;
        let principal = call.principal.as_deref();
        let request = request.into_inner();
        let fresh = request.no_cache;
        let stored = principal.and_then(|caller| caller.profile.as_ref());
        let params = GenerateParams::validate(request, stored)?;
        if let Some(id) = &params.request_id {
            call.set_client_request_id(id);
        }
        let named = params.model.as_deref();
        let ModelChoice { model, warning } = self.models.choose(&call, &params.task, named).await?;
        let tenant = principal.map_or("", |caller| &caller.owner);
        let scheduling = self.queue.scheduling(tenant, WorkKind::Generation);
        let body = params.body(&model, scheduling).map_err(anyhow::Error::from);
        let body = body.map_err(Error::from)?;
        let key = Key::of(cache::Question {
            tenant: principal.map(|caller| caller.owner.as_str()),
            model: &model,
            revision: &self.models.revision(&model),
            body: &body,
        });
        let asked = Asked { key, subject: call.actor().into(), fresh };
        let request_id =
            params.request_id.as_deref().map_or_else(|| call.request_id.clone(), Arc::from);
        let model_and_task = (model.clone(), params.task.clone());
        let mut guest = Guest::new(&call, request_id, model_and_task, self.patience.heartbeat);
        if let Some(warning) = warning {
            guest.warn(warning);
        }
        let estimate = params.estimate(&body);
        let affinity = balancer::affinity(tenant, &params.session_id, &body);
        let inspector = CodeInspector::new(&params.language);
        let sampling = params.sampling();
        let order = Order { model, body, affinity, lease: None, turn: None, inspector, sampling };
        self.cache.answer(asked, guest, || self.generation(&call, order, estimate)).await
    }

    /// A generation and the report that receives its usage. No caller's deadline ends it, because other
    /// callers may join later. It is lazy: nothing happens before the first poll.
    fn generation(
        &self,
        call: &Call,
        mut order: Order,
        estimate: Estimate,
    ) -> (Source<Said>, CallStats) {
        let (call, patience, streams_end) =
            (call.detached(), self.patience, self.streams_end.clone());
        let (pool, queue, budgets) = (self.pool.clone(), self.queue.clone(), self.budgets.clone());
        let report = call.stats().clone();
        let begin = async move {
            let tenant = call.principal.as_ref().map_or("", |caller| &caller.owner);
            let started = Instant::now();
            let permit = queue.acquire(tenant, WorkKind::Generation).await;
            call.stats().set_queue_time(started.elapsed());
            order.turn = Some(permit?);
            order.lease = budgets.reserve(&call, estimate).await?;
            Generation::begin(&pool, order, &call, patience, streams_end).await
        };
        // The span of the call that started it, independent of which caller polls.
        (cache::source(begin.in_current_span()), report)
    }
}

/// Collects the events of a stream into one reply.
#[derive(Default)]
struct ReplyBuilder {
    reply: GenerateCodeResponse,
    has_code: bool,
}

impl ReplyBuilder {
    fn push(&mut self, event: Event) {
        match event {
            Event::Started(started) => {
                self.reply.request_id = started.request_id;
                self.reply.model = started.model;
                self.reply.task = started.task;
                self.reply.cached = started.cached;
            }
            Event::Delta(delta) if delta.kind() == Kind::Code => {
                self.has_code = true;
                self.reply.generated_code.push_str(&delta.text);
            }
            Event::Delta(delta) => self.reply.explanation.push_str(&delta.text),
            Event::Finished(finished) => {
                self.reply.finish_reason = finished.finish_reason;
                self.reply.usage = finished.usage;
                self.reply.warnings = finished.warnings;
            }
            Event::Heartbeat(_) | Event::Failed(_) => {}
        }
    }

    fn build(mut self) -> GenerateCodeResponse {
        if !self.has_code {
            self.reply.generated_code = std::mem::take(&mut self.reply.explanation);
        }
        "success".clone_into(&mut self.reply.status);
        self.reply
    }
}
