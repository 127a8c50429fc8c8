//! SIGHUP: a process reads again what it can read again. Its environment is not among that.

use tokio::signal::unix::{SignalKind, signal};

/// Runs this at each SIGHUP, for as long as it is awaited.
pub async fn at_each_hangup(mut reload: impl FnMut()) {
    match signal(SignalKind::hangup()) {
        Ok(mut hangups) => {
            while hangups.recv().await.is_some() {
                reload();
            }
        }
        Err(error) => tracing::error!(%error, "SIGHUP can't be heard: nothing is read again"),
    }
}
