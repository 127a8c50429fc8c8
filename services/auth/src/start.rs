//! What auth looks at in its store when it starts: whether its pepper is the one that credentials were kept
//! under, and whether the store is the one that it had before.
//!
//! Both are said in the log and in health until they are put right. Neither keeps auth from serving: a pepper
//! that is lost does not come back, and users must be able to log in and to make new keys.

use std::path::PathBuf;
use std::time::Duration;

use futures_util::future::BoxFuture;
use hapa_core::health_check::HealthCheck;
use tokio::time::timeout;

use crate::error::Error;
use crate::pepper::Pepper;
use crate::store::Store;

const OTHER_PEPPER: &str =
    "stored keys and sessions were made with another API_KEY_PEPPER: none of them is known";
const LOST_STORE: &str = "the store of auth is empty, and events of earlier calls wait beside it";
/// How long a spool may take to say whether it is empty.
const SPOOL_TIMEOUT: Duration = Duration::from_secs(2);

/// Logs what is wrong, and returns a health check for each problem.
pub(crate) async fn look(
    store: &Store,
    pepper: &Pepper,
    find_undelivered_events: BoxFuture<'static, Option<PathBuf>>,
) -> anyhow::Result<Vec<HealthCheck>> {
    let mut checks = Vec::new();
    if !settle_pepper(store, pepper).await? {
        tracing::error!(
            "API_KEY_PEPPER: {OTHER_PEPPER}; set the one before, or both (API_KEY_PEPPER_ALSO), or accept that they are \
             lost (`hapa migrate auth --accept-pepper`)"
        );
        let (store, pepper) = (store.clone(), pepper.clone());
        let run = move || {
            let (store, pepper) = (store.clone(), pepper.clone());
            async move {
                let known = store.pepper_fingerprints().await.map_err(|error| error.to_string())?;
                let is_known = pepper.fingerprints().map_err(|error| error.to_string())?;
                let is_known = is_known.iter().any(|one| known.contains(one));
                if is_known { Ok(()) } else { Err("see the runbook, E4003".to_owned()) }
            }
        };
        checks.push(HealthCheck::new("pepper", OTHER_PEPPER, run));
    }
    if let Some(file) = lost_store(store, find_undelivered_events).await? {
        tracing::error!(
            spool = %file,
            "{LOST_STORE}: were DATA_DIR and DATABASE_URL others before? keys that were made then are not known"
        );
        let store = store.clone();
        let run = move || {
            let (store, file) = (store.clone(), file.clone());
            async move {
                let is_empty = store.is_new().await.map_err(|error| error.to_string())?;
                if is_empty { Err(format!("{file} is from another store")) } else { Ok(()) }
            }
        };
        checks.push(HealthCheck::new("auth-store", LOST_STORE, run));
    }
    Ok(checks)
}

/// Whether credentials were kept under a pepper that is in force. If so, or if nothing is known of that, or
/// nothing was kept yet, those in force are recorded.
pub(crate) async fn settle_pepper(store: &Store, pepper: &Pepper) -> Result<bool, Error> {
    let (known, own) = (store.pepper_fingerprints().await?, pepper.fingerprints()?);
    let is_first = known.is_empty() || store.is_new().await?;
    let is_known = is_first || own.iter().any(|one| known.contains(one));
    let is_new = own.iter().any(|one| !known.contains(one)) || known.len() != own.len();
    if is_known && is_new {
        store.record_pepper_fingerprints(own).await?;
    }
    Ok(is_known)
}

/// A spool with events beside a store in which nothing was ever changed.
async fn lost_store(
    store: &Store,
    find_undelivered_events: BoxFuture<'static, Option<PathBuf>>,
) -> Result<Option<String>, Error> {
    if !store.is_new().await? {
        return Ok(None);
    }
    let found = timeout(SPOOL_TIMEOUT, find_undelivered_events).await;
    Ok(found.ok().flatten().map(|file| file.display().to_string()))
}
