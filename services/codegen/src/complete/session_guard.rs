//! The newest completion of an editing session cancels the previous one, so that typing is not delayed by
//! outdated requests. A session has an entry only while one of its completions is in progress.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio_util::sync::CancellationToken;

/// The caller and the session id.
type SessionKey = (String, String);
type NewestBySession = Arc<Mutex<HashMap<SessionKey, Arc<CancellationToken>>>>;

/// The completions in progress, by editing session.
#[derive(Clone, Default)]
pub(crate) struct EditingSessions(NewestBySession);

/// Marks a completion as the newest of its session, until another one begins or it is dropped.
pub(crate) struct SessionGuard {
    sessions: NewestBySession,
    key: SessionKey,
    own: Arc<CancellationToken>,
}

impl EditingSessions {
    /// Cancels the session's completion in progress, and registers a newer one. `None` without a session.
    pub(crate) fn begin(&self, actor: String, session_id: String) -> Option<SessionGuard> {
        if session_id.is_empty() {
            return None;
        }
        let (key, own) = ((actor, session_id), Arc::new(CancellationToken::new()));
        let before = self.lock().insert(key.clone(), Arc::clone(&own));
        if let Some(before) = before {
            metrics::counter!("hapa_completions_superseded_total").increment(1);
            before.cancel();
        }
        Some(SessionGuard { sessions: Arc::clone(&self.0), key, own })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<SessionKey, Arc<CancellationToken>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl SessionGuard {
    /// Cancelled when a newer completion begins.
    pub(crate) fn superseded(&self) -> CancellationToken {
        CancellationToken::clone(&self.own)
    }
}

impl Drop for SessionGuard {
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
    fn the_newest_completion_of_a_session_cancels_only_the_previous_one() {
        let sessions = EditingSessions::default();
        let begin =
            |actor: &str, session: &str| sessions.begin(actor.to_owned(), session.to_owned());
        let first = begin("key:1", "a").unwrap();
        let others = [begin("key:2", "a").unwrap(), begin("key:1", "b").unwrap()];
        assert!(begin("key:1", "").is_none());
        assert!(!first.superseded().is_cancelled());
        let second = begin("key:1", "a").unwrap();
        assert!(first.superseded().is_cancelled());
        // Dropping an old guard does not remove the newer entry.
        drop(first);
        let third = begin("key:1", "a").unwrap();
        assert!(second.superseded().is_cancelled() && !third.superseded().is_cancelled());
        assert!(others.iter().all(|guard| !guard.superseded().is_cancelled()));
        drop((second, third, others));
        assert!(sessions.lock().is_empty());
    }
}
