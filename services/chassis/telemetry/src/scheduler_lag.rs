//! How late the process is at what is due: what a process lacks processor time for shows here first.

use std::time::Duration;

use tokio::time::{Instant, sleep_until};

const PAUSE: Duration = Duration::from_secs(1);

/// Measures once a second.
pub async fn watch() {
    loop {
        let due = Instant::now() + PAUSE;
        sleep_until(due).await;
        metrics::histogram!("hapa_runtime_lag_seconds").record(due.elapsed());
    }
}
