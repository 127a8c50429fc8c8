//! Checks at start-up: whether the pepper matches the stored credentials, and whether the store is the
//! one that auth used before.
//!
//! A failed check is logged once and reported in health until its cause is fixed. It does not stop auth:
//! a lost pepper cannot be recovered, and users must be able to log in and to create new keys.

use std::path::PathBuf;
use std::time::Duration;

use futures_util::future::BoxFuture;
use hapa_core::health_check::HealthCheck;
use tokio::time::timeout;

use crate::error::Error;
use crate::pepper::Pepper;
use crate::store::Store;

const PEPPER_MISMATCH: &str =
    "stored keys and sessions were made with another API_KEY_PEPPER and cannot be verified";
const EMPTY_STORE: &str = "the auth store is empty, but DATA_DIR holds events of earlier calls";
/// Maximum time to search DATA_DIR for an outbox with events.
const OUTBOX_TIMEOUT: Duration = Duration::from_secs(2);

/// Runs both checks. Logs each failure and returns a health check for it.
pub(crate) async fn check_store(
    store: &Store,
    pepper: &Pepper,
    find_undelivered_events: BoxFuture<'static, Option<PathBuf>>,
) -> anyhow::Result<Vec<HealthCheck>> {
    let mut checks = Vec::new();
    if !record_or_match_pepper(store, pepper).await? {
        tracing::error!(
            "API_KEY_PEPPER: {PEPPER_MISMATCH}; set the previous pepper again, or set it as API_KEY_PEPPER_PREVIOUS, or \
             give up the stored credentials (`hapa migrate auth --accept-pepper`)"
        );
        let (store, pepper) = (store.clone(), pepper.clone());
        let run = move || {
            let (store, pepper) = (store.clone(), pepper.clone());
            async move {
                let recorded =
                    store.pepper_fingerprints().await.map_err(|error| error.to_string())?;
                let configured = pepper.fingerprints().map_err(|error| error.to_string())?;
                let matches = configured.iter().any(|fingerprint| recorded.contains(fingerprint));
                if matches { Ok(()) } else { Err("see the runbook, E4003".to_owned()) }
            }
        };
        checks.push(HealthCheck::new("pepper", PEPPER_MISMATCH, run));
    }
    if let Some(file) = outbox_beside_empty_store(store, find_undelivered_events).await? {
        tracing::error!(
            outbox = %file,
            "{EMPTY_STORE}; check whether DATA_DIR or DATABASE_URL was changed. Keys created before are unknown"
        );
        let store = store.clone();
        let run = move || {
            let (store, file) = (store.clone(), file.clone());
            async move {
                let is_unused = store.is_unused().await.map_err(|error| error.to_string())?;
                if is_unused { Err(format!("{file} belongs to another store")) } else { Ok(()) }
            }
        };
        checks.push(HealthCheck::new("auth-store", EMPTY_STORE, run));
    }
    Ok(checks)
}

/// Whether one of the configured peppers is recorded in the store. If so, or if the store has no record
/// or no content yet, the configured peppers are recorded.
pub(crate) async fn record_or_match_pepper(store: &Store, pepper: &Pepper) -> Result<bool, Error> {
    let (recorded, configured) = (store.pepper_fingerprints().await?, pepper.fingerprints()?);
    let is_first = recorded.is_empty() || store.is_unused().await?;
    let matches = is_first || configured.iter().any(|fingerprint| recorded.contains(fingerprint));
    let differs = configured.iter().any(|fingerprint| !recorded.contains(fingerprint))
        || recorded.len() != configured.len();
    if matches && differs {
        store.record_pepper_fingerprints(configured).await?;
    }
    Ok(matches)
}

/// An outbox file with events in DATA_DIR, if the store has never been changed.
async fn outbox_beside_empty_store(
    store: &Store,
    find_undelivered_events: BoxFuture<'static, Option<PathBuf>>,
) -> Result<Option<String>, Error> {
    if !store.is_unused().await? {
        return Ok(None);
    }
    let found = timeout(OUTBOX_TIMEOUT, find_undelivered_events).await;
    Ok(found.ok().flatten().map(|file| file.display().to_string()))
}
