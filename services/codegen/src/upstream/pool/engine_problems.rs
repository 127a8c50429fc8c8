//! What an engine lacks, as its refusals show: operations, by model, and what its operator must mend.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::upstream::engine::{EngineError, Operation, RefusalReason};

/// How long an endpoint is avoided for an operation that it does not offer for a model.
const OPERATION_MISSING_PERIOD: Duration = Duration::from_mins(1);
/// Maximum number of models whose missing operations are known.
const MAX_MODELS: usize = 1_000;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct EngineProblems {
    /// Until when chats and completions of a model are sent elsewhere.
    missing_until: Mutex<HashMap<String, [Option<Instant>; 2]>>,
    /// The engine rejected the credential of this server, and has answered nothing since.
    is_credential_rejected: AtomicBool,
    /// The account of this server had no credit left, and the engine has answered nothing since.
    is_unpaid: AtomicBool,
}

impl EngineProblems {
    /// Avoids the endpoint for an operation that its engine does not offer for a model.
    pub(super) fn mark_operation_missing(&self, operation: Operation, model: &str, now: Instant) {
        let mut missing = self.missing_until.lock().unwrap_or_else(PoisonError::into_inner);
        if missing.len() >= MAX_MODELS && !missing.contains_key(model) {
            missing.retain(|_, until| until.iter().flatten().any(|until| now < *until));
            if missing.len() >= MAX_MODELS {
                return;
            }
        }
        let until = missing.entry(model.to_owned()).or_default();
        until[operation as usize] = Some(now + OPERATION_MISSING_PERIOD);
    }

    /// Whether another endpoint should be used for the operation.
    pub(super) fn lacks(&self, operation: Operation, model: &str, now: Instant) -> bool {
        let missing = self.missing_until.lock().unwrap_or_else(PoisonError::into_inner);
        missing
            .get(model)
            .and_then(|until| until[operation as usize])
            .is_some_and(|until| now < until)
    }

    /// Records what the operator must mend. Logged when it begins. Returns whether it was logged.
    pub(super) fn record_refusal(&self, engine: &str, error: &EngineError) -> bool {
        let begins = |problem: &AtomicBool| !problem.swap(true, Ordering::Relaxed);
        if error.is_credential_rejected() && begins(&self.is_credential_rejected) {
            tracing::error!(
                engine,
                "the engine rejects the credential of this server; check AI_MODEL_API_KEY"
            );
            return true;
        }
        if error.has_reason(RefusalReason::Unpaid) && begins(&self.is_unpaid) {
            tracing::error!(
                engine,
                "the account at the engine has no credit or quota left; pay for it or raise its limit"
            );
            return true;
        }
        false
    }

    /// The engine has answered a request.
    pub(super) fn record_answer(&self) {
        self.is_credential_rejected.store(false, Ordering::Relaxed);
        self.is_unpaid.store(false, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use reqwest::StatusCode;

    use super::*;

    fn refused(status: StatusCode, refusal: RefusalReason) -> EngineError {
        EngineError::Refused { status, refusal, retry_after: None }
    }

    #[test]
    fn a_missing_operation_concerns_one_model_for_a_minute() {
        let (problems, now) = (EngineProblems::default(), Instant::now());
        problems.mark_operation_missing(Operation::Chat, "embed", now);
        assert!(problems.lacks(Operation::Chat, "embed", now));
        assert!(!problems.lacks(Operation::Completion, "embed", now));
        assert!(!problems.lacks(Operation::Chat, "chat", now));
        let later = now + OPERATION_MISSING_PERIOD;
        assert!(!problems.lacks(Operation::Chat, "embed", later));
        for number in 0..2 * MAX_MODELS {
            problems.mark_operation_missing(Operation::Chat, &number.to_string(), now);
        }
        assert_eq!(problems.missing_until.lock().unwrap().len(), MAX_MODELS);
        problems.mark_operation_missing(Operation::Chat, "new", later);
        assert_eq!(problems.missing_until.lock().unwrap().len(), 1, "the old ones are over");
    }

    #[test]
    fn what_the_operator_must_mend_is_logged_once_until_the_engine_answers() {
        let problems = EngineProblems::default();
        let unpaid = refused(StatusCode::PAYMENT_REQUIRED, RefusalReason::Unpaid);
        let rejected = refused(StatusCode::BAD_REQUEST, RefusalReason::CredentialRejected);
        for error in [unpaid, rejected] {
            assert!(problems.record_refusal("e", &error));
            assert!(!problems.record_refusal("e", &error));
        }
        assert!(!problems.record_refusal("e", &EngineError::Timeout));
        problems.record_answer();
        assert!(
            problems.record_refusal("e", &refused(StatusCode::BAD_REQUEST, RefusalReason::Unpaid))
        );
    }
}
