//! The retry budget: retries are limited to a tenth of all calls, so that an outage of all engines does
//! not double the load on those that recover.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// In thousandths of a retry, as are the other amounts.
const RETRY_COST: u32 = 1_000;
const DEPOSIT_PER_CALL: u32 = 100;
const INITIAL_BALANCE: u32 = 10 * RETRY_COST;
const MAX_BALANCE: u32 = 20 * RETRY_COST;
/// One retry per interval is always allowed, because a process with few calls deposits nothing.
const MIN_RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// Shared by all calls of the process.
#[derive(Debug)]
pub(super) struct RetryBudget(Mutex<Balance>);

#[derive(Debug)]
struct Balance {
    thousandths: u32,
    last_free_retry: Option<Instant>,
}

impl RetryBudget {
    pub(super) fn new() -> Self {
        RetryBudget(Mutex::new(Balance { thousandths: INITIAL_BALANCE, last_free_retry: None }))
    }

    /// Adds the deposit of a new call.
    pub(super) fn deposit(&self) {
        let mut balance = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        balance.thousandths = (balance.thousandths + DEPOSIT_PER_CALL).min(MAX_BALANCE);
    }

    /// Pays for one retry, if the budget allows it.
    pub(super) fn try_withdraw(&self, now: Instant) -> bool {
        let mut balance = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(left) = balance.thousandths.checked_sub(RETRY_COST) {
            balance.thousandths = left;
            return true;
        }
        let is_due = balance.last_free_retry.is_none_or(|used| now >= used + MIN_RETRY_INTERVAL);
        if is_due {
            balance.last_free_retry = Some(now);
        }
        is_due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beyond_the_initial_balance_a_tenth_of_the_calls_is_retried() {
        let (budget, now) = (RetryBudget::new(), Instant::now());
        let mut retries = 0;
        for _ in 0..5_000 {
            budget.deposit();
            retries += u32::from(budget.try_withdraw(now));
        }
        // The initial 10, 1 free retry, and a tenth of the calls.
        assert_eq!(retries, 511);
    }

    #[test]
    fn an_empty_budget_allows_one_retry_a_second_and_the_balance_is_bounded() {
        let (budget, now) = (RetryBudget::new(), Instant::now());
        while budget.try_withdraw(now) {}
        assert!(!budget.try_withdraw(now + MIN_RETRY_INTERVAL / 2));
        assert!(budget.try_withdraw(now + MIN_RETRY_INTERVAL));
        assert!(!budget.try_withdraw(now + MIN_RETRY_INTERVAL));
        for _ in 0..100_000 {
            budget.deposit();
        }
        assert_eq!((0..100).filter(|_| budget.try_withdraw(now + MIN_RETRY_INTERVAL)).count(), 20);
    }
}
