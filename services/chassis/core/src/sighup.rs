//! SIGHUP: a process reloads its files. It does not reread its environment.

use tokio::signal::unix::{SignalKind, signal};

/// Calls `reload` at each SIGHUP, until the future is dropped.
pub async fn on_sighup(mut reload: impl FnMut()) {
    match signal(SignalKind::hangup()) {
        Ok(mut hangups) => {
            while hangups.recv().await.is_some() {
                reload();
            }
        }
        Err(error) => tracing::error!(%error, "no handler for SIGHUP: files are not reloaded"),
    }
}
