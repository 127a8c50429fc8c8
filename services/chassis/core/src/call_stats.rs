//! Statistics of a call: the caller's identity from admission, and what handlers record about their work. All clones
//! of a `Call` share them. The server reads them when the call ends, in success, failure and cancellation.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use hapa_proto::auth::v1::Principal;
use tokio::time::Instant;

use crate::rpc_error::RpcError;

/// Maximum number of recovered errors that one call records.
const MAX_RECOVERED_ERRORS: usize = 8;

/// A failure as it is published.
#[derive(Clone, Debug)]
pub struct PublishedFailure {
    /// The error code, such as "E5003".
    pub error_code: String,
    /// The incident id, such as `INC-20260101-0123ABCD`.
    pub incident_id: String,
    /// The message for the caller.
    pub message: String,
    /// The causes, outermost first.
    pub causes: Vec<String>,
}

impl PublishedFailure {
    /// The published parts of an error.
    pub fn of(fault: &RpcError) -> PublishedFailure {
        PublishedFailure {
            error_code: fault.code().to_string(),
            incident_id: fault.incident_id().to_owned(),
            message: fault.message().to_owned(),
            causes: fault.causes().to_vec(),
        }
    }
}

/// The statistics of one call. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct CallStats(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    caller: OnceLock<Caller>,
    work: Mutex<CallStatsSnapshot>,
}

/// The caller's identity, as admission determined it.
#[derive(Clone, Debug, Default)]
pub struct Caller {
    /// The owner of the key or session; `None` for services and for calls without a credential.
    pub principal: Option<Arc<Principal>>,
    /// Whether the caller is a service of the mesh, or an operator with the mesh token.
    pub is_mesh: bool,
}

/// What the call used and how long its parts took.
#[derive(Clone, Debug, Default)]
pub struct CallStatsSnapshot {
    /// Name of the model.
    pub model: String,
    /// Whether the model is absent from the engines' list.
    pub is_unknown_model: bool,
    /// Kind of work, such as "generate".
    pub task: String,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Tokens of the answer.
    pub completion_tokens: u32,
    /// Tokens of the answer that are reasoning.
    pub reasoning_tokens: u32,
    /// From the call's arrival to the first token.
    pub first_token: Option<Duration>,
    /// From the call's arrival to the first token of the answer, after any reasoning.
    pub first_answer_token: Option<Duration>,
    /// Mean time between two tokens.
    pub between_tokens: Option<Duration>,
    /// Whether the call has looked up a cache.
    pub cacheable: bool,
    /// Whether the cache had the answer.
    pub cached: bool,
    /// Time in the queue for an engine slot.
    pub queued: Duration,
    /// From the engine request to the end of its answer, retries included.
    pub engine: Duration,
    /// Arrival of an engine's chunk that the caller has not received yet.
    upstream_chunk_at: Option<Instant>,
    /// Errors that the call recovered from.
    pub recovered_errors: Vec<PublishedFailure>,
}

/// The parts of a call's duration.
#[derive(Clone, Copy, Debug)]
pub struct CallTimings {
    /// Time in the queue for an engine slot.
    pub queued: Duration,
    /// From the engine request to the end of its answer, retries included.
    pub engine: Duration,
    /// From the call's arrival to the first token, of reasoning or of the answer.
    pub first_token: Option<Duration>,
    /// From the call's arrival to the first token of the answer; `None` if it is the first token.
    pub first_answer_token: Option<Duration>,
}

impl CallStats {
    /// Sets the name of the model.
    pub fn set_model(&self, name: &str) {
        self.note(|work| name.clone_into(&mut work.model));
    }

    /// Marks the model as absent from the engines' list. The usage event of a failed call then omits it, so that
    /// clients cannot create unbounded label values.
    pub fn unknown_model(&self) {
        self.note(|work| work.is_unknown_model = true);
    }

    /// Sets the kind of work.
    pub fn set_task(&self, name: &str) {
        self.note(|work| name.clone_into(&mut work.task));
    }

    /// Sets the token counts of the prompt and of the answer, as far as they are known.
    pub fn set_tokens(&self, prompt: u32, completion: u32) {
        self.note(|work| (work.prompt_tokens, work.completion_tokens) = (prompt, completion));
    }

    /// Sets the time from the call's arrival to the first token.
    pub fn set_time_to_first_token(&self, span: Duration) {
        self.note(|work| work.first_token = Some(span));
    }

    /// Records the time from the arrival of the call to the first token of its answer. Later than the first token if
    /// the model reasoned first.
    pub fn set_time_to_first_answer_token(&self, span: Duration) {
        self.note(|work| work.first_answer_token = Some(span));
    }

    /// Records the number of completion tokens that are reasoning.
    pub fn set_reasoning_tokens(&self, tokens: u32) {
        self.note(|work| work.reasoning_tokens = tokens);
    }

    /// Sets the mean time between two tokens.
    pub fn set_time_per_output_token(&self, span: Duration) {
        self.note(|work| work.between_tokens = Some(span));
    }

    /// Sets the time in the queue for an engine slot.
    pub fn set_queue_time(&self, span: Duration) {
        self.note(|work| work.queued = span);
    }

    /// Sets the time from the engine request to the end of its answer, retries included.
    pub fn set_engine_time(&self, span: Duration) {
        self.note(|work| work.engine = span);
    }

    /// Records when an engine's chunk arrived that is being written to the caller.
    pub fn upstream_chunk_at(&self, at: Instant) {
        self.note(|work| work.upstream_chunk_at = Some(at));
    }

    /// Moves the arrival time of the latest chunk from detached statistics to these.
    pub fn take_chunk_time_from(&self, detached: &CallStats) {
        if let Some(at) = detached.take_upstream_chunk_at() {
            self.upstream_chunk_at(at);
        }
    }

    /// Removes and returns the arrival time of the latest chunk.
    pub fn take_upstream_chunk_at(&self) -> Option<Instant> {
        self.lock().upstream_chunk_at.take()
    }

    /// Records a cache lookup.
    pub fn record_cache_lookup(&self, is_hit: bool) {
        self.note(|work| (work.cacheable, work.cached) = (true, is_hit));
    }

    /// Records an error that the call recovered from, so that the caller does not receive it. At most 8 are kept.
    pub fn record_recovered_error(&self, fault: &RpcError) {
        self.note(|work| {
            if work.recovered_errors.len() < MAX_RECOVERED_ERRORS {
                work.recovered_errors.push(PublishedFailure::of(fault));
            }
        });
    }

    /// Takes over times, token counts and recovered errors of detached statistics. Returns the token counts of the
    /// prompt and of the answer.
    pub fn absorb(&self, detached: &CallStats) -> (u32, u32) {
        let (used, reasoning, times, recovered_errors) = {
            let mut work = detached.lock();
            let used = (work.prompt_tokens, work.completion_tokens);
            let recovered_errors = std::mem::take(&mut work.recovered_errors);
            (used, work.reasoning_tokens, (work.queued, work.engine), recovered_errors)
        };
        self.note(|work| {
            (work.queued, work.engine) = times;
            (work.prompt_tokens, work.completion_tokens) = used;
            work.reasoning_tokens = reasoning;
            work.recovered_errors.extend(recovered_errors);
            work.recovered_errors.truncate(MAX_RECOVERED_ERRORS);
        });
        used
    }

    /// A copy of what has been recorded so far.
    pub fn snapshot(&self) -> CallStatsSnapshot {
        self.lock().clone()
    }

    /// The parts of the call's duration that have been recorded so far.
    pub fn timings(&self) -> CallTimings {
        let work = self.lock();
        CallTimings {
            queued: work.queued,
            engine: work.engine,
            first_token: work.first_token,
            first_answer_token: work
                .first_answer_token
                .filter(|answer| work.first_token.is_some_and(|first| *answer > first)),
        }
    }

    /// Sets the caller's identity, once.
    pub(crate) fn set_caller(&self, caller: Caller) {
        // A call is admitted once, so the first value stays.
        let _ = self.0.caller.set(caller);
    }

    /// The caller's identity; empty before admission.
    pub fn caller(&self) -> Caller {
        self.0.caller.get().cloned().unwrap_or_default()
    }

    fn note(&self, change: impl FnOnce(&mut CallStatsSnapshot)) {
        change(&mut self.lock());
    }

    fn lock(&self) -> MutexGuard<'_, CallStatsSnapshot> {
        self.0.work.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_answer_token_is_a_time_of_its_own_only_after_reasoning() {
        let answer = |first_ms: Option<u64>, answer_ms| {
            let stats = CallStats::default();
            if let Some(first_ms) = first_ms {
                stats.set_time_to_first_token(Duration::from_millis(first_ms));
            }
            stats.set_time_to_first_answer_token(Duration::from_millis(answer_ms));
            stats.timings().first_answer_token.map(|time| time.as_millis())
        };
        assert_eq!(answer(Some(5), 8), Some(8));
        assert_eq!(answer(Some(5), 5), None, "the model did not reason");
        assert_eq!(answer(None, 8), None);
    }
}
