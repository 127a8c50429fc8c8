//! The RPCs of code generation: check, order, and hand on the frames or gather them into one reply.

use std::pin::Pin;
use std::sync::Arc;

use futures_util::stream::{Stream, StreamExt as _, iter, unfold};
use hapa_core::call::Call;
use hapa_core::call_stats::Report;
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

use crate::budget::{Budgets, Estimate};
use crate::cache::{self, Asked, Cache, Guest, Key, Said, Seat};
use crate::completion::Completions;
use crate::error::Error;
use crate::generation::Generation;
use crate::idempotency::Idempotency;
use crate::model::Models;
use crate::order::Order;
use crate::question::Question;
use crate::route::{Fleet, choose};
use crate::share::Source;
use crate::task::Chosen;
use crate::turn::{self, Turns};
use crate::validate::{self, Inspector, Validators};
use crate::watch::{Patience, millis};

pub(crate) struct Codegen {
    pub(crate) fleet: Fleet,
    pub(crate) models: Arc<Models>,
    pub(crate) turns: Turns,
    pub(crate) budgets: Budgets,
    pub(crate) cache: Cache,
    pub(crate) patience: Patience,
    pub(crate) validators: Validators,
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
        self.idempotency.once(request, |request| Box::pin(self.whole_answer(request))).await
    }

    async fn stream_generate_code(
        &self,
        request: Request<GenerateCodeRequest>,
    ) -> Result<Response<Frames>, Status> {
        // Boxed: the state moves with every frame.
        let seat = Box::new(self.begin(request).await?);
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
        self.idempotency.once(request, |request| Box::pin(self.completions.whole(request))).await
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
        let call = Call::of(request.extensions())?;
        let request = request.into_inner();
        let language = validate::check(&request).map_err(Error::from)?;
        if !request.request_id.is_empty() {
            call.also_named(&request.request_id);
        }
        Ok(Response::new(self.validators.validate(request, language).await?))
    }

    async fn list_models(
        &self,
        _: Request<ListModelsRequest>,
    ) -> Result<Response<ListModelsResponse>, Status> {
        Ok(Response::new(self.models.show().await?))
    }

    async fn get_code_health(
        &self,
        _: Request<GetCodeHealthRequest>,
    ) -> Result<Response<GetCodeHealthResponse>, Status> {
        Ok(Response::new(self.models.health().await))
    }
}

impl Codegen {
    /// In one reply.
    async fn whole_answer(
        &self,
        request: Request<GenerateCodeRequest>,
    ) -> Result<GenerateCodeResponse, Status> {
        let arrived = Call::of(request.extensions())?.arrived;
        let mut seat = self.begin(request).await?;
        let mut answer = Answer::default();
        while let Some(event) = seat.next().await {
            answer.take(event?);
        }
        answer.reply.response_time_ms = millis(arrived.elapsed());
        Ok(answer.whole())
    }

    async fn begin(&self, request: Request<GenerateCodeRequest>) -> Result<Seat, Status> {
        let call = Call::of(request.extensions())?;
        let caller = call.principal.as_deref();
        let request = request.into_inner();
        let fresh = request.no_cache;
        let stored = caller.and_then(|caller| caller.profile.as_ref());
        let question = Question::check(request, stored)?;
        if let Some(id) = &question.request_id {
            call.also_named(id);
        }
        let named = question.model.as_deref();
        let Chosen { model, warning } = self.models.choose(&call, &question.task, named).await?;
        let tenant = caller.map_or("", |caller| &caller.owner);
        let scheduling = self.turns.scheduling(tenant, turn::Kind::Question);
        let body = question.body(&model, scheduling).map_err(anyhow::Error::from);
        let body = body.map_err(Error::from)?;
        let key = Key::of(cache::Question {
            tenant: caller.map(|caller| caller.owner.as_str()),
            model: &model,
            revision: &self.models.revision(&model),
            body: &body,
        });
        let asked = Asked { key, subject: call.actor().into(), fresh };
        let request_id =
            question.request_id.as_deref().map_or_else(|| call.request_id.clone(), Arc::from);
        let shown = (model.clone(), question.task.clone());
        let mut guest = Guest::new(&call, request_id, shown, self.patience.heartbeat);
        if let Some(words) = warning {
            guest.warn(words);
        }
        let estimate = question.estimate(&body);
        let affinity = choose::affinity(tenant, &question.session_id, &body);
        let inspector = Inspector::new(&question.language);
        let sampling = question.sampling();
        let order = Order { model, body, affinity, lease: None, turn: None, inspector, sampling };
        self.cache.answer(asked, guest, || self.generation(&call, order, estimate)).await
    }

    /// A generation that nobody's deadline ends, since others may come to read it; and where it notes
    /// what it used. Nothing is done before it is pulled.
    fn generation(
        &self,
        call: &Call,
        mut order: Order,
        estimate: Estimate,
    ) -> (Source<Said>, Report) {
        let (call, patience, streams_end) = (call.apart(), self.patience, self.streams_end.clone());
        let (fleet, turns, budgets) =
            (self.fleet.clone(), self.turns.clone(), self.budgets.clone());
        let report = call.report().clone();
        let begin = async move {
            let tenant = call.principal.as_ref().map_or("", |caller| &caller.owner);
            let asked = Instant::now();
            let turn = turns.take(tenant, turn::Kind::Question).await;
            call.report().queued(asked.elapsed());
            order.turn = Some(turn?);
            order.lease = budgets.reserve(&call, estimate).await?;
            Generation::begin(&fleet, order, &call, patience, streams_end).await
        };
        // Whoever reads it, it is asked for on behalf of who began it.
        (cache::source(begin.in_current_span()), report)
    }
}

/// A stream's events, gathered.
#[derive(Default)]
struct Answer {
    reply: GenerateCodeResponse,
    has_code: bool,
}

impl Answer {
    fn take(&mut self, event: Event) {
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

    fn whole(mut self) -> GenerateCodeResponse {
        if !self.has_code {
            self.reply.generated_code = std::mem::take(&mut self.reply.explanation);
        }
        "success".clone_into(&mut self.reply.status);
        self.reply
    }
}
