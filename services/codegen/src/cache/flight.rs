//! One answer on its way to everyone who asked for the same, each of whom reads all of it: see
//! [`Shared`]. The last who leaves drops the generation, which aborts the engine.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, MutexGuard};
use std::task::{Context, Poll, ready};

use hapa_core::call_stats::CallStats;
use hapa_proto::codegen::v1::stream_generate_code_response::Event;
use tonic::Status;

use super::Keeper;
use super::entry::{Entry, LARGEST};
use super::key::Key;
use super::store::Era;
use crate::generation::add_delta;
use crate::share::{Gathered, List, Listing, Shared, Source};

/// Text that is gathered before the next piece begins, in bytes: what is let go of together.
const PIECE: usize = 2 * 1024;

/// What a generation says, and the status of one that failed.
pub(crate) type Said = Result<Event, Status>;

/// Whose answer, from which era (none where the cache can't be asked), to what.
pub(super) type Name = (Arc<str>, Option<Era>, Key);

/// The flights that may be joined.
pub(super) type Flights = List<Name, Flight>;

/// See the module.
pub(super) struct Flight {
    shared: Shared<State>,
    /// What the generation notes about itself.
    own: CallStats,
    /// Where others find it, taken back when it ends.
    _listing: Option<Listing<Name, Flight>>,
}

/// A seat in a flight.
pub(super) struct Place {
    pub(super) flight: Arc<Flight>,
    pub(super) id: u64,
    /// Someone else began it.
    pub(super) joined: bool,
}

struct State {
    /// None when all was read, when it failed, or when everyone left.
    source: Option<Source<Said>>,
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
    /// The whole answer, to be kept.
    whole: Option<(Keeper, Entry)>,
    seats: BTreeMap<u64, Seated>,
    next_id: u64,
    /// Whose call the tokens are counted for: who began, or when that one left another.
    payer: Option<u64>,
}

/// Someone who reads.
struct Seated {
    /// Up to where it has read.
    read: Position,
    report: CallStats,
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

impl Place {
    /// Beside others in a flight, where it is not too late.
    pub(super) fn beside(flight: &Arc<Flight>, report: &CallStats) -> Option<Place> {
        let mut state = flight.shared.state();
        let id = state.can_be_joined().then(|| state.seat(report))?;
        Some(Place { flight: Arc::clone(flight), id, joined: true })
    }
}

impl Flight {
    /// A new one, and the seat of who begins it, whose call pays.
    pub(super) fn begin(
        (source, own): (Source<Said>, CallStats),
        report: &CallStats,
        keeper: Option<Keeper>,
        listing: Option<Listing<Name, Flight>>,
    ) -> (Arc<Flight>, Place) {
        let mut state = State {
            source: Some(source),
            events: VecDeque::new(),
            gone: 0,
            held: 0,
            open: keeper.is_some() || listing.is_some(),
            finished: false,
            failure: None,
            keeper,
            whole: None,
            seats: BTreeMap::new(),
            next_id: 0,
            payer: None,
        };
        let id = state.seat(report);
        state.payer = Some(id);
        let flight = Arc::new(Flight { shared: Shared::new(state), own, _listing: listing });
        (Arc::clone(&flight), Place { flight, id, joined: false })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state()
    }

    /// Reads what is new for a seat; where nothing is, pulls.
    pub(super) fn poll_read(
        self: &Arc<Self>,
        id: u64,
        into: &mut VecDeque<Event>,
        cx: &mut Context<'_>,
    ) -> Poll<Read> {
        let mut whole = None;
        let read = self.shared.poll(id, cx, |state| {
            whole = whole.take().or(state.whole.take());
            state.read(id, into)
        });
        if let Some((keeper, entry)) = whole {
            Keeper::keep(keeper, entry, self);
        }
        Poll::Ready(ready!(read).unwrap_or(Read::Over))
    }

    /// Tells a seat's call when the engine said what it read, unless another's was told.
    pub(super) fn tell_heard(&self, report: &CallStats) {
        report.take_chunk_time_from(&self.own);
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
            report.record_cache_lookup(false);
            state.payer = Some(id);
            return None;
        }
        // Whoever still sits has read the end, or there is nobody.
        let source = if is_payer || state.seats.is_empty() { state.source.take() } else { None };
        if is_payer {
            state.payer = None;
        }
        drop(state);
        self.shared.leave(id);
        // What it used is told as it goes.
        drop(source);
        is_payer.then(|| self.pay(&seat.report))
    }

    fn pay(&self, report: &CallStats) -> u32 {
        report.absorb(&self.own).1
    }
}

impl State {
    /// From which all of the answer is read.
    fn seat(&mut self, report: &CallStats) -> u64 {
        let (id, report) = (self.next_id, report.clone());
        self.next_id += 1;
        self.seats.insert(id, Seated { read: (0, 0), report, waits: true, given_up: false });
        id
    }

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
        self.failure.clone().map(Read::Failed)
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
}

impl Gathered for State {
    type Piece = Said;

    fn source(&mut self) -> Option<&mut Source<Said>> {
        self.source.as_mut()
    }

    fn take(&mut self, said: Option<Said>) {
        let event = match said {
            Some(Ok(event)) => event,
            end => {
                self.failure = end.and_then(Result::err);
                self.source = None;
                return;
            }
        };
        self.held += size(&event);
        if self.held > LARGEST || matches!(event, Event::Failed(_)) {
            self.open = false;
        }
        self.finished |= matches!(event, Event::Finished(_));
        self.push(event);
        let keeper = self.keeper.take_if(|_| self.finished || !self.open);
        let entry = Entry::of(&self.events).filter(|_| self.finished && self.open);
        self.whole = keeper.zip(entry);
    }
}

fn size(event: &Event) -> usize {
    if let Event::Delta(delta) = event { delta.text.len() } else { 0 }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use futures_util::stream;
    use hapa_proto::codegen::v1::stream_generate_code_response::{Delta, Finished, Kind, Started};

    use super::*;

    fn said(text: &str) -> Event {
        Event::Delta(Delta { text: text.to_owned(), kind: Kind::Code.into() })
    }

    /// Of these events, with so many seats.
    fn flight(events: Vec<Event>, seats: u64) -> Arc<Flight> {
        let source = stream::iter(events.into_iter().map(Ok));
        let report = CallStats::default();
        let (flight, _) = Flight::begin((Box::pin(source), report.clone()), &report, None, None);
        for _ in 1..seats {
            flight.state().seat(&report);
        }
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
