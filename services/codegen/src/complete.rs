//! Code completion: from the code around a cursor to distinct suggestions, best first. One engine request
//! generates all suggestions, a newer request of an editing session cancels the older one, and typing a
//! suggested text needs no further engine request.

pub(crate) mod answer;
mod choices;
mod completion_tokens;
mod fim;
mod params;
mod scope;
mod session_guard;
mod suggestion_cache;
mod trim;

use std::sync::Arc;
use std::task::{Context, Poll, ready};

use hapa_core::call::Call;
use hapa_proto::codegen::v1::stream_complete_code_response::{
    Delta, Event, Failed, Finished, Heartbeat, Started,
};
use hapa_proto::codegen::v1::{CompleteCodeRequest, CompleteCodeResponse, Suggestion, Usage};
use tonic::{Request, Status};

use crate::complete::answer::CompleteFold;
use crate::complete::fim::FimPrompt;
use crate::complete::params::CompletionParams;
use crate::complete::session_guard::{EditingSessions, SessionGuard};
use crate::complete::suggestion_cache::{SuggestionCache, SuggestionScope};
use crate::error::Error;
use crate::request::model::ModelCatalog;
use crate::request::task::ModelChoice;
use crate::schedule::fair_queue::WorkKind;
use crate::stream::cache::{CacheKey, CacheKeyInput};
use crate::stream::{
    self, AnswerEnd, Fold, GenerationJob, Pipeline, Response, ResponseEvent, Sharing, StreamItem,
    SubscriberContext, Track,
};
use crate::upstream::engine::Operation;
use crate::upstream::pool::balancer;

pub(crate) const TASK: &str = "complete";
const ONE_SUGGESTION: &str = "temperature 0 makes all suggestions equal, so one was generated";
const PREFIX_ONLY: &str = "the fill-in-the-middle tokens of this model are unknown, so it has seen \
                           the prefix alone, not the suffix";

/// Starts completions.
pub(crate) struct Completions {
    models: Arc<ModelCatalog>,
    pipeline: Arc<Pipeline>,
    sessions: EditingSessions,
    suggestion_cache: Arc<SuggestionCache>,
}

/// A response with what its messages contain, and where its suggestions are cached.
pub(crate) struct CompleteResponse {
    response: Response,
    request_id: Arc<str>,
    model: String,
    params: CompletionParams,
    scope: SuggestionScope,
    suggestion_cache: Arc<SuggestionCache>,
    /// Until the completion has ended.
    session_guard: Option<SessionGuard>,
}

impl Completions {
    pub(crate) fn new(models: Arc<ModelCatalog>, pipeline: Arc<Pipeline>) -> Completions {
        let (sessions, suggestion_cache) = Default::default();
        Completions { models, pipeline, sessions, suggestion_cache }
    }

    /// The unary RPC.
    pub(crate) async fn complete(
        &self,
        request: Request<CompleteCodeRequest>,
    ) -> Result<CompleteCodeResponse, Status> {
        let mut response = self.start(request).await?;
        let mut reply = CompleteCodeResponse {
            model: response.model.clone(),
            request_id: response.request_id.to_string(),
            ..CompleteCodeResponse::default()
        };
        while let Some(event) = std::future::poll_fn(|cx| response.poll_next(cx)).await {
            match event? {
                Event::Started(started) => reply.cached = started.cached,
                Event::Finished(finished) => {
                    let Finished { suggestions, usage, response_time_ms, warnings, .. } = finished;
                    reply = CompleteCodeResponse {
                        suggestions,
                        usage,
                        response_time_ms,
                        warnings,
                        ..reply
                    };
                }
                _ => {}
            }
        }
        Ok(reply)
    }

    /// Validates a request, chooses its model, and starts its response.
    pub(crate) async fn start(
        &self,
        request: Request<CompleteCodeRequest>,
    ) -> Result<CompleteResponse, Status> {
        let call = Call::from_extensions(request.extensions())?;
        let params = CompletionParams::validate(request.into_inner())?;
        if let Some(id) = &params.request_id {
            call.set_client_request_id(id);
        }
        let named = params.model.as_deref();
        let ModelChoice { model, warning } = self.models.choose(&call, TASK, named).await?;
        call.stats().set_model(&model);
        call.stats().set_task(TASK);
        let heartbeat = self.pipeline.engines.timeouts.heartbeat;
        let mut context = SubscriberContext::new(&call, heartbeat, false);
        if let Some(warning) = warning {
            context.warn(warning);
        }
        if params.is_greedy {
            context.warn(ONE_SUGGESTION.to_owned());
        }
        let scope = SuggestionScope::new(call.actor(), &params);
        let known = if params.no_cache {
            Vec::new()
        } else {
            let known = self.suggestion_cache.find(&scope, &model, &params);
            call.stats().record_cache_lookup(!known.is_empty());
            known
        };
        let (response, session_guard) = if known.is_empty() {
            self.subscribe(&call, &model, &params, context).await?
        } else {
            // Supersedes the older completion of the session. Its own guard is not needed.
            self.sessions.begin(call.actor(), params.session_id.clone());
            (Response::known(known_items(known), context), None)
        };
        let named = params.request_id.as_deref();
        Ok(CompleteResponse {
            response,
            request_id: named.map_or_else(|| Arc::clone(&call.request_id), Arc::from),
            model,
            params,
            scope,
            suggestion_cache: Arc::clone(&self.suggestion_cache),
            session_guard,
        })
    }

    async fn subscribe(
        &self,
        call: &Call,
        model: &str,
        params: &CompletionParams,
        mut context: SubscriberContext,
    ) -> Result<(Response, Option<SessionGuard>), Status> {
        let base_model = self.models.base_model(model);
        let family = fim::family([model, base_model.as_deref().unwrap_or_default()]);
        let prompt = fim::build_prompt(family, &params.prefix, &params.options);
        if prompt.is_prefix_only {
            context.warn(PREFIX_ONLY.to_owned());
        }
        let (sharing, job) = self.prepare(call, model, params, &prompt)?;
        // Before the session's older completion is superseded, because both may share one stream.
        let mut response = self.pipeline.subscribe(call, sharing, context, job);
        let session_guard = self.sessions.begin(call.actor(), params.session_id.clone());
        if let Some(guard) = &session_guard {
            response.supersede_with(guard.superseded());
        }
        Ok((response.begin().await?, session_guard))
    }

    fn prepare(
        &self,
        call: &Call,
        model: &str,
        params: &CompletionParams,
        prompt: &FimPrompt,
    ) -> Result<(Sharing, GenerationJob), Error> {
        let tenant = call.principal.as_ref().map(|caller| caller.owner.as_str());
        let queue = &self.pipeline.engines.scheduler.queue;
        let scheduling = queue.scheduling(tenant.unwrap_or_default(), WorkKind::Completion);
        let body = params.body(model, prompt, scheduling).map_err(anyhow::Error::from)?;
        let CompletionParams { prefix, options, no_cache, session_id, .. } = params;
        // Suggestions are trimmed by prefix and suffix, which the prompt need not contain unchanged.
        let key = CacheKey::new(CacheKeyInput {
            tenant,
            model,
            revision: "",
            body: &body,
            options: &[
                prefix.as_bytes(),
                options.suffix.as_bytes(),
                options.kind.as_str().as_bytes(),
            ],
        });
        let fold = CompleteFold::new(prefix, options, prompt.control_tokens);
        let job = GenerationJob {
            operation: Operation::Completion,
            work: WorkKind::Completion,
            model: model.to_owned(),
            affinity: balancer::affinity(tenant.unwrap_or_default(), session_id, &body),
            estimate: params.estimate(&body),
            sampling: params.sampling(),
            max_reasoning_tokens: None,
            caller_fields: params.caller_fields.clone(),
            fold: Fold::Complete(Box::new(fold)),
            body,
        };
        Ok((Sharing { key, subject: call.actor().into(), is_fresh: *no_cache }, job))
    }
}

impl CompleteResponse {
    /// The next event; after `failed`, its status; `None` after the end.
    pub(crate) fn poll_next(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Event, Status>>> {
        let event = ready!(self.response.poll_next(cx));
        Poll::Ready(event.map(|event| Ok(self.message(event?))))
    }

    fn message(&mut self, event: ResponseEvent) -> Event {
        match event {
            ResponseEvent::Started { is_cached } => Event::Started(Started {
                request_id: self.request_id.to_string(),
                model: self.model.clone(),
                cached: is_cached,
            }),
            ResponseEvent::Delta(stream::Delta { track, text }) => {
                let suggestion = if let Track::Suggestion(index) = track { index } else { 0 };
                Event::Delta(Delta { suggestion, text })
            }
            ResponseEvent::Heartbeat { .. } | ResponseEvent::Reclassified => {
                Event::Heartbeat(Heartbeat {})
            }
            ResponseEvent::Finished(finished) => Event::Finished(self.finish(*finished)),
            ResponseEvent::Failed(failed) => {
                self.session_guard = None;
                Event::Failed(Failed {
                    error_code: failed.error_code,
                    message: failed.message,
                    incident_id: failed.incident_id,
                    partial: failed.is_partial,
                })
            }
        }
    }

    fn finish(&mut self, finished: stream::Finished) -> Finished {
        // From now on, a newer completion of the session supersedes nothing.
        self.session_guard = None;
        let AnswerEnd { suggestions, usage, warnings, .. } = finished.finish;
        self.suggestion_cache.insert(self.scope.clone(), &self.model, &self.params, &suggestions);
        Finished {
            suggestions,
            usage,
            time_to_first_token_ms: finished.time_to_first_token_ms,
            response_time_ms: finished.response_time_ms,
            warnings,
        }
    }
}

/// The items of cached suggestions. They used no tokens.
fn known_items(suggestions: Vec<Suggestion>) -> Vec<StreamItem> {
    let deltas = suggestions.iter().map(|suggestion| {
        let track = Track::Suggestion(suggestion.index);
        StreamItem::Delta(stream::Delta::new(track, &suggestion.text))
    });
    let mut items: Vec<_> = std::iter::once(StreamItem::Started).chain(deltas).collect();
    let finish = AnswerEnd { suggestions, usage: Some(Usage::default()), ..AnswerEnd::default() };
    items.push(StreamItem::Finished(Arc::new(finish)));
    items
}

/// Builds the request for models of every family.
#[cfg(feature = "fuzzing")]
pub(crate) fn fuzz(request: CompleteCodeRequest) {
    let Ok(params) = CompletionParams::validate(request) else { return };
    assert_eq!(crate::request::unicode::strip(&params.prefix), params.prefix.as_str());
    for name in ["qwen2.5-coder", "deepseek-coder", "starcoder2", "codellama", "unknown"] {
        let prompt = fim::build_prompt(fim::family([name]), &params.prefix, &params.options);
        assert_eq!(prompt.is_prefix_only, name == "unknown" && !params.options.suffix.is_empty());
        assert!(
            params
                .body(name, &prompt, crate::upstream::engine::EngineScheduling::default())
                .is_ok()
        );
    }
}
