//! One call of the engine, shared by those who ask the same at the same time: see [`Shared`]. The
//! engine's connection closes with the last rider.

use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures_util::stream::unfold;
use hapa_core::rpc_error::ErrorCode;
use hapa_telemetry::trace::SpanHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::complete::choices::Choices;
use crate::complete::reader::Said;
use crate::complete::trim::CompletionKind;
use crate::schedule::budget::Lease;
use crate::schedule::fair_queue::ConcurrencyPermit;
use crate::share::{self, Gathered, List, Listing, Shared};
use crate::upstream::engine::{EngineError, EventAccumulator as _, Operation};
use crate::upstream::pool::{DispatchError, EnginePool, EngineRequest, StartedStream};
use crate::upstream::span;
use crate::watch::account;

/// What the engine says, read by read; once all is said, its end closes the connection.
pub(crate) type Source = share::Source<Result<Said, DispatchError>>;

/// What two requests must have in common to share a flight.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    pub(crate) actor: String,
    pub(crate) body: Vec<u8>,
    /// The body need not have them as they are, and suggestions are cut by them.
    pub(crate) around: (String, String),
    pub(crate) kind: CompletionKind,
}

/// The flights that may be joined.
#[derive(Default)]
pub(crate) struct Flights(List<Key, Flight>);

/// See the module.
pub(crate) struct Flight {
    shared: Shared<State>,
    riders: AtomicU64,
    /// Where others find it, taken back when it ends.
    _listing: Option<Listing<Key, Flight>>,
}

/// What is known of a flight.
pub(crate) struct State {
    source: Option<Source>,
    pub(crate) choices: Choices,
    /// How it ended, if it has.
    pub(crate) end: Option<Result<(), Arc<DispatchError>>>,
    cost: Cost,
    /// Grows with all that is read.
    progress: u64,
    /// When the engine said what no rider has taken yet.
    heard: Option<Instant>,
    /// Tokens of which a rider has told.
    told: (u32, u32),
}

/// What a flight takes from others.
pub(crate) struct Cost {
    /// Who pays.
    pub(crate) lease: Option<Lease>,
    /// Its place at the engines, until they are done.
    pub(crate) turn: Option<ConcurrencyPermit>,
    /// About as many, until the engine says.
    pub(crate) prompt_tokens: u32,
    /// Fired when an engine has answered: from then on the prompt was read.
    pub(crate) answered: CancellationToken,
    /// Its span, in the trace of who began it.
    pub(crate) part: SpanHandle,
}

/// One who asked for it.
pub(crate) struct Ride {
    flight: Arc<Flight>,
    id: u64,
    seen: u64,
}

impl Flights {
    /// A seat in a flight that is on its way.
    pub(crate) fn join(&self, key: &Key) -> Option<Ride> {
        self.0.join(key, Ride::beside)
    }

    /// Begins a flight, unless another has begun it in the meantime: then a seat in that one.
    pub(crate) fn launch(&self, key: Key, state: State) -> Ride {
        self.0.join_or(key, Ride::beside, |listing| Flight::begin(state, Some(listing)))
    }

    /// Begins one that nobody else can join.
    pub(crate) fn alone(state: State) -> Ride {
        Flight::begin(state, None).1
    }
}

impl Flight {
    fn begin(state: State, listing: Option<Listing<Key, Flight>>) -> (Arc<Flight>, Ride) {
        let (shared, riders) = (Shared::new(state), AtomicU64::new(0));
        let flight = Arc::new(Flight { shared, riders, _listing: listing });
        (Arc::clone(&flight), Ride::on(flight))
    }
}

impl Gathered for State {
    type Piece = Result<Said, DispatchError>;

    fn source(&mut self) -> Option<&mut Source> {
        self.source.as_mut()
    }

    fn take(&mut self, read: Option<Result<Said, DispatchError>>) {
        self.progress += 1;
        match read {
            _ if self.end.is_some() => self.source = None,
            None => self.finish(Err(EngineError::Truncated.into())),
            Some(Err(error)) => self.finish(Err(error)),
            Some(Ok(said)) => self.hear(said),
        }
    }
}

impl State {
    pub(crate) fn new(source: Source, choices: Choices, cost: Cost) -> State {
        let source = Some(source);
        State { source, choices, end: None, cost, progress: 0, heard: None, told: (0, 0) }
    }

    fn hear(&mut self, mut said: Said) {
        let done = said.done;
        self.heard = Some(Instant::now());
        self.tell_begin(&mut said);
        self.choices.push(said);
        self.count();
        // [DONE] follows errors too: only reasons say that an answer is whole.
        match (done, self.choices.is_complete()) {
            (true, true) => self.finish(Ok(())),
            (true, false) => self.finish(Err(EngineError::Truncated.into())),
            (false, whole) if whole && self.choices.can_stop_early() => {
                self.finish(Ok(()));
                // Dropping it is what stops the engine.
                self.source = None;
            }
            (false, _) => {}
        }
    }

    /// Tells in the trace that the answer has begun: with the first that is heard, unless it is empty.
    fn tell_begin(&self, said: &mut Said) {
        if self.progress > 1 {
            return;
        }
        if let Some(model) = said.model.take() {
            span::set_response_model(&self.cost.part, model);
        }
        if said.has_begun() {
            span::record_first_token(&self.cost.part);
        }
    }

    fn finish(&mut self, end: Result<(), DispatchError>) {
        if end.is_err() {
            self.source = None;
        }
        self.end = Some(end.map_err(Arc::new));
        account(self.choices.usage().as_ref(), Operation::Completion);
        self.count();
        self.end_part();
        self.cost.lease = None;
        self.cost.turn = None;
    }

    /// Tokens of the prompt and of the answers: as the engine says, else by what was read.
    fn used(&self) -> (u32, u32) {
        match self.choices.usage() {
            Some(usage) => (usage.prompt_tokens, usage.completion_tokens),
            None if self.cost.answered.is_cancelled() => {
                (self.cost.prompt_tokens, self.choices.text_pieces())
            }
            // An engine that never answered has read nothing.
            None => (0, 0),
        }
    }

    /// Tells in the trace how it ended.
    fn end_part(&mut self) {
        let part = std::mem::take(&mut self.cost.part);
        let (prompt, answers) = self.used();
        span::set_usage(&part, prompt, answers);
        match &self.end {
            Some(Ok(())) => span::set_finish_reasons(&part, &self.choices.finish_reasons()),
            Some(Err(error)) => {
                part.fail(error.kind(), "the engine did not answer to the end");
            }
            None => part.set("error.type", ErrorCode::StreamGivenUp.to_string()),
        }
    }

    fn count(&mut self) {
        let (prompt, answers) = self.used();
        if let Some(lease) = &mut self.cost.lease {
            lease.record_usage(i64::from(prompt) + i64::from(answers));
        }
    }

    /// When the engine spoke, for the first who asks.
    pub(crate) fn take_heard(&mut self) -> Option<Instant> {
        self.heard.take()
    }

    /// What was used since a rider was told of it last: so that all of them together tell once.
    pub(crate) fn untold(&mut self) -> (u32, u32) {
        let used = self.used();
        let told = std::mem::replace(&mut self.told, used);
        (used.0.saturating_sub(told.0), used.1.saturating_sub(told.1))
    }
}

impl Drop for State {
    fn drop(&mut self) {
        // Everyone left: what was read until then was used.
        self.count();
        self.end_part();
    }
}

impl Ride {
    fn on(flight: Arc<Flight>) -> Ride {
        let id = flight.riders.fetch_add(1, Ordering::Relaxed);
        Ride { flight, id, seen: 0 }
    }

    /// Beside others, where what they ride has not failed.
    fn beside(flight: &Arc<Flight>) -> Option<Ride> {
        let failed = matches!(flight.shared.state().end, Some(Err(_)));
        (!failed).then(|| Ride::on(Arc::clone(flight)))
    }

    /// Waits until more is known than this rider has seen; whether there will be more. Can be dropped
    /// and called again.
    pub(crate) async fn news(&mut self) -> bool {
        let Ride { flight, id, seen } = self;
        let news = poll_fn(|cx| {
            flight
                .shared
                .poll(*id, cx, |state| (state.progress != *seen).then(|| *seen = state.progress))
        });
        news.await.is_some()
    }

    /// Reads the end of the response, after which its connection is free for the next call.
    pub(crate) async fn close(&mut self) {
        while self.news().await {}
    }

    /// Looks at what is known.
    pub(crate) fn look<T>(&self, look: impl FnOnce(&mut State) -> T) -> T {
        look(&mut self.flight.shared.state())
    }
}

impl Drop for Ride {
    fn drop(&mut self) {
        self.flight.shared.leave(self.id);
    }
}

/// Asks an engine: the one place where a completion's call begins.
pub(crate) fn ask(pool: EnginePool, request: EngineRequest) -> Source {
    enum Stage {
        Ask(EnginePool, EngineRequest),
        Read(Box<StartedStream<Said>>),
        Broken(DispatchError),
        Close(Box<StartedStream<Said>>),
        Ended,
    }
    // What came in the same read before a break is the callers'.
    let after =
        |opened: Box<StartedStream<Said>>, said: &Said, broke: Option<EngineError>| match broke {
            Some(error) => Stage::Broken(error.into()),
            None if said.done => Stage::Close(opened),
            None => Stage::Read(opened),
        };
    Box::pin(unfold(Stage::Ask(pool, request), move |stage| async move {
        match stage {
            Stage::Ask(pool, request) => match pool.start_stream::<Said>(request).await {
                Ok(mut opened) => {
                    let (mut said, broke) =
                        (std::mem::take(&mut opened.events), opened.error.take());
                    said.model = said.model.filter(|model| opened.is_served_model(model));
                    let next = after(Box::new(opened), &said, broke);
                    Some((Ok(said), next))
                }
                Err(error) => Some((Err(error), Stage::Ended)),
            },
            Stage::Read(mut opened) => {
                let mut said = Said::default();
                let broke = opened.stream.read(&mut said).await.err();
                said.model = said.model.filter(|model| opened.is_served_model(model));
                let next = after(opened, &said, broke);
                Some((Ok(said), next))
            }
            Stage::Broken(error) => Some((Err(error), Stage::Ended)),
            Stage::Close(mut opened) => {
                opened.stream.close().await;
                None
            }
            Stage::Ended => None,
        }
    }))
}
