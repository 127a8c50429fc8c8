//! Code generation: answers a question with code and explanation.

pub(crate) mod answer;
mod code_block_tracker;
pub(crate) mod control_token_filter;
pub(crate) mod events;
pub(crate) mod fence;
mod inline_reasoning;
#[cfg(test)]
mod pieces;
pub(crate) mod think_tags;
pub(crate) mod unfenced;

use std::sync::Arc;

use hapa_core::call::Call;
use hapa_proto::codegen::v1::GenerateCodeRequest;
use tonic::{Request, Status};

use crate::error::Error;
use crate::generate::answer::GenerateFold;
use crate::generate::events::GenerateResponse;
use crate::generate::inline_reasoning::InlineReasoning;
use crate::request::generate_params::GenerateParams;
use crate::request::model::ModelCatalog;
use crate::request::task::ModelChoice;
use crate::schedule::fair_queue::WorkKind;
use crate::stream::cache::{CacheKey, CacheKeyInput};
use crate::stream::{Fold, GenerationJob, Pipeline, Sharing, SubscriberContext};
use crate::upstream::engine::Operation;
use crate::upstream::pool::balancer;

/// Starts generations.
pub(crate) struct Generations {
    models: Arc<ModelCatalog>,
    pipeline: Arc<Pipeline>,
    inline_reasoning: Arc<InlineReasoning>,
}

impl Generations {
    pub(crate) fn new(models: Arc<ModelCatalog>, pipeline: Arc<Pipeline>) -> Generations {
        Generations { models, pipeline, inline_reasoning: Arc::default() }
    }

    /// Validates a request, chooses its model, and starts its response.
    pub(crate) async fn start(
        &self,
        request: Request<GenerateCodeRequest>,
    ) -> Result<GenerateResponse, Status> {
        let call = Call::from_extensions(request.extensions())?;
        let request = request.into_inner();
        let (is_fresh, include_reasoning) = (request.no_cache, request.include_reasoning);
        let principal = call.principal.as_deref();
        let stored = principal.and_then(|caller| caller.profile.as_ref());
        let params = GenerateParams::validate(request, stored)?;
        if let Some(id) = &params.request_id {
            call.set_client_request_id(id);
        }
        let named = params.model.as_deref();
        let ModelChoice { model, warning } = self.models.choose(&call, &params.task, named).await?;
        call.stats().set_model(&model);
        call.stats().set_task(&params.task);
        let engines = &self.pipeline.engines;
        let mut context =
            SubscriberContext::new(&call, engines.timeouts.heartbeat, include_reasoning);
        if let Some(warning) = warning {
            context.warn(warning);
        }
        let (sharing, job) = self.prepare(&call, &params, &model, is_fresh)?;
        let response = self.pipeline.respond_cached(&call, sharing, context, job).await?;
        let named = params.request_id.as_deref();
        let request_id = named.map_or_else(|| Arc::clone(&call.request_id), Arc::from);
        let GenerateParams { task, language, .. } = params;
        Ok(GenerateResponse { response, request_id, model, task, language, include_reasoning })
    }

    fn prepare(
        &self,
        call: &Call,
        params: &GenerateParams,
        model: &str,
        is_fresh: bool,
    ) -> Result<(Sharing, GenerationJob), Error> {
        let tenant = call.principal.as_ref().map(|caller| caller.owner.as_str());
        let queue = &self.pipeline.engines.scheduler.queue;
        let scheduling = queue.scheduling(tenant.unwrap_or_default(), WorkKind::Generation);
        let body = params.body(model, scheduling).map_err(anyhow::Error::from)?;
        let max_reasoning_tokens = params.max_reasoning_tokens;
        let limit = max_reasoning_tokens.map(u32::to_be_bytes);
        let key = CacheKey::new(CacheKeyInput {
            tenant,
            model,
            revision: &self.models.revision(model),
            body: &body,
            options: limit.as_ref().map(<[u8; 4]>::as_slice).as_slice(),
        });
        let inline_reasoning = Arc::clone(&self.inline_reasoning);
        let owner_and_model = (tenant.unwrap_or_default().to_owned(), model.to_owned());
        let fold = GenerateFold::new(owner_and_model, &params.language, inline_reasoning);
        let job = GenerationJob {
            operation: Operation::Chat,
            work: WorkKind::Generation,
            model: model.to_owned(),
            affinity: balancer::affinity(tenant.unwrap_or_default(), &params.session_id, &body),
            estimate: params.estimate(&body),
            sampling: params.sampling(),
            max_reasoning_tokens,
            caller_fields: params.caller_fields.clone(),
            fold: Fold::Generate(Box::new(fold)),
            body,
        };
        Ok((Sharing { key, subject: call.actor().into(), is_fresh }, job))
    }
}
