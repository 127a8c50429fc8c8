//! Completion for keystrokes: the code around a cursor goes in, distinct suggestions come out, best
//! first. One call of the engine makes all of them; a newer request of the session ends an older one;
//! who types what was suggested is not sent to the engine again.

mod choices;
mod fim;
mod flight;
mod question;
mod reader;
mod recent;
mod scope;
mod stream;
mod supersede;
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

use crate::budget::Budgets;
use crate::completion::choices::Choices;
use crate::completion::flight::{Cost, Flights, Key, Ride, State};
use crate::completion::question::Question;
use crate::completion::recent::{Place, Recent};
use crate::completion::stream::{Completion, Order};
use crate::completion::supersede::Sessions;
use crate::engine::Ask;
use crate::error::Error;
use crate::model::Models;
use crate::route::{self, Fleet, choose};
use crate::span;
use crate::task::Chosen;
use crate::turn::{self, Turn, Turns};
use crate::watch::{Patience, Watch, prompt_tokens};

pub(crate) const TASK: &str = "complete";
const PREFIX_ONLY: &str = "how this model is asked to fill in the middle is not known: it has seen \
                           the prefix alone, not the suffix";

/// What completions need of the service.
pub(crate) struct Running {
    pub(crate) fleet: Fleet,
    pub(crate) models: Arc<Models>,
    pub(crate) turns: Turns,
    pub(crate) budgets: Budgets,
    pub(crate) patience: Patience,
    pub(crate) streams_end: CancellationToken,
}

pub(crate) struct Completions {
    running: Running,
    flights: Flights,
    sessions: Sessions,
    recent: Arc<Recent>,
}

impl Completions {
    pub(crate) fn new(running: Running) -> Completions {
        let (flights, sessions, recent) = Default::default();
        Completions { running, flights, sessions, recent }
    }

    /// In one reply.
    pub(crate) async fn whole(
        &self,
        request: Request<CompleteCodeRequest>,
    ) -> Result<CompleteCodeResponse, Status> {
        let mut completion = self.begin(request).await?;
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
                    let took = response_time_ms;
                    reply = CompleteCodeResponse {
                        suggestions,
                        usage,
                        response_time_ms: took,
                        warnings,
                        ..reply
                    };
                }
                _ => {}
            }
        }
        Ok(reply)
    }

    /// As it grows.
    pub(crate) async fn stream(
        &self,
        request: Request<CompleteCodeRequest>,
    ) -> Result<impl Stream<Item = Result<StreamCompleteCodeResponse, Status>> + use<>, Status>
    {
        // Boxed: the state moves with every event.
        let completion = Box::new(self.begin(request).await?);
        let events = unfold(completion, |mut completion| async {
            Some((completion.next().await?, completion))
        });
        Ok(events.zip(iter(0..)).map(|(event, sequence)| {
            event.map(|event| StreamCompleteCodeResponse { sequence, event: Some(event) })
        }))
    }

    async fn begin(&self, request: Request<CompleteCodeRequest>) -> Result<Completion, Error> {
        let call = Call::of(request.extensions()).map_err(|status| anyhow::anyhow!("{status}"))?;
        let question = Question::check(request.into_inner())?;
        if let Some(id) = &question.request_id {
            call.also_named(id);
        }
        let named = question.model.as_deref();
        let Chosen { model, warning } = self.running.models.choose(&call, TASK, named).await?;
        call.report().model(&model);
        call.report().task(TASK);
        let mut order = self.order(&call, model, question);
        order.warnings.extend(warning);
        let mut watch = Watch::new(&call, self.running.patience, self.running.streams_end.clone());
        if !order.question.no_cache {
            let found = self.recent.find(&order.place, &order.model, &order.question);
            call.report().cache(!found.is_empty());
            if !found.is_empty() {
                // It is the newest of its session, and over at once.
                self.sessions.begin(call.actor(), order.question.session_id.clone());
                return Ok(Completion::known(found, order, watch, &call));
            }
        }
        let ride = self.board(&call, &mut order, &mut watch).await?;
        Completion::begin(ride, order, watch, &call).await
    }

    fn order(&self, call: &Call, model: String, question: Question) -> Order {
        let named = question.request_id.as_deref().map(Arc::from);
        Order {
            model,
            request_id: named.unwrap_or_else(|| Arc::clone(&call.request_id)),
            place: Place::new(call.actor(), &question),
            question,
            warnings: Vec::new(),
            recent: Arc::clone(&self.recent),
            latest: None,
        }
    }

    /// A seat in a flight: in one that is on its way where the same caller asks the same, else in a
    /// new one that the caller pays for.
    async fn board(
        &self,
        call: &Call,
        order: &mut Order,
        watch: &mut Watch,
    ) -> Result<Ride, Error> {
        let Order { model, question, .. } = &*order;
        let parent = self.running.models.parent(model);
        let family = fim::family([model.as_str(), parent.as_deref().unwrap_or_default()]);
        let tenant = call.principal.as_ref().map_or("", |caller| &caller.owner);
        let scheduling = self.running.turns.scheduling(tenant, turn::Kind::Completion);
        let filled = fim::fill(family, &question.prefix, &question.terms);
        let body = question.body(model, &filled, scheduling).map_err(anyhow::Error::from)?;
        let key = Key {
            actor: call.actor(),
            body,
            around: (question.prefix.clone(), question.terms.suffix.clone()),
            kind: question.terms.kind,
        };
        // Joined before the older request of the session ends, which may be in the same flight.
        let joined = (!question.no_cache).then(|| self.flights.join(&key)).flatten();
        order.latest = self.sessions.begin(call.actor(), question.session_id.clone());
        if let Some(latest) = &order.latest {
            watch.supersede_with(latest.over());
        }
        if filled.without_suffix {
            order.warnings.push(PREFIX_ONLY.to_owned());
        }
        if let Some(ride) = joined {
            return Ok(ride);
        }
        let turn = Some(self.turn(call, tenant, watch).await?);
        let estimate = order.question.estimate(&key.body);
        let lease = while_wanted(watch, self.running.budgets.reserve(call, estimate)).await?;
        let Question { prefix, terms, no_cache, session_id, .. } = &order.question;
        let sampling = order.question.sampling();
        let part = span::begin(Ask::Completion, &order.model, sampling);
        let asked = route::Request {
            ask: Ask::Completion,
            body: key.body.clone().into(),
            model: order.model.clone(),
            affinity: choose::affinity(tenant, session_id, &key.body),
            report: call.report().clone(),
            answered: CancellationToken::new(),
            span: part.span().clone(),
        };
        let answered = asked.answered.clone();
        let source = flight::ask(self.running.fleet.clone(), asked);
        let prompt_tokens = prompt_tokens(&key.body);
        let cost = Cost { lease, turn, prompt_tokens, answered, part };
        let state = State::new(source, Choices::new(prefix, terms, filled.ends), cost);
        Ok(if *no_cache { Flights::alone(state) } else { self.flights.launch(key, state) })
    }

    /// A place at the engines, and a note of how long it was waited for.
    async fn turn(&self, call: &Call, tenant: &str, watch: &mut Watch) -> Result<Turn, Error> {
        let asked = Instant::now();
        let turn = self.running.turns.take(tenant, turn::Kind::Completion);
        let turn = while_wanted(watch, turn).await;
        call.report().queued(asked.elapsed());
        turn
    }
}

/// Waits for what an answer needs, as long as the answer is wanted.
async fn while_wanted<T>(
    watch: &mut Watch,
    needed: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    let mut needed = std::pin::pin!(needed);
    loop {
        if let Some(got) = watch.on(&mut needed).await? {
            return Ok(got);
        }
        watch.check()?;
    }
}

/// A request as models of every kind would be asked it.
#[cfg(feature = "fuzzing")]
pub(crate) fn fuzz(request: CompleteCodeRequest) {
    let Ok(question) = Question::check(request) else { return };
    assert_eq!(crate::unicode::strip(&question.prefix), question.prefix.as_str());
    for name in ["qwen2.5-coder", "deepseek-coder", "starcoder2", "codellama", "unknown"] {
        let filled = fim::fill(fim::family([name]), &question.prefix, &question.terms);
        assert_eq!(filled.without_suffix, name == "unknown" && !question.terms.suffix.is_empty());
        assert!(question.body(name, &filled, crate::engine::Scheduling::default()).is_ok());
    }
}
