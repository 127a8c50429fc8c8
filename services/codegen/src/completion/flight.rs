//! One call of the engine, shared by those who ask the same at the same time.
//!
//! It is pulled, as a generation is: whichever rider is asked for news reads the engine for all of
//! them, inside of its own poll, and wakes the others. So there is no task and no channel, a rider
//! whose client reads slowly holds nobody up, and the engine's connection closes with the last rider.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Wake, Waker};

use futures_util::Stream;
use futures_util::stream::unfold;
use hapa_chassis::ErrorCode;
use hapa_chassis::trace::Part;
use tokio_util::sync::CancellationToken;

use crate::budget::Lease;
use crate::completion::choices::Choices;
use crate::completion::reader::Said;
use crate::completion::trim::Kind;
use crate::engine::{self, Ask};
use crate::route::{Error, Fleet, Opened, Request};
use crate::span;
use crate::turn::Turn;
use crate::watch::account;

/// What the engine says, read by read; once all is said, its end closes the connection.
pub(crate) type Source = Pin<Box<dyn Stream<Item = Result<Said, Error>> + Send>>;

/// What two requests must have in common to share a flight.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    pub(crate) actor: String,
    pub(crate) body: Vec<u8>,
    /// The body need not have them as they are, and suggestions are cut by them.
    pub(crate) around: (String, String),
    pub(crate) kind: Kind,
}

type Known = Arc<Mutex<HashMap<Key, Weak<Flight>>>>;

/// The flights that may be joined.
#[derive(Clone, Default)]
pub(crate) struct Flights(Known);

/// See the module.
pub(crate) struct Flight {
    /// Where it is listed, and as what.
    listed: Option<(Known, Key)>,
    state: Mutex<State>,
    bell: Arc<Bell>,
    tickets: AtomicU64,
}

/// What is known of a flight.
pub(crate) struct State {
    source: Option<Source>,
    pub(crate) choices: Choices,
    /// How it ended, if it has.
    pub(crate) end: Option<Result<(), Arc<Error>>>,
    cost: Cost,
    /// Grows with all that is read.
    progress: u64,
    /// Tokens of which a rider has told.
    told: (u32, u32),
}

/// What a flight takes from others.
pub(crate) struct Cost {
    /// Who pays.
    pub(crate) lease: Option<Lease>,
    /// Its place at the engines, until they are done.
    pub(crate) turn: Option<Turn>,
    /// About as many, until the engine says.
    pub(crate) prompt_tokens: u32,
    /// Fired when an engine has answered: from then on the prompt was read.
    pub(crate) answered: CancellationToken,
    /// Its span, in the trace of who began it.
    pub(crate) part: Part,
}

/// Who waits for news.
#[derive(Default)]
struct Bell(Mutex<HashMap<u64, Waker>>);

/// One who asked for it.
pub(crate) struct Ride {
    flight: Arc<Flight>,
    ticket: u64,
    seen: u64,
}

impl Flights {
    /// A seat in a flight that is on its way.
    pub(crate) fn join(&self, key: &Key) -> Option<Ride> {
        let flight = lock(&self.0).get(key)?.upgrade()?;
        flight.may_be_joined().then(|| Ride::on(flight))
    }

    /// Begins a flight, unless another has begun it in the meantime: then a seat in that one.
    pub(crate) fn launch(&self, key: Key, state: State) -> Ride {
        let flight = Arc::new(Flight::new(Some((Arc::clone(&self.0), key.clone())), state));
        let mut known = lock(&self.0);
        let other = known.get(&key).and_then(Weak::upgrade);
        let other = match other {
            Some(other) if other.may_be_joined() => Some(other),
            other => {
                known.insert(key, Arc::downgrade(&flight));
                // What is dropped below may be the last of it, which takes the lock.
                drop(known);
                drop(other);
                None
            }
        };
        Ride::on(other.unwrap_or(flight))
    }

    /// Begins one that nobody else can join.
    pub(crate) fn alone(state: State) -> Ride {
        Ride::on(Arc::new(Flight::new(None, state)))
    }
}

impl Flight {
    fn new(listed: Option<(Known, Key)>, state: State) -> Flight {
        let (bell, tickets) = (Arc::default(), AtomicU64::new(0));
        Flight { listed, state: Mutex::new(state), bell, tickets }
    }

    fn may_be_joined(&self) -> bool {
        !matches!(lock(&self.state).end, Some(Err(_)))
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        let Some((known, key)) = self.listed.take() else { return };
        let mut known = lock(&known);
        // Another may have begun in its place.
        if known.get(&key).is_some_and(|flight| flight.strong_count() == 0) {
            known.remove(&key);
        }
    }
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        let waiting = std::mem::take(&mut *lock(&self.0));
        waiting.into_values().for_each(Waker::wake);
    }
}

impl State {
    pub(crate) fn new(source: Source, choices: Choices, cost: Cost) -> State {
        State { source: Some(source), choices, end: None, cost, progress: 0, told: (0, 0) }
    }

    fn take(&mut self, read: Option<Result<Said, Error>>) {
        self.progress += 1;
        match read {
            _ if self.end.is_some() => self.source = None,
            None => self.finish(Err(engine::Error::Truncated.into())),
            Some(Err(error)) => self.finish(Err(error)),
            Some(Ok(said)) => {
                let done = said.done;
                self.choices.take(said);
                self.count();
                // [DONE] follows errors too: only reasons say that an answer is whole.
                match (done, self.choices.is_whole()) {
                    (true, true) => self.finish(Ok(())),
                    (true, false) => self.finish(Err(engine::Error::Truncated.into())),
                    (false, whole) if whole && self.choices.is_enough() => {
                        self.finish(Ok(()));
                        // Dropping it is what stops the engine.
                        self.source = None;
                    }
                    (false, _) => {}
                }
            }
        }
    }

    fn finish(&mut self, end: Result<(), Error>) {
        if end.is_err() {
            self.source = None;
        }
        self.end = Some(end.map_err(Arc::new));
        account(self.choices.usage().as_ref(), Ask::Completion);
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
                (self.cost.prompt_tokens, self.choices.counted())
            }
            // An engine that never answered has read nothing.
            None => (0, 0),
        }
    }

    /// Tells in the trace how it ended.
    fn end_part(&mut self) {
        let part = std::mem::take(&mut self.cost.part);
        let (prompt, answers) = self.used();
        span::used(&part, prompt, answers);
        match &self.end {
            Some(Ok(())) => part.set_list("gen_ai.response.finish_reasons", &["stop"]),
            Some(Err(error)) => {
                part.fail(error.kind(), "the engine did not answer to the end");
            }
            None => part.set("error.type", ErrorCode::StreamGivenUp.to_string()),
        }
    }

    fn count(&mut self) {
        let (prompt, answers) = self.used();
        if let Some(lease) = &mut self.cost.lease {
            lease.count(i64::from(prompt) + i64::from(answers));
        }
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
        let ticket = flight.tickets.fetch_add(1, Ordering::Relaxed);
        Ride { flight, ticket, seen: 0 }
    }

    /// Waits until more is known than this rider has seen. Can be dropped and called again.
    pub(crate) async fn news(&mut self) {
        std::future::poll_fn(|cx| self.poll_news(cx)).await;
    }

    /// Reads the end of the response, after which its connection is free for the next call.
    pub(crate) async fn close(&mut self) {
        while lock(&self.flight.state).source.is_some() {
            self.news().await;
        }
    }

    /// Looks at what is known.
    pub(crate) fn look<T>(&self, look: impl FnOnce(&mut State) -> T) -> T {
        look(&mut lock(&self.flight.state))
    }

    fn poll_news(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let bell = &self.flight.bell;
        let mut state = lock(&self.flight.state);
        if state.progress == self.seen {
            // Before the engine is asked, so that what it says in between rings for this one too.
            lock(&bell.0).insert(self.ticket, cx.waker().clone());
            let waker = Waker::from(Arc::clone(bell));
            let mut reading = Context::from_waker(&waker);
            let Some(source) = &mut state.source else { return Poll::Pending };
            let Poll::Ready(read) = source.as_mut().poll_next(&mut reading) else {
                return Poll::Pending;
            };
            state.take(read);
            lock(&bell.0).remove(&self.ticket);
            Arc::clone(bell).wake();
        }
        self.seen = state.progress;
        Poll::Ready(())
    }
}

impl Drop for Ride {
    fn drop(&mut self) {
        lock(&self.flight.bell.0).remove(&self.ticket);
    }
}

/// Asks an engine: the one place where a completion's call begins.
pub(crate) fn ask(fleet: Fleet, request: Request) -> Source {
    enum Stage {
        Ask(Fleet, Request),
        Read(Box<Opened<Said>>),
        Broken(Error),
        Close(Box<Opened<Said>>),
        Ended,
    }
    // What came in the same read before a break is the callers'.
    let after = |opened: Box<Opened<Said>>, said: &Said, broke: Option<engine::Error>| match broke {
        Some(error) => Stage::Broken(error.into()),
        None if said.done => Stage::Close(opened),
        None => Stage::Read(opened),
    };
    Box::pin(unfold(Stage::Ask(fleet, request), move |stage| async move {
        match stage {
            Stage::Ask(fleet, request) => match fleet.open::<Said>(request).await {
                Ok(mut opened) => {
                    let (said, broke) = (std::mem::take(&mut opened.events), opened.broke.take());
                    let next = after(Box::new(opened), &said, broke);
                    Some((Ok(said), next))
                }
                Err(error) => Some((Err(error), Stage::Ended)),
            },
            Stage::Read(mut opened) => {
                let mut said = Said::default();
                let broke = opened.tokens.read(&mut said).await.err();
                let next = after(opened, &said, broke);
                Some((Ok(said), next))
            }
            Stage::Broken(error) => Some((Err(error), Stage::Ended)),
            Stage::Close(mut opened) => {
                opened.tokens.close().await;
                None
            }
            Stage::Ended => None,
        }
    }))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
