//! What lies behind failures, by incident id, from where it is known until the call's end asks for it.
//! Bounded: what nobody asks for goes, oldest first.

use std::collections::{HashMap, VecDeque};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

use crate::scrub::scrub;

/// Incidents that are remembered.
const MOST: usize = 10_000;
/// Causes of one, and characters of a cause.
const MOST_CAUSES: usize = 20;
const LONGEST: usize = 500;

static CAUSES: LazyLock<Mutex<Causes>> = LazyLock::new(Mutex::default);

#[derive(Debug, Default)]
struct Causes {
    known: HashMap<String, Vec<String>>,
    /// In the order in which they came; may name some that are taken already.
    order: VecDeque<String>,
}

/// Adds to what lies behind an incident, outermost first and free of secrets.
pub(crate) fn remember<T: AsRef<str>>(incident_id: &str, causes: impl Iterator<Item = T>) {
    let causes: Vec<_> =
        causes.take(MOST_CAUSES).map(|cause| scrub(cause.as_ref(), LONGEST)).collect();
    lock().add(incident_id, causes);
}

/// Takes what lies behind an incident, if anything was said.
pub(crate) fn take(incident_id: &str) -> Vec<String> {
    lock().known.remove(incident_id).unwrap_or_default()
}

fn lock() -> MutexGuard<'static, Causes> {
    CAUSES.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Causes {
    fn add(&mut self, incident_id: &str, causes: Vec<String>) {
        if let Some(known) = self.known.get_mut(incident_id) {
            known.extend(causes);
            known.truncate(MOST_CAUSES);
            return;
        }
        while self.order.len() >= MOST {
            if let Some(oldest) = self.order.pop_front() {
                self.known.remove(&oldest);
            }
        }
        self.order.push_back(incident_id.to_owned());
        self.known.insert(incident_id.to_owned(), causes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_are_taken_once_and_the_oldest_go() {
        let mut causes = Causes::default();
        for number in 0..=MOST {
            causes.add(&format!("INC-{number}"), vec![number.to_string()]);
        }
        assert_eq!((causes.known.len(), causes.order.len()), (MOST, MOST));
        assert!(!causes.known.contains_key("INC-0") && causes.known.contains_key("INC-1"));
        remember("INC-X", ["one", "Bearer abc"].into_iter());
        remember("INC-X", ["two"].into_iter());
        assert_eq!(take("INC-X"), ["one", "Bearer [removed]", "two"]);
        assert!(take("INC-X").is_empty());
    }
}
