//! How often the mesh may ask a second time: a tenth of its calls, so that an outage of all engines
//! does not become twice the load on those that come back.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// In thousandths of a retry.
const RETRY: u32 = 1_000;
const EARNED_BY_A_CALL: u32 = 100;
/// What a mesh has at its start, and the most that it saves.
const AT_FIRST: u32 = 10 * RETRY;
const MOST: u32 = 20 * RETRY;
/// One in so long is allowed in any case: a quiet mesh earns nothing.
const FLOOR: Duration = Duration::from_secs(1);

/// What all calls of a process share.
#[derive(Debug)]
pub(super) struct Budget(Mutex<Saved>);

#[derive(Debug)]
struct Saved {
    thousandths: u32,
    floor_used: Option<Instant>,
}

impl Budget {
    pub(super) fn new() -> Self {
        Budget(Mutex::new(Saved { thousandths: AT_FIRST, floor_used: None }))
    }

    /// A call begins.
    pub(super) fn earn(&self) {
        let mut saved = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        saved.thousandths = (saved.thousandths + EARNED_BY_A_CALL).min(MOST);
    }

    /// Whether one may be asked again now; takes it.
    pub(super) fn spend(&self, now: Instant) -> bool {
        let mut saved = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(left) = saved.thousandths.checked_sub(RETRY) {
            saved.thousandths = left;
            return true;
        }
        let is_due = saved.floor_used.is_none_or(|used| now >= used + FLOOR);
        if is_due {
            saved.floor_used = Some(now);
        }
        is_due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beyond_what_it_has_at_first_a_tenth_of_the_calls_is_retried() {
        let (budget, now) = (Budget::new(), Instant::now());
        let mut spent = 0;
        for _ in 0..5_000 {
            budget.earn();
            spent += u32::from(budget.spend(now));
        }
        // Ten at first, one of the floor, and the tenth.
        assert_eq!(spent, 511);
    }

    #[test]
    fn a_quiet_mesh_may_retry_once_a_second_and_savings_are_bounded() {
        let (budget, now) = (Budget::new(), Instant::now());
        while budget.spend(now) {}
        assert!(!budget.spend(now + FLOOR / 2));
        assert!(budget.spend(now + FLOOR));
        assert!(!budget.spend(now + FLOOR));
        for _ in 0..100_000 {
            budget.earn();
        }
        assert_eq!((0..100).filter(|_| budget.spend(now + FLOOR)).count(), 20);
    }
}
