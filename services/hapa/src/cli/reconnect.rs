//! Reconnection of streams that a command watches until Ctrl-C.

use std::time::Duration;

use tonic::{Code, Status};

/// Delay between two connection attempts.
const RETRY_DELAY: Duration = Duration::from_secs(1);
/// Maximum number of failed attempts in a row.
const MAX_ATTEMPTS: u32 = 30;

/// Counts failures of one stream. A stream that never delivered a message is not retried: its first error is
/// most likely a refusal.
#[derive(Default)]
pub(super) struct Reconnect {
    has_received: bool,
    failures: u32,
}

impl Reconnect {
    /// Records a message; the count of failures restarts.
    pub(super) fn record_message(&mut self) {
        *self = Reconnect { has_received: true, failures: 0 };
    }

    /// Waits until the next attempt, or returns the error if there must be none.
    pub(super) async fn wait_after(&mut self, error: Status) -> Result<(), Status> {
        self.failures += 1;
        if !self.has_received || self.failures > MAX_ATTEMPTS || !is_retryable(&error) {
            return Err(error);
        }
        tokio::time::sleep(RETRY_DELAY).await;
        Ok(())
    }
}

/// Whether another replica, or the same replica later, may continue the stream.
fn is_retryable(status: &Status) -> bool {
    // tonic reports a broken connection as Unknown.
    matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Cancelled)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_stream_is_retried_after_its_first_message_a_bounded_number_of_times() {
        let lost = || Status::unavailable("lost");
        let mut reconnect = Reconnect::default();
        assert!(reconnect.wait_after(lost()).await.is_err(), "nothing was received yet");
        reconnect.record_message();
        assert!(reconnect.wait_after(Status::permission_denied("no")).await.is_err());
        reconnect.record_message();
        for _ in 0..MAX_ATTEMPTS {
            assert!(reconnect.wait_after(lost()).await.is_ok());
        }
        assert!(reconnect.wait_after(lost()).await.is_err());
    }
}
