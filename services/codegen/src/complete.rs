//! Code completion: from the code around a cursor to distinct suggestions, best first. One engine request
//! generates all suggestions, a newer request of an editing session cancels the older one, and typing a
//! suggested text needs no further engine request.

mod choices;
mod completion_tokens;
mod fim;
mod flight;
mod params;
mod reader;
mod scope;
mod session_guard;
mod stream;
mod suggestion_cache;
mod trim;

use std::sync::Arc;

use futures_util::stream::{Stream, StreamExt as _, iter, unfold};
use hapa_core::call::Call;
use hapa_proto::codegen::v1::stream_complete_code_response::{Event, Finished};
use hapa_proto::codegen::v1::{
    CompleteCodeRequest, CompleteCodeResponse, StreamCompleteCodeResponse,
};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Status};

use crate::complete::choices::Choices;
use crate::complete::flight::{Cost, Flights, Key, Ride, State};
use crate::complete::params::CompletionParams;
use crate::complete::session_guard::EditingSessions;
use crate::complete::stream::{Completion, Order};
use crate::complete::suggestion_cache::{SuggestionCache, SuggestionScope};
use crate::error::Error;
use crate::request::model::ModelCatalog;
use crate::request::task::ModelChoice;
use crate::schedule::budget::Budgets;
use crate::schedule::fair_queue::{ConcurrencyPermit, FairQueue, WorkKind};
use crate::upstream::engine::Operation;
use crate::upstream::pool::{EnginePool, EngineRequest, balancer};
use crate::upstream::span;
use crate::watch::{Patience, Watch, prompt_tokens};

pub(crate) const TASK: &str = "complete";
const PREFIX_ONLY: &str = "the fill-in-the-middle tokens of this model are unknown, so it has seen \
                           the prefix alone, not the suffix";

/// The parts of the service that completions use.
pub(crate) struct CompletionDeps {
    pub(crate) pool: EnginePool,
    pub(crate) models: Arc<ModelCatalog>,
    pub(crate) queue: FairQueue,
    pub(crate) budgets: Budgets,
    pub(crate) patience: Patience,
    pub(crate) streams_end: CancellationToken,
}

pub(crate) struct Completions {
    deps: CompletionDeps,
    flights: Flights,
    sessions: EditingSessions,
    suggestion_cache: Arc<SuggestionCache>,
}

impl Completions {
    pub(crate) fn new(deps: CompletionDeps) -> Completions {
        let (flights, sessions, suggestion_cache) = Default::default();
        Completions { deps, flights, sessions, suggestion_cache }
    }

    /// The unary RPC.
    pub(crate) async fn complete(
        &self,
        request: Request<CompleteCodeRequest>,
    ) -> Result<CompleteCodeResponse, Status> {
        let mut completion = self.start_completion(request).await?;
        let mut reply = CompleteCodeResponse {
            model: completion.model().to_owned(),
            request_id: completion.request_id().to_owned(),
            ..CompleteCodeResponse::default()
        };
        while let Some(event) = completion.next().await {
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

    /// The streaming RPC.
    pub(crate) async fn stream(
        &self,
        request: Request<CompleteCodeRequest>,
    ) -> Result<impl Stream<Item = Result<StreamCompleteCodeResponse, Status>> + use<>, Status>
    {
        // Boxed: the state moves with every event.
        let completion = Box::new(self.start_completion(request).await?);
        let events = unfold(completion, |mut completion| async {
            Some((completion.next().await?, completion))
        });
        Ok(events.zip(iter(0..)).map(|(event, sequence)| {
            event.map(|event| StreamCompleteCodeResponse { sequence, event: Some(event) })
        }))
    }

    async fn start_completion(
        &self,
        request: Request<CompleteCodeRequest>,
    ) -> Result<Completion, Error> {
        let call = Call::from_extensions(request.extensions())
            .map_err(|status| anyhow::anyhow!("{status}"))?;
        let params = CompletionParams::validate(request.into_inner())?;
        if let Some(id) = &params.request_id {
            call.set_client_request_id(id);
        }
        let named = params.model.as_deref();
        let ModelChoice { model, warning } = self.deps.models.choose(&call, TASK, named).await?;
        call.stats().set_model(&model);
        call.stats().set_task(TASK);
        let mut order = self.order(&call, model, params);
        order.warnings.extend(warning);
        let mut watch = Watch::new(&call, self.deps.patience, self.deps.streams_end.clone());
        if !order.question.no_cache {
            let found = self.suggestion_cache.find(&order.place, &order.model, &order.question);
            call.stats().record_cache_lookup(!found.is_empty());
            if !found.is_empty() {
                // Cancels the older completion of the session; its own guard is dropped at once.
                self.sessions.begin(call.actor(), order.question.session_id.clone());
                return Ok(Completion::known(found, order, watch, &call));
            }
        }
        let ride = self.join_or_start(&call, &mut order, &mut watch).await?;
        Completion::begin(ride, order, watch, &call).await
    }

    fn order(&self, call: &Call, model: String, params: CompletionParams) -> Order {
        let named = params.request_id.as_deref().map(Arc::from);
        Order {
            model,
            request_id: named.unwrap_or_else(|| Arc::clone(&call.request_id)),
            place: SuggestionScope::new(call.actor(), &params),
            question: params,
            warnings: Vec::new(),
            recent: Arc::clone(&self.suggestion_cache),
            latest: None,
        }
    }

    /// Joins the stream of an identical request of the same caller, or else starts a new one that this
    /// call is billed for.
    async fn join_or_start(
        &self,
        call: &Call,
        order: &mut Order,
        watch: &mut Watch,
    ) -> Result<Ride, Error> {
        let Order { model, question, .. } = &*order;
        let parent = self.deps.models.base_model(model);
        let family = fim::family([model.as_str(), parent.as_deref().unwrap_or_default()]);
        let tenant = call.principal.as_ref().map_or("", |caller| &caller.owner);
        let scheduling = self.deps.queue.scheduling(tenant, WorkKind::Completion);
        let prompt = fim::build_prompt(family, &question.prefix, &question.options);
        let body = question.body(model, &prompt, scheduling).map_err(anyhow::Error::from)?;
        let key = Key {
            actor: call.actor(),
            body,
            around: (question.prefix.clone(), question.options.suffix.clone()),
            kind: question.options.kind,
        };
        // Joins before the session's older request is cancelled, because both may share one stream.
        let joined = (!question.no_cache).then(|| self.flights.join(&key)).flatten();
        order.latest = self.sessions.begin(call.actor(), question.session_id.clone());
        if let Some(latest) = &order.latest {
            watch.supersede_with(latest.superseded());
        }
        if prompt.is_prefix_only {
            order.warnings.push(PREFIX_ONLY.to_owned());
        }
        if let Some(ride) = joined {
            return Ok(ride);
        }
        let turn = Some(self.acquire_permit(call, tenant, watch).await?);
        let estimate = order.question.estimate(&key.body);
        let lease = unless_ended(watch, self.deps.budgets.reserve(call, estimate)).await?;
        let CompletionParams { prefix, options, no_cache, session_id, .. } = &order.question;
        let sampling = order.question.sampling();
        let part = span::start(Operation::Completion, &order.model, sampling);
        let request = EngineRequest {
            operation: Operation::Completion,
            body: key.body.clone().into(),
            model: order.model.clone(),
            affinity: balancer::affinity(tenant, session_id, &key.body),
            report: call.stats().clone(),
            answered: CancellationToken::new(),
            span: part.span().clone(),
        };
        let answered = request.answered.clone();
        let source = flight::ask(self.deps.pool.clone(), request);
        let prompt_tokens = prompt_tokens(&key.body);
        let cost = Cost { lease, turn, prompt_tokens, answered, part };
        let state = State::new(source, Choices::new(prefix, options, prompt.control_tokens), cost);
        Ok(if *no_cache { Flights::alone(state) } else { self.flights.launch(key, state) })
    }

    /// Acquires a concurrency permit, and records the time in the queue.
    async fn acquire_permit(
        &self,
        call: &Call,
        tenant: &str,
        watch: &mut Watch,
    ) -> Result<ConcurrencyPermit, Error> {
        let started = Instant::now();
        let permit = self.deps.queue.acquire(tenant, WorkKind::Completion);
        let permit = unless_ended(watch, permit).await;
        call.stats().set_queue_time(started.elapsed());
        permit
    }
}

/// Waits for a prerequisite, unless the call ends first.
async fn unless_ended<T>(
    watch: &mut Watch,
    prerequisite: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    let mut prerequisite = std::pin::pin!(prerequisite);
    loop {
        if let Some(got) = watch.on(&mut prerequisite).await? {
            return Ok(got);
        }
        watch.check()?;
    }
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
