//! One answer on its way to everyone who asked for the same: whoever is ahead pulls the engine's next
//! frame, and the others read what was pulled. Still there is no task and no channel: an answer moves
//! only while someone reads, and the last who leaves drops the generation, which aborts the engine.
//!
//! No lock is held while anyone waits, so a reader who stands still holds up nobody else.

use std::collections::{BTreeMap, VecDeque};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

use futures_util::Stream;
use hapa_chassis::Report;
use hapa_proto::codegen::v1::stream_generate_code_response::Event;
use tonic::Status;

use super::Keeper;
use super::entry::{Entry, LARGEST};
use super::flights::Listing;
use crate::generation::add_delta;

/// Text that is gathered before the next piece begins, in bytes: what is let go of together.
const PIECE: usize = 2 * 1024;

/// A generation: its events, and the status of one that failed.
pub(crate) type Source = Pin<Box<dyn Stream<Item = Result<Event, Status>> + Send>>;

/// See the module.
pub(super) struct Flight {
    state: Mutex<State>,
    bell: Arc<Bell>,
    /// Rings the bell.
    waker: Waker,
    /// What the generation notes about itself.
    own: Report,
    /// Where others find it, taken back when it ends.
    _listing: Option<Listing>,
}

struct State {
    /// None when all was read, when it failed, or when everyone left.
    source: Option<Source>,
    /// What was pulled, without what everyone has read where nobody new may come.
    events: VecDeque<Event>,
    /// How many were taken off its front.
    gone: usize,
    /// Bytes of text in `events`.
    held: usize,
    /// All events are there, so that others may join and the answer can be kept.
    open: bool,
    finished: bool,
    failure: Option<Status>,
    keeper: Option<Keeper>,
    seats: BTreeMap<u64, Seated>,
    next_id: u64,
    /// Whose call the tokens are counted for: who began, or when that one left another.
    payer: Option<u64>,
}

/// Someone who reads.
struct Seated {
    /// Up to where it has read.
    read: Position,
    report: Report,
    /// It has not yet read how the answer ended.
    waits: bool,
    given_up: bool,
}

/// The number of an event, and how much of its text.
type Position = (usize, usize);

/// What a look at a flight brings.
pub(super) enum Read {
    Events,
    Failed(Status),
    Over,
    /// Others are too far ahead.
    TooSlow,
}

impl Flight {
    pub(super) fn new(
        (source, own): (Source, Report),
        keeper: Option<Keeper>,
        listing: Option<Listing>,
    ) -> Arc<Flight> {
        let bell = Arc::new(Bell::default());
        let state = State {
            source: Some(source),
            events: VecDeque::new(),
            gone: 0,
            held: 0,
            open: keeper.is_some() || listing.is_some(),
            finished: false,
            failure: None,
            keeper,
            seats: BTreeMap::new(),
            next_id: 0,
            payer: None,
        };
        let waker = Waker::from(Arc::clone(&bell));
        Arc::new(Flight { state: Mutex::new(state), bell, waker, own, _listing: listing })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A seat from which all of the answer can be read; none where that is too late. The first pays.
    pub(super) fn sit_down(&self, report: Report) -> Option<u64> {
        let mut state = self.state();
        let first = state.next_id == 0;
        if !first && !state.can_be_joined() {
            return None;
        }
        let id = state.next_id;
        state.next_id += 1;
        state.seats.insert(id, Seated { read: (0, 0), report, waits: true, given_up: false });
        if first {
            state.payer = Some(id);
        }
        Some(id)
    }

    /// Reads what is new for a seat; where nothing is, pulls.
    pub(super) fn poll_read(
        self: &Arc<Self>,
        id: u64,
        into: &mut VecDeque<Event>,
        cx: &mut Context<'_>,
    ) -> Poll<Read> {
        let mut state = self.state();
        loop {
            if let Some(read) = state.read(id, into) {
                return Poll::Ready(read);
            }
            let Some(source) = &mut state.source else { return Poll::Ready(Read::Over) };
            // Before the look, so that nothing is missed between the two.
            self.bell.add(id, cx.waker());
            let polled = source.as_mut().poll_next(&mut Context::from_waker(&self.waker));
            let Poll::Ready(item) = polled else { return Poll::Pending };
            if let Some((keeper, entry)) = state.take(item) {
                keeper.keep(entry, self);
            }
            if state.seats.len() > 1 {
                self.bell.ring();
            }
        }
    }

    /// The end was read: the tokens, where this seat's call is the one that they are counted for.
    pub(super) fn settle(&self, id: u64) -> Option<u32> {
        let mut state = self.state();
        let seat = state.seats.get_mut(&id)?;
        seat.waits = false;
        let report = seat.report.clone();
        if state.payer != Some(id) {
            return None;
        }
        state.payer = None;
        drop(state);
        Some(self.pay(&report))
    }

    /// Gives a seat back; the last takes the generation with it. Returns what `settle` would.
    pub(super) fn leave(&self, id: u64) -> Option<u32> {
        let mut state = self.state();
        let seat = state.seats.remove(&id)?;
        let is_payer = state.payer == Some(id);
        let heir = state.seats.iter().find(|(_, other)| other.waits);
        let heir = heir.filter(|_| is_payer).map(|(id, other)| (*id, other.report.clone()));
        if let Some((id, report)) = heir {
            // From here on a model is asked for its sake.
            report.cache(false);
            state.payer = Some(id);
            return None;
        }
        // Whoever still sits has read the end, or there is nobody.
        let source = if is_payer || state.seats.is_empty() { state.source.take() } else { None };
        if is_payer {
            state.payer = None;
        }
        drop(state);
        // What it used is told as it goes.
        drop(source);
        is_payer.then(|| self.pay(&seat.report))
    }

    fn pay(&self, report: &Report) -> u32 {
        report.take_over(&self.own).1
    }
}

impl State {
    fn can_be_joined(&self) -> bool {
        let goes_on = self.source.is_some() || self.finished;
        goes_on && self.open && self.failure.is_none()
    }

    /// Behind all that was pulled. Text grows in its event, so that is no whole number of events.
    fn end(&self) -> Position {
        let count = self.gone + self.events.len();
        match self.events.back() {
            Some(Event::Delta(last)) => (count - 1, last.text.len()),
            _ => (count, 0),
        }
    }

    /// Behind the first event.
    fn behind(&self, first: &Event) -> Position {
        match first {
            Event::Delta(delta) => (self.gone, delta.text.len()),
            _ => (self.gone + 1, 0),
        }
    }

    fn read(&mut self, id: u64, into: &mut VecDeque<Event>) -> Option<Read> {
        let end = self.end();
        let seat = self.seats.get_mut(&id)?;
        if seat.given_up {
            return Some(Read::TooSlow);
        }
        if seat.read < end {
            let (first, mut known) = seat.read;
            for event in self.events.range(first - self.gone..) {
                match event {
                    Event::Delta(delta) if known == delta.text.len() => {}
                    Event::Delta(delta) => add_delta(into, delta.kind(), &delta.text[known..]),
                    event => into.push_back(event.clone()),
                }
                known = 0;
            }
            seat.read = end;
            self.trim();
            return Some(Read::Events);
        }
        let failed = self.failure.clone().map(Read::Failed);
        failed.or_else(|| self.source.is_none().then_some(Read::Over))
    }

    /// Lets go of what everyone has read, once nobody new may come. Who is so far behind that the rest
    /// is too much is given up: 4,096 tokens are far less.
    fn trim(&mut self) {
        while !self.open {
            let reading = self.seats.values().filter(|seat| !seat.given_up);
            let least = reading.map(|seat| seat.read).min().unwrap_or(self.end());
            while let Some(event) = self.events.front()
                && (least.0 > self.gone || least == self.behind(event))
            {
                self.held -= size(event);
                self.gone += 1;
                self.events.pop_front();
            }
            for seat in self.seats.values_mut() {
                seat.read = seat.read.max((self.gone, 0));
            }
            if self.held <= LARGEST {
                return;
            }
            for seat in self.seats.values_mut().filter(|seat| seat.read <= least) {
                seat.given_up = true;
            }
        }
    }

    /// Text goes to the text before it where that is of its kind and short: thousands of tokens would
    /// be as many events.
    fn push(&mut self, event: Event) {
        match (self.events.back_mut(), event) {
            (Some(Event::Delta(last)), Event::Delta(more))
                if last.kind == more.kind && last.text.len() < PIECE =>
            {
                last.text.push_str(&more.text);
            }
            (_, event) => self.events.push_back(event),
        }
    }

    /// Takes what the generation said; returns the answer when it is whole and to be kept.
    fn take(&mut self, item: Option<Result<Event, Status>>) -> Option<(Keeper, Entry)> {
        let event = match item {
            // Everyone has signs of life of its own.
            Some(Ok(Event::Heartbeat(_))) => return None,
            Some(Ok(event)) => event,
            end => {
                self.failure = end.and_then(Result::err);
                self.source = None;
                return None;
            }
        };
        self.held += size(&event);
        if self.held > LARGEST || matches!(event, Event::Failed(_)) {
            self.open = false;
        }
        self.finished |= matches!(event, Event::Finished(_));
        self.push(event);
        let keeper = self.keeper.take_if(|_| self.finished || !self.open)?;
        let entry = Entry::of(&self.events).filter(|_| self.finished && self.open)?;
        Some((keeper, entry))
    }
}

fn size(event: &Event) -> usize {
    if let Event::Delta(delta) = event { delta.text.len() } else { 0 }
}

/// Wakes everyone who waits for the same generation.
#[derive(Default)]
struct Bell(Mutex<BTreeMap<u64, Waker>>);

impl Bell {
    fn wakers(&self) -> MutexGuard<'_, BTreeMap<u64, Waker>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The one in this seat waits.
    fn add(&self, id: u64, waker: &Waker) {
        self.wakers().entry(id).or_insert_with(|| waker.clone()).clone_from(waker);
    }

    fn ring(&self) {
        let wakers = std::mem::take(&mut *self.wakers());
        wakers.into_values().for_each(Waker::wake);
    }
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.ring();
    }
}

#[cfg(test)]
mod tests {
    use futures_util::stream;
    use hapa_proto::codegen::v1::stream_generate_code_response::{Delta, Finished, Kind, Started};

    use super::*;

    fn said(text: &str) -> Event {
        Event::Delta(Delta { text: text.to_owned(), kind: Kind::Code.into() })
    }

    /// Of these events, with so many seats.
    fn flight(events: Vec<Event>, seats: u64) -> Arc<Flight> {
        let source = stream::iter(events.into_iter().map(Ok));
        let flight = Flight::new((Box::pin(source), Report::default()), None, None);
        let mut state = flight.state();
        for id in 0..seats {
            let (report, read) = (Report::default(), (0, 0));
            state.seats.insert(id, Seated { read, report, waits: true, given_up: false });
        }
        drop(state);
        flight
    }

    /// What the next look brings: text, or how it ends.
    fn look(flight: &Arc<Flight>, id: u64) -> Result<String, &'static str> {
        let mut events = VecDeque::new();
        let cx = &mut Context::from_waker(Waker::noop());
        match flight.poll_read(id, &mut events, cx) {
            Poll::Pending => Err("waits"),
            Poll::Ready(Read::Events) => Ok(events
                .iter()
                .map(|event| if let Event::Delta(delta) = event { &delta.text } else { "|" })
                .collect()),
            Poll::Ready(Read::Failed(_)) => Err("failed"),
            Poll::Ready(Read::Over) => Err("over"),
            Poll::Ready(Read::TooSlow) => Err("too slow"),
        }
    }

    #[test]
    fn each_reads_all_of_it_at_a_pace_of_its_own_and_nothing_is_held_for_long() {
        let long = "x".repeat(PIECE);
        let events = vec![
            Event::Started(Started::default()),
            said("한"),
            said("글"),
            said(&long),
            said("c"),
            Event::Finished(Finished::default()),
        ];
        let flight = flight(events, 2);
        let held = || flight.state().held;
        assert_eq!(look(&flight, 0).unwrap(), "|");
        assert_eq!(look(&flight, 0).unwrap(), "한");
        assert_eq!(look(&flight, 1).unwrap(), "|한");
        assert_eq!(held(), 0, "both have read it");
        assert_eq!(look(&flight, 0).unwrap(), "글");
        assert_eq!(look(&flight, 0).unwrap(), long);
        assert_eq!(held(), 3 + PIECE);
        assert_eq!(look(&flight, 1).unwrap(), format!("글{long}"));
        assert_eq!(look(&flight, 1).unwrap(), "c");
        assert_eq!(look(&flight, 1).unwrap(), "|");
        assert_eq!(look(&flight, 0).unwrap(), "c|");
        assert_eq!((held(), flight.state().events.len()), (0, 0));
        assert_eq!([look(&flight, 0), look(&flight, 1)], [Err("over"), Err("over")]);
    }

    #[test]
    fn who_is_far_behind_is_given_up_and_never_who_reads() {
        let text = "x".repeat(LARGEST / 4);
        let flight = flight((0..9).map(|_| said(&text)).collect(), 3);
        for _ in 0..4 {
            assert_eq!(look(&flight, 0).unwrap().len(), text.len());
        }
        assert_eq!(look(&flight, 1).unwrap().len(), 4 * text.len());
        for _ in 0..5 {
            assert!(look(&flight, 0).is_ok());
        }
        assert_eq!(look(&flight, 2), Err("too slow"));
        assert_eq!(look(&flight, 1), Err("too slow"));
        assert_eq!(look(&flight, 0), Err("over"));
    }
}
