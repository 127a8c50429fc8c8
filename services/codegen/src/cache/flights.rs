//! The answers that are being generated now, by who asked for what: so that who asks again joins.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use hapa_chassis::Report;

use super::Keeper;
use super::flight::{Flight, Source};
use super::key::Key;
use super::store::Era;

/// Whose answer, from which era (none where the cache can't be asked), to what.
pub(super) type Name = (Arc<str>, Option<Era>, Key);

/// One for each generation in progress, and none longer.
#[derive(Clone, Default)]
pub(super) struct Flights(Arc<Mutex<HashMap<Name, Weak<Flight>>>>);

/// A flight's place among the others.
pub(super) struct Listing {
    flights: Flights,
    name: Name,
}

/// A seat in a flight.
pub(super) struct Place {
    pub(super) flight: Arc<Flight>,
    pub(super) id: u64,
    /// Someone else began it.
    pub(super) joined: bool,
}

impl Flights {
    fn map(&self) -> MutexGuard<'_, HashMap<Name, Weak<Flight>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A seat in the flight of this name, which begins where there is none.
    pub(super) fn join(
        &self,
        name: Name,
        report: &Report,
        keeper: Option<Keeper>,
        begin: impl FnOnce() -> (Source, Report),
    ) -> Place {
        // Declared before the lock, and so dropped after it: the last of a flight takes the lock too.
        let found;
        let mut map = self.map();
        found = map.get(&name).and_then(Weak::upgrade);
        if let Some(flight) = &found
            && let Some(id) = flight.sit_down(report.clone())
        {
            return Place { flight: Arc::clone(flight), id, joined: true };
        }
        let listing = Listing { flights: self.clone(), name: name.clone() };
        let flight = Flight::new(begin(), keeper, Some(listing));
        map.insert(name, Arc::downgrade(&flight));
        // While nobody else can: the first seat is that of who began.
        Place::first(flight, report)
    }
}

impl Place {
    /// In a flight that nobody else knows of yet, or that just began.
    pub(super) fn first(flight: Arc<Flight>, report: &Report) -> Place {
        // Nobody is refused the seat of who began.
        let id = flight.sit_down(report.clone()).unwrap_or_default();
        Place { flight, id, joined: false }
    }
}

impl Drop for Listing {
    fn drop(&mut self) {
        let mut map = self.flights.map();
        // Another may have its name by now.
        if map.get(&self.name).is_some_and(|flight| flight.strong_count() == 0) {
            map.remove(&self.name);
        }
    }
}
