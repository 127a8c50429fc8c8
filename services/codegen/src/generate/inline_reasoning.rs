//! The models whose output begins inside of their reasoning, without an opening tag, because the chat template contains
//! it. Learned from the first answer of a model that closes a reasoning which no tag has opened. Each owner has separate
//! entries, because a question can make a model print a tag.

use std::collections::HashSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::generate::think_tags::Expect;

/// Maximum number of remembered models.
const MAX_MODEL_COUNT: usize = 1_000;

/// An owner and a model.
pub(crate) type OwnerAndModel = (String, String);

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct InlineReasoning(Mutex<HashSet<OwnerAndModel>>);

impl InlineReasoning {
    /// Where the output of a model begins.
    pub(crate) fn expected(&self, model: &OwnerAndModel) -> Expect {
        if self.lock().contains(model) { Expect::Open } else { Expect::Detect }
    }

    /// Remembers that the output of a model begins inside of its reasoning, or that it does not.
    pub(crate) fn learn(&self, model: &OwnerAndModel, begins_inside: bool) {
        let mut models = self.lock();
        if !begins_inside {
            models.remove(model);
        } else if models.len() < MAX_MODEL_COUNT {
            models.insert(model.clone());
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashSet<OwnerAndModel>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
