//! The RPCs of code generation: check, order, and hand on the frames or gather them into one reply.

use std::pin::Pin;
use std::sync::Arc;

use futures_util::Stream;
use futures_util::stream::unfold;
use hapa_chassis::Call;
use hapa_proto::codegen::v1::codegen_service_server::CodegenService;
use hapa_proto::codegen::v1::stream_generate_code_response::{Event, Kind};
use hapa_proto::codegen::v1::{
    CompleteCodeRequest, CompleteCodeResponse, GenerateCodeRequest, GenerateCodeResponse,
    GetCodeHealthRequest, GetCodeHealthResponse, ListModelsRequest, ListModelsResponse,
    StreamCompleteCodeResponse, StreamGenerateCodeResponse,
};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use crate::budget::Budgets;
use crate::completion::Completions;
use crate::error::Error;
use crate::generation::Generation;
use crate::model::Models;
use crate::order::Order;
use crate::question::Question;
use crate::route::{Fleet, choose};
use crate::task::Chosen;
use crate::turn::{self, Turns};
use crate::watch::{Patience, millis};

pub(crate) struct Codegen {
    pub(crate) fleet: Fleet,
    pub(crate) models: Arc<Models>,
    pub(crate) turns: Turns,
    pub(crate) budgets: Budgets,
    pub(crate) patience: Patience,
    pub(crate) streams_end: CancellationToken,
    pub(crate) completions: Completions,
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
        let arrived = Call::of(request.extensions())?.arrived;
        let mut generation = self.begin(request).await?;
        let mut answer = Answer::default();
        while let Some(frame) = generation.next().await {
            answer.take(frame?);
        }
        answer.reply.response_time_ms = millis(arrived.elapsed());
        Ok(Response::new(answer.whole()))
    }

    async fn stream_generate_code(
        &self,
        request: Request<GenerateCodeRequest>,
    ) -> Result<Response<Frames>, Status> {
        // Boxed: the state moves with every frame.
        let generation = Box::new(self.begin(request).await?);
        let frames = unfold(generation, |mut generation| async {
            Some((generation.next().await?, generation))
        });
        Ok(Response::new(Box::pin(frames)))
    }

    async fn complete_code(
        &self,
        request: Request<CompleteCodeRequest>,
    ) -> Result<Response<CompleteCodeResponse>, Status> {
        Ok(Response::new(self.completions.whole(request).await?))
    }

    async fn stream_complete_code(
        &self,
        request: Request<CompleteCodeRequest>,
    ) -> Result<Response<Frames<StreamCompleteCodeResponse>>, Status> {
        Ok(Response::new(Box::pin(self.completions.stream(request).await?)))
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
    async fn begin(&self, request: Request<GenerateCodeRequest>) -> Result<Generation, Error> {
        let call = Call::of(request.extensions()).map_err(|status| anyhow::anyhow!("{status}"))?;
        let stored = call.principal.as_ref().and_then(|caller| caller.profile.as_ref());
        let question = Question::check(request.into_inner(), stored)?;
        if let Some(id) = &question.request_id {
            call.also_named(id);
        }
        let Chosen { model, warning } =
            self.models.choose(&call, &question.task, question.model.as_deref()).await?;
        let tenant = call.principal.as_ref().map_or("", |caller| &caller.owner);
        let scheduling = self.turns.scheduling(tenant, turn::Kind::Question);
        let body = question.body(&model, scheduling).map_err(anyhow::Error::from)?;
        let turn = Some(self.turns.take(tenant, turn::Kind::Question).await?);
        let lease = self.budgets.reserve(&call, question.most_tokens(&body)).await?;
        let request_id = question.request_id.map_or_else(|| call.request_id.clone(), Arc::from);
        let affinity = choose::affinity(tenant, &question.session_id, &body);
        let (task, warnings) = (question.task, warning.into_iter().collect());
        let order = Order { model, task, request_id, body, affinity, lease, turn, warnings };
        Generation::begin(&self.fleet, order, &call, self.patience, self.streams_end.clone()).await
    }
}

/// A stream's frames, gathered.
#[derive(Default)]
struct Answer {
    reply: GenerateCodeResponse,
    has_code: bool,
}

impl Answer {
    fn take(&mut self, frame: StreamGenerateCodeResponse) {
        match frame.event {
            Some(Event::Started(started)) => {
                self.reply.request_id = started.request_id;
                self.reply.model = started.model;
                self.reply.task = started.task;
                self.reply.cached = started.cached;
            }
            Some(Event::Delta(delta)) if delta.kind() == Kind::Code => {
                self.has_code = true;
                self.reply.generated_code.push_str(&delta.text);
            }
            Some(Event::Delta(delta)) => self.reply.explanation.push_str(&delta.text),
            Some(Event::Finished(finished)) => {
                self.reply.finish_reason = finished.finish_reason;
                self.reply.usage = finished.usage;
                self.reply.warnings = finished.warnings;
            }
            Some(Event::Heartbeat(_) | Event::Failed(_)) | None => {}
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
