//! The models whose output begins inside of their reasoning, without an opening tag, because the chat template contains
//! it. Learned from the first answer of a model that closes a reasoning which no tag has opened.

use std::collections::HashSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::generate::think_tags::Expect;

/// Maximum number of remembered models.
const MAX_MODEL_COUNT: usize = 1_000;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct InlineReasoning(Mutex<HashSet<String>>);

impl InlineReasoning {
    /// Where the output of a model begins.
    pub(crate) fn expected(&self, model: &str) -> Expect {
        if self.lock().contains(model) { Expect::Open } else { Expect::Detect }
    }

    /// Remembers that the output of a model begins inside of its reasoning, or that it does not.
    pub(crate) fn learn(&self, model: &str, begins_inside: bool) {
        let mut models = self.lock();
        if !begins_inside {
            models.remove(model);
        } else if models.len() < MAX_MODEL_COUNT {
            models.insert(model.to_owned());
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashSet<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
