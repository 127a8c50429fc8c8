//! Who types on does not wait for what was asked before: the newest completion of an editing session
//! ends the one before it. A session holds one entry while a completion of it is in progress.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio_util::sync::CancellationToken;

/// A caller, and the name of its session.
type Key = (String, String);
type Newest = Arc<Mutex<HashMap<Key, Arc<CancellationToken>>>>;

/// The completions in progress, by session.
#[derive(Clone, Default)]
pub(crate) struct Sessions(Newest);

/// The newest completion of its session, until another begins.
pub(crate) struct Latest {
    sessions: Newest,
    key: Key,
    own: Arc<CancellationToken>,
}

impl Sessions {
    /// Ends the completion that is in progress, and is the newest from now on. Without a session
    /// nothing is.
    pub(crate) fn begin(&self, actor: String, session_id: String) -> Option<Latest> {
        if session_id.is_empty() {
            return None;
        }
        let (key, own) = ((actor, session_id), Arc::new(CancellationToken::new()));
        let before = self.lock().insert(key.clone(), Arc::clone(&own));
        if let Some(before) = before {
            metrics::counter!("hapa_completions_superseded_total").increment(1);
            before.cancel();
        }
        Some(Latest { sessions: Arc::clone(&self.0), key, own })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<Key, Arc<CancellationToken>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Latest {
    /// Fires when a newer completion has begun.
    pub(crate) fn over(&self) -> CancellationToken {
        CancellationToken::clone(&self.own)
    }
}

impl Drop for Latest {
    fn drop(&mut self) {
        let mut newest = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        if newest.get(&self.key).is_some_and(|one| Arc::ptr_eq(one, &self.own)) {
            newest.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_of_a_session_ends_the_one_before_and_no_others() {
        let sessions = Sessions::default();
        let begin =
            |actor: &str, session: &str| sessions.begin(actor.to_owned(), session.to_owned());
        let first = begin("key:1", "a").unwrap();
        let others = [begin("key:2", "a").unwrap(), begin("key:1", "b").unwrap()];
        assert!(begin("key:1", "").is_none());
        assert!(!first.over().is_cancelled());
        let second = begin("key:1", "a").unwrap();
        assert!(first.over().is_cancelled());
        // Its going does not take the newer one's place away.
        drop(first);
        let third = begin("key:1", "a").unwrap();
        assert!(second.over().is_cancelled() && !third.over().is_cancelled());
        assert!(others.iter().all(|turn| !turn.over().is_cancelled()));
        drop((second, third, others));
        assert!(sessions.lock().is_empty());
    }
}
