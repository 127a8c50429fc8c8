//! What was suggested a moment ago: who types the first letters of a suggestion is shown the rest of
//! it, and no engine is asked. Kept in this process alone, per caller and session or file, for a
//! short time and within bounds: what is oldest goes first.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hapa_proto::codegen::v1::Suggestion;
use tokio::time::Instant;

use crate::completion::question::{Question, Terms};

const NAME: &str = "completion";
/// Code goes on while it is remembered.
const LIFE: Duration = Duration::from_mins(1);
const MOST_ENTRIES: usize = 10_000;
const MOST_BYTES: usize = 32 * 1024 * 1024;
/// Of a place, the latest that are compared.
const MOST_COMPARED: usize = 32;

/// A caller, and where it works.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Place {
    actor: String,
    session_id: String,
    file_path: String,
}

impl Place {
    pub(crate) fn new(actor: String, question: &Question) -> Place {
        let file_path = match question.session_id.as_str() {
            "" => question.terms.file_path.clone(),
            _ => String::new(),
        };
        Place { actor, session_id: question.session_id.clone(), file_path }
    }
}

#[derive(Default)]
pub(crate) struct Recent(Mutex<Entries>);

#[derive(Default)]
struct Entries {
    places: HashMap<Arc<Place>, VecDeque<Entry>>,
    /// The place and the time of each entry, oldest first, as the entries of a place are.
    order: VecDeque<(Arc<Place>, Instant)>,
    bytes: usize,
}

struct Entry {
    prefix: String,
    model: String,
    terms: Terms,
    suggestions: Vec<Suggestion>,
}

impl Entry {
    fn bytes(&self) -> usize {
        let texts = self.suggestions.iter().map(|one| one.text.len()).sum::<usize>();
        let Terms { suffix, file_path, .. } = &self.terms;
        self.prefix.len() + suffix.len() + file_path.len() + texts + size_of::<Entry>()
    }

    /// The rest of each suggestion whose first letters were typed since.
    fn rest(&self, prefix: &str) -> Vec<Suggestion> {
        let Some(typed) = prefix.strip_prefix(self.prefix.as_str()) else { return Vec::new() };
        let rest = |one: &Suggestion| {
            let rest = one.text.strip_prefix(typed).filter(|rest| !rest.trim().is_empty())?;
            Some(Suggestion { text: rest.to_owned(), ..one.clone() })
        };
        self.suggestions.iter().filter_map(rest).collect()
    }
}

impl Recent {
    /// What answers without the engine, if anything does.
    pub(crate) fn find(&self, place: &Place, model: &str, question: &Question) -> Vec<Suggestion> {
        let mut entries = self.lock();
        entries.forget(Instant::now());
        let known = entries.places.get(place);
        let latest = known.into_iter().flat_map(|known| known.iter().rev().take(MOST_COMPARED));
        let found = latest
            .filter(|entry| entry.model == model && entry.terms == question.terms)
            .map(|entry| entry.rest(&question.prefix))
            .find(|rest| !rest.is_empty());
        match &found {
            Some(_) => metrics::counter!("hapa_cache_hits_total", "cache" => NAME).increment(1),
            None => metrics::counter!("hapa_cache_misses_total", "cache" => NAME).increment(1),
        }
        found.unwrap_or_default()
    }

    /// Remembers what was suggested.
    pub(crate) fn keep(
        &self,
        place: Place,
        model: &str,
        question: &Question,
        suggestions: &[Suggestion],
    ) {
        if suggestions.is_empty() {
            return;
        }
        let entry = Entry {
            prefix: question.prefix.clone(),
            model: model.to_owned(),
            terms: question.terms.clone(),
            suggestions: suggestions.to_vec(),
        };
        self.lock().add(place, entry, Instant::now());
    }

    fn lock(&self) -> MutexGuard<'_, Entries> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Entries {
    fn add(&mut self, place: Place, entry: Entry, now: Instant) {
        self.bytes += entry.bytes();
        let place = match self.places.get_key_value(&place) {
            Some((known, _)) => Arc::clone(known),
            None => Arc::new(place),
        };
        self.order.push_back((Arc::clone(&place), now));
        self.places.entry(place).or_default().push_back(entry);
        self.forget(now);
    }

    /// Drops what is too old or too much.
    fn forget(&mut self, now: Instant) {
        while let Some((place, at)) = self.order.front() {
            let fits = self.order.len() <= MOST_ENTRIES && self.bytes <= MOST_BYTES;
            if fits && now.duration_since(*at) < LIFE {
                return;
            }
            if let Some(entries) = self.places.get_mut(place) {
                let gone = entries.pop_front();
                self.bytes -= gone.map_or(0, |entry| entry.bytes());
                if entries.is_empty() {
                    self.places.remove(place);
                }
            }
            self.order.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use hapa_proto::codegen::v1::CompleteCodeRequest;

    use super::*;

    fn asked(prefix: &str, change: impl FnOnce(&mut CompleteCodeRequest)) -> Question {
        let mut request = CompleteCodeRequest {
            prefix: prefix.to_owned(),
            suffix: ")".to_owned(),
            session_id: "s".to_owned(),
            ..Default::default()
        };
        change(&mut request);
        Question::check(request).unwrap()
    }

    fn made(texts: &[&str]) -> Vec<Suggestion> {
        texts
            .iter()
            .map(|&text| Suggestion { text: text.to_owned(), ..Default::default() })
            .collect()
    }

    fn found(recent: &Recent, actor: &str, question: &Question) -> Vec<String> {
        let place = Place::new(actor.to_owned(), question);
        recent.find(&place, "m", question).into_iter().map(|one| one.text).collect()
    }

    #[test]
    fn the_rest_of_what_was_suggested_answers_who_types_it() {
        let recent = Recent::default();
        let first = asked("print(", |_| {});
        recent.keep(
            Place::new("me".to_owned(), &first),
            "m",
            &first,
            &made(&["이름, x", "이것", "other"]),
        );
        let nothing: [&str; 0] = [];
        assert_eq!(found(&recent, "me", &asked("print(", |_| {})), ["이름, x", "이것", "other"]);
        assert_eq!(found(&recent, "me", &asked("print(이", |_| {})), ["름, x", "것"]);
        assert_eq!(found(&recent, "me", &asked("print(이름, x", |_| {})), nothing, "all was typed");
        assert_eq!(found(&recent, "me", &asked("print(z", |_| {})), nothing);
        assert_eq!(found(&recent, "me", &asked("prin", |_| {})), nothing);
        assert_eq!(found(&recent, "you", &first), nothing, "what is another caller's is not told");
        for other in [
            asked("print(", |request| request.suffix = "]".to_owned()),
            asked("print(", |request| request.session_id = "t".to_owned()),
            asked("print(", |request| request.completion_type = "block".to_owned()),
            asked("print(", |request| request.temperature = Some(1.0)),
        ] {
            assert_eq!(found(&recent, "me", &other), nothing, "{other:?}");
        }
        let place = Place::new("me".to_owned(), &first);
        assert!(recent.find(&place, "another model", &first).is_empty());
    }

    #[test]
    fn what_is_too_old_or_too_much_goes_oldest_first() {
        let mut entries = Entries::default();
        let question = asked("a", |_| {});
        let entry = |text: &str| Entry {
            prefix: "a".to_owned(),
            model: "m".to_owned(),
            terms: question.terms.clone(),
            suggestions: made(&[text]),
        };
        let place = |number: usize| Place::new(number.to_string(), &question);
        let now = Instant::now();
        for number in 0..MOST_ENTRIES + 5 {
            entries.add(place(number), entry("b"), now);
        }
        assert_eq!((entries.order.len(), entries.places.len()), (MOST_ENTRIES, MOST_ENTRIES));
        assert!(!entries.places.contains_key(&place(4)) && entries.places.contains_key(&place(5)));
        entries.add(place(0), entry(&"x".repeat(MOST_BYTES - 64 * 1024)), now);
        assert!(entries.bytes <= MOST_BYTES && entries.places.contains_key(&place(0)));
        entries.forget(now + LIFE);
        assert_eq!((entries.order.len(), entries.places.len(), entries.bytes), (0, 0, 0));
    }
}
