//! What a call turned out to be: who called, as admission found out, and what handlers note about
//! their work. All clones of a `Call` share one, which is read when the call ends, however it ends.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use hapa_proto::auth::v1::Principal;
use tokio::time::Instant;

use crate::rpc_error::Fault;

/// Failures of one call that were overcome: more are not remembered.
const MOST_OVERCOME: usize = 8;

/// A published failure.
#[derive(Clone, Debug)]
pub struct Failure {
    pub error_code: String,
    pub incident_id: String,
    pub message: String,
    /// Outermost first.
    pub causes: Vec<String>,
}

impl Failure {
    pub fn of(fault: &Fault) -> Failure {
        Failure {
            error_code: fault.code().to_string(),
            incident_id: fault.incident_id().to_owned(),
            message: fault.message().to_owned(),
            causes: fault.causes().to_vec(),
        }
    }
}

/// What is noted about one call.
#[derive(Clone, Debug, Default)]
pub struct Report(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    caller: OnceLock<Caller>,
    work: Mutex<Work>,
}

/// Who called, as admission found out.
#[derive(Clone, Debug, Default)]
pub struct Caller {
    pub principal: Option<Arc<Principal>>,
    pub is_mesh: bool,
}

/// What was done for the caller.
#[derive(Clone, Debug, Default)]
pub struct Work {
    pub model: String,
    /// Whether the model's name is the caller's word alone.
    pub unlisted: bool,
    pub task: String,
    pub prompt_tokens: u32,
    pub completion_tokens: u32,
    pub first_token: Option<Duration>,
    pub between_tokens: Option<Duration>,
    pub cacheable: bool,
    pub cached: bool,
    /// Waiting for a place at the engines, and then for what an engine said.
    pub queued: Duration,
    pub engine: Duration,
    /// When an engine said what the caller has not been given yet.
    heard: Option<Instant>,
    /// What failed and was overcome.
    pub overcome: Vec<Failure>,
}

/// Where a call's time went.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    pub queued: Duration,
    pub engine: Duration,
    pub first_token: Option<Duration>,
}

impl Report {
    /// The model that answers.
    pub fn model(&self, name: &str) {
        self.note(|work| name.clone_into(&mut work.model));
    }

    /// Nobody but the caller knows the model: it is not remembered of a call that fails, or callers
    /// would make as many names as they like.
    pub fn unlisted(&self) {
        self.note(|work| work.unlisted = true);
    }

    /// The kind of work.
    pub fn task(&self, name: &str) {
        self.note(|work| name.clone_into(&mut work.task));
    }

    /// Tokens of the prompt and of the answer, as far as they are known.
    pub fn tokens(&self, prompt: u32, completion: u32) {
        self.note(|work| (work.prompt_tokens, work.completion_tokens) = (prompt, completion));
    }

    /// From the call's arrival to the first token.
    pub fn time_to_first_token(&self, span: Duration) {
        self.note(|work| work.first_token = Some(span));
    }

    /// Between two tokens, on average.
    pub fn between_tokens(&self, span: Duration) {
        self.note(|work| work.between_tokens = Some(span));
    }

    /// For so long it waited for a place at the engines.
    pub fn queued(&self, span: Duration) {
        self.note(|work| work.queued = span);
    }

    /// From the question to an engine to the end of its answer, with what was asked again.
    pub fn engine(&self, span: Duration) {
        self.note(|work| work.engine = span);
    }

    /// An engine spoke at this time, and what it said is now on its way to the caller.
    pub fn heard(&self, at: Instant) {
        self.note(|work| work.heard = Some(at));
    }

    /// The same, where what was noted apart is given to this call.
    pub fn hear_from(&self, apart: &Report) {
        if let Some(at) = apart.take_heard() {
            self.heard(at);
        }
    }

    /// Once for each time that an engine spoke.
    pub fn take_heard(&self) -> Option<Instant> {
        self.0.work.lock().unwrap_or_else(PoisonError::into_inner).heard.take()
    }

    /// A cache was asked, and answered or did not.
    pub fn cache(&self, answered: bool) {
        self.note(|work| (work.cacheable, work.cached) = (true, answered));
    }

    /// Something failed, and the call went on all the same: an occurrence that nobody was shown.
    pub fn overcame(&self, fault: &Fault) {
        self.note(|work| {
            if work.overcome.len() < MOST_OVERCOME {
                work.overcome.push(Failure::of(fault));
            }
        });
    }

    /// Takes over what was noted apart: what was used, and what was overcome.
    pub fn take_over(&self, apart: &Report) -> (u32, u32) {
        let (used, times, overcome) = {
            let mut work = apart.0.work.lock().unwrap_or_else(PoisonError::into_inner);
            let used = (work.prompt_tokens, work.completion_tokens);
            (used, (work.queued, work.engine), std::mem::take(&mut work.overcome))
        };
        self.note(|work| {
            (work.queued, work.engine) = times;
            (work.prompt_tokens, work.completion_tokens) = used;
            work.overcome.extend(overcome);
            work.overcome.truncate(MOST_OVERCOME);
        });
        used
    }

    pub fn work(&self) -> Work {
        self.0.work.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn times(&self) -> Times {
        let work = self.0.work.lock().unwrap_or_else(PoisonError::into_inner);
        let Work { queued, engine, first_token, .. } = &*work;
        Times { queued: *queued, engine: *engine, first_token: *first_token }
    }

    pub fn admit(&self, caller: Caller) {
        // The first word stands: a call is admitted once.
        let _ = self.0.caller.set(caller);
    }

    pub fn caller(&self) -> Caller {
        self.0.caller.get().cloned().unwrap_or_default()
    }

    fn note(&self, change: impl FnOnce(&mut Work)) {
        change(&mut self.0.work.lock().unwrap_or_else(PoisonError::into_inner));
    }
}
