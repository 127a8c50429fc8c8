//! The scheduling delay of the process: the first sign of a lack of processor time.

use std::time::Duration;

use tokio::time::{Instant, sleep_until};

const MEASURE_INTERVAL: Duration = Duration::from_secs(1);

/// Measures once per second how late a timer fires.
pub async fn measure() {
    loop {
        let due = Instant::now() + MEASURE_INTERVAL;
        sleep_until(due).await;
        metrics::histogram!("hapa_runtime_lag_seconds").record(due.elapsed());
    }
}
