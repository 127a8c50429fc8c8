//! One answer for all identical requests of a caller. Each subscriber reads all of it, at its own pace.
//!
//! The subscriber that needs more polls the generation within its own poll, and wakes the others. So there is no task and
//! no channel: an answer advances only while a subscriber reads, and dropping the last subscription drops the generation,
//! which aborts the engine. No lock is held across a wait.
//!
//! The tokens are billed to one subscriber: the one that started the generation, or the next one if that one leaves.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use hapa_core::call_stats::CallStats;

use super::cache::CacheWriter;
use super::generation::Generation;
use super::in_flight::InFlightEntry;
use super::item::{AnswerEnd, Failure, StreamItem};
use super::log::{AnswerLog, Position};
use super::waker_set::WakerSet;

/// See the module.
pub(super) struct SharedStream {
    state: Mutex<SharedState>,
    wakers: Arc<WakerSet>,
    /// The waker of `wakers`.
    waker: Waker,
    /// What the generation records about itself.
    stats: CallStats,
    /// Removed with the stream.
    _entry: Option<InFlightEntry>,
}

/// A subscriber's place in a stream. Dropping it leaves the stream.
pub(super) struct Subscription {
    stream: Arc<SharedStream>,
    id: u64,
    /// Whether another subscriber started the stream.
    pub(super) has_joined: bool,
}

struct SharedState {
    /// `None` after its end, or after every subscriber has left.
    generation: Option<Box<Generation>>,
    log: AnswerLog,
    /// The log is complete, so others may join and the answer can be cached.
    is_complete_log: bool,
    end: Option<Result<Arc<AnswerEnd>, Arc<Failure>>>,
    cache_writer: Option<CacheWriter>,
    /// Approximate number of reasoning tokens so far.
    reasoning_tokens: u32,
    subscribers: BTreeMap<u64, SubscriberState>,
    next_id: u64,
    billed_subscriber: Option<u64>,
}

struct SubscriberState {
    position: Position,
    stats: CallStats,
    /// It has not read the end of the answer.
    is_waiting: bool,
    has_timed_out: bool,
}

/// The result of a read.
pub(super) enum LogRead {
    /// Items were added.
    Items,
    /// Nothing more will follow.
    Ended,
    /// The subscriber lagged too far behind the others.
    TooSlow,
}

impl SharedStream {
    /// Subscribes to a stream, unless it has failed or its first items were evicted.
    pub(super) fn subscribe(self: &Arc<Self>, call_stats: &CallStats) -> Option<Subscription> {
        let mut state = self.state();
        let id = state.can_be_joined().then(|| state.add_subscriber(call_stats))?;
        Some(Subscription { stream: Arc::clone(self), id, has_joined: true })
    }

    /// Starts a stream, with the first subscription, to which the tokens are billed.
    pub(super) fn start(
        generation: Generation,
        call_stats: &CallStats,
        cache_writer: Option<CacheWriter>,
        entry: Option<InFlightEntry>,
    ) -> Subscription {
        let own_stats = generation.stats();
        let mut state = SharedState {
            generation: Some(Box::new(generation)),
            log: AnswerLog::default(),
            is_complete_log: cache_writer.is_some() || entry.is_some(),
            end: None,
            cache_writer,
            reasoning_tokens: 0,
            subscribers: BTreeMap::new(),
            next_id: 0,
            billed_subscriber: None,
        };
        let id = state.add_subscriber(call_stats);
        state.billed_subscriber = Some(id);
        let wakers = Arc::new(WakerSet::default());
        let stream = Arc::new(SharedStream {
            state: Mutex::new(state),
            waker: Waker::from(Arc::clone(&wakers)),
            wakers,
            stats: own_stats,
            _entry: entry,
        });
        Subscription { stream, id, has_joined: false }
    }

    fn state(&self) -> MutexGuard<'_, SharedState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn poll_read(
        self: &Arc<Self>,
        id: u64,
        into: &mut VecDeque<StreamItem>,
        cx: &mut Context<'_>,
    ) -> Poll<LogRead> {
        let mut state = self.state();
        loop {
            if let Some(outcome) = state.read(id, into) {
                return Poll::Ready(outcome);
            }
            let is_only_one = state.subscribers.len() == 1;
            let Some(generation) = &mut state.generation else {
                return Poll::Ready(LogRead::Ended);
            };
            // Before the poll, so that a wake-up during the poll reaches this subscriber too.
            self.wakers.insert(id, cx.waker());
            let waker = if is_only_one { cx.waker() } else { &self.waker };
            let mut items = Vec::new();
            let poll = generation.poll_items(&mut Context::from_waker(waker), &mut items);
            state.reasoning_tokens = generation.reasoning_tokens();
            let Poll::Ready(has_more) = poll else { return Poll::Pending };
            if !has_more {
                state.generation = None;
            }
            if let Some((writer, finish)) = state.push_all(items) {
                writer.write(state.log.items(), &finish, self);
            }
            self.wakers.remove(id);
            self.wakers.wake_all();
        }
    }

    /// Bills the tokens to a call. Returns the number of completion tokens.
    fn bill(&self, call_stats: &CallStats) -> u32 {
        call_stats.absorb(&self.stats).1
    }
}

impl Subscription {
    pub(super) fn stream(&self) -> &Arc<SharedStream> {
        &self.stream
    }

    /// Adds the items that this subscriber has not read. Advances the generation if there are none.
    pub(super) fn poll_read(
        &self,
        into: &mut VecDeque<StreamItem>,
        cx: &mut Context<'_>,
    ) -> Poll<LogRead> {
        self.stream.poll_read(self.id, into, cx)
    }

    /// Records in the subscriber's call when the engine sent what was read, unless another subscriber has.
    pub(super) fn record_chunk_time(&self, call_stats: &CallStats) {
        call_stats.take_chunk_time_from(&self.stream.stats);
    }

    pub(super) fn reasoning_tokens(&self) -> u32 {
        self.stream.state().reasoning_tokens
    }

    /// The subscriber has read the end. Returns the completion tokens if they are billed to it.
    pub(super) fn settle(&self) -> Option<u32> {
        let mut state = self.stream.state();
        let subscriber = state.subscribers.get_mut(&self.id)?;
        subscriber.is_waiting = false;
        let call_stats = subscriber.stats.clone();
        if state.billed_subscriber != Some(self.id) {
            return None;
        }
        state.billed_subscriber = None;
        drop(state);
        Some(self.stream.bill(&call_stats))
    }

    /// Leaves the stream, as dropping does. Returns what `settle` would.
    pub(super) fn leave(self) -> Option<u32> {
        self.leave_once()
    }

    fn leave_once(&self) -> Option<u32> {
        let mut state = self.stream.state();
        let subscriber = state.subscribers.remove(&self.id)?;
        let is_billed = state.billed_subscriber == Some(self.id);
        if is_billed {
            if let Some((id, next_stats)) = state.next_billed() {
                // From now on, the model is called for that subscriber.
                next_stats.record_cache_lookup(false);
                state.billed_subscriber = Some(id);
                drop(state);
                self.stream.wakers.remove(self.id);
                // The next subscriber may wait for a wake-up that only this one would have received.
                self.stream.wakers.wake_all();
                return None;
            }
            state.billed_subscriber = None;
        }
        // The others, if any, have read the end.
        let is_last = is_billed || state.subscribers.is_empty();
        let generation = if is_last { state.generation.take() } else { None };
        drop(state);
        self.stream.wakers.remove(self.id);
        self.stream.wakers.wake_all();
        // Dropping it records what was used.
        drop(generation);
        is_billed.then(|| self.stream.bill(&subscriber.stats))
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.leave_once();
    }
}

impl SharedState {
    fn add_subscriber(&mut self, call_stats: &CallStats) -> u64 {
        let (id, stats) = (self.next_id, call_stats.clone());
        self.next_id += 1;
        let position = self.log.start();
        let subscriber =
            SubscriberState { position, stats, is_waiting: true, has_timed_out: false };
        self.subscribers.insert(id, subscriber);
        id
    }

    fn can_be_joined(&self) -> bool {
        let has_failed = matches!(self.end, Some(Err(_)));
        let can_end_well = self.generation.is_some() || self.end.is_some();
        can_end_well && !has_failed && self.is_complete_log
    }

    /// The subscriber that the tokens are billed to if the current one leaves.
    fn next_billed(&self) -> Option<(u64, CallStats)> {
        let left = self.subscribers.iter().find(|(_, other)| other.is_waiting);
        left.map(|(id, other)| (*id, other.stats.clone()))
    }

    /// Adds items to the log. Returns the cache writer once the answer is complete.
    fn push_all(&mut self, items: Vec<StreamItem>) -> Option<(CacheWriter, Arc<AnswerEnd>)> {
        for item in items {
            match &item {
                StreamItem::Finished(finish) => self.end = Some(Ok(Arc::clone(finish))),
                StreamItem::Failed(failure) => self.end = Some(Err(Arc::clone(failure))),
                StreamItem::Started | StreamItem::Delta(_) | StreamItem::Reclassified => {}
            }
            self.log.push(item);
        }
        let has_failed = matches!(self.end, Some(Err(_)));
        if self.log.is_too_large() || has_failed {
            self.is_complete_log = false;
            self.cache_writer = None;
        }
        let Some(Ok(finish)) = &self.end else { return None };
        let writer = self.cache_writer.take()?;
        finish.is_reusable.then(|| (writer, Arc::clone(finish)))
    }

    fn read(&mut self, id: u64, into: &mut VecDeque<StreamItem>) -> Option<LogRead> {
        let subscriber = self.subscribers.get_mut(&id)?;
        if subscriber.has_timed_out {
            return Some(LogRead::TooSlow);
        }
        if self.log.read(&mut subscriber.position, into) {
            self.evict_consumed();
            return Some(LogRead::Items);
        }
        None
    }

    /// Evicts what every subscriber has read, once no other can join. Gives up the slowest subscribers while the rest is
    /// too large.
    fn evict_consumed(&mut self) {
        while !self.is_complete_log {
            let reading = self.subscribers.values().filter(|one| !one.has_timed_out);
            let least = reading.map(|one| one.position).min().unwrap_or(self.log.end());
            self.log.evict_before(least);
            let start = self.log.start();
            for subscriber in self.subscribers.values_mut() {
                subscriber.position = subscriber.position.max(start);
            }
            if !self.log.is_too_large() {
                return;
            }
            for subscriber in self.subscribers.values_mut().filter(|one| one.position <= least) {
                subscriber.has_timed_out = true;
            }
        }
    }
}
