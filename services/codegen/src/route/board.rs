//! All engines at one moment, and which of them have which model: made anew when that changes, and
//! read by every request.

use std::collections::HashMap;
use std::sync::Arc;

use tokio::time::Instant;

use super::choose::{Candidate, choose};
use super::replica::Replica;

#[derive(Default)]
pub(crate) struct Board {
    pub(super) replicas: Vec<Arc<Replica>>,
    serving: HashMap<String, Vec<Seat>>,
    listed: Vec<Listed>,
}

/// A replica that has a model.
#[derive(Clone, Copy)]
struct Seat {
    place: usize,
    /// Whether the model is an adapter that is in its memory.
    resident: bool,
}

/// A model or an adapter, and who has it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Listed {
    pub(crate) name: String,
    pub(crate) parent: String,
    /// Where the first that lists it has its weights from.
    pub(crate) root: String,
    pub(crate) max_model_len: u32,
    /// Places of those that have it.
    places: Vec<usize>,
    pub(crate) resident: u32,
}

/// How many engines there are, and what is wrong with some.
pub(crate) struct Troubles {
    pub(crate) all: usize,
    ill: Vec<String>,
}

impl Troubles {
    /// How many are well.
    pub(crate) fn well(&self) -> usize {
        self.all - self.ill.len()
    }

    /// One of them in words, and how many there are.
    pub(crate) fn words(&self) -> String {
        match (self.all, self.ill.as_slice()) {
            (0, _) => "no engine is known at the moment".to_owned(),
            (_, []) => String::new(),
            (1, [only]) => only.clone(),
            (all, [first, ..]) => format!("{} of {all} engines are ill: {first}", self.ill.len()),
        }
    }
}

/// Why nobody can be asked.
#[derive(Debug)]
pub(super) enum Nobody {
    /// There is none (more).
    Left,
    /// All are left alone until then, at the earliest.
    Closed(Instant),
}

/// What is wanted of a replica.
pub(super) struct Wanted<'w> {
    pub(super) model: &'w str,
    pub(super) affinity: Option<u64>,
    /// Those that were asked before.
    pub(super) tried: &'w [u64],
}

impl Board {
    pub(super) fn of(replicas: Vec<Arc<Replica>>) -> Board {
        let mut board = Board { replicas, ..Board::default() };
        let mut rows: HashMap<String, usize> = HashMap::new();
        for place in 0..board.replicas.len() {
            let shown = board.replicas[place].shown();
            for model in shown.models {
                let row = *rows.entry(model.id.clone()).or_insert(board.listed.len());
                if row == board.listed.len() {
                    board.listed.push(Listed { name: model.id.clone(), ..Listed::default() });
                }
                let (listed, parent) = (&mut board.listed[row], model.parent.unwrap_or_default());
                let resident = parent.is_empty() || shown.adapters.contains(&model.id);
                listed.resident += u32::from(resident);
                listed.places.push(place);
                if listed.parent.is_empty() {
                    listed.parent = parent;
                }
                if listed.root.is_empty() {
                    listed.root = model.root.unwrap_or_default();
                }
                // The smallest: what fits there fits everywhere.
                let longest = model.max_model_len.filter(|most| *most > 0).unwrap_or(u32::MAX);
                let known = if listed.max_model_len == 0 { u32::MAX } else { listed.max_model_len };
                let smallest = longest.min(known);
                listed.max_model_len = if smallest == u32::MAX { 0 } else { smallest };
                board.serving.entry(model.id).or_default().push(Seat { place, resident });
            }
        }
        board
    }

    /// Whether some replica is known to have a model.
    pub(super) fn has(&self, model: &str) -> bool {
        self.serving.contains_key(model)
    }

    /// Every model that some replica has or had when it was last heard, in the order of the replicas.
    pub(crate) fn listed(&self) -> &[Listed] {
        &self.listed
    }

    /// How many replicas have a model, and how many of them are well.
    pub(crate) fn counts(&self, listed: &Listed) -> (u32, u32) {
        let well = listed.places.iter().filter(|place| self.replicas[**place].is_well());
        let number = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        (number(listed.places.len()), number(well.count()))
    }

    /// The base model that the first engine lists first, of those that are well where any is.
    pub(crate) fn first_model(&self) -> Option<&str> {
        // Engines may list the base model behind its adapters.
        let mut bases = self.listed.iter().filter(|listed| listed.parent.is_empty());
        let well = bases.clone().find(|listed| self.counts(listed).1 > 0);
        let first = well.or_else(|| bases.next()).or(self.listed.first());
        first.map(|listed| listed.name.as_str())
    }

    /// What is wrong with those that are not well.
    pub(crate) fn troubles(&self) -> Troubles {
        let ill = self.replicas.iter().filter(|replica| !replica.is_well()).map(|replica| {
            let words = if replica.was_looked_at() {
                "the engine fails when it is asked"
            } else {
                "the engine has not been looked at yet"
            };
            replica.trouble().unwrap_or_else(|| words.to_owned())
        });
        Troubles { all: self.replicas.len(), ill: ill.collect() }
    }

    /// The replica to ask: of those that have the model; where none is known to, of all, since some
    /// engines take any name. One that is away is asked when all are.
    pub(super) fn pick(
        &self,
        wanted: &Wanted<'_>,
        now: Instant,
        random: &mut impl FnMut() -> u64,
    ) -> Result<&Arc<Replica>, Nobody> {
        let (mut up, mut away) = (Vec::new(), Vec::new());
        let mut opens: Option<Instant> = None;
        let mut consider = |place: usize, resident: bool| {
            let replica = &self.replicas[place];
            if wanted.tried.contains(&replica.id) {
                return;
            }
            match replica.admits(now) {
                Ok(()) if replica.is_up() => up.push((place, replica.candidate(resident))),
                Ok(()) => away.push((place, replica.candidate(resident))),
                Err(at) => opens = Some(opens.map_or(at, |other| other.min(at))),
            }
        };
        match self.serving.get(wanted.model) {
            Some(seats) => seats.iter().for_each(|seat| consider(seat.place, seat.resident)),
            None => (0..self.replicas.len()).for_each(|place| consider(place, false)),
        }
        let of = if up.is_empty() { away } else { up };
        let (places, candidates): (Vec<usize>, Vec<Candidate>) = of.into_iter().unzip();
        match choose(&candidates, wanted.affinity, random) {
            Some(chosen) => Ok(&self.replicas[places[chosen]]),
            None => Err(opens.map_or(Nobody::Left, Nobody::Closed)),
        }
    }
}
