//! Streams revocations to the services. The only source is the audit log, so a subscriber of any auth
//! replica receives the changes made through all of them.

use std::time::Duration;

use futures_util::Stream;
use futures_util::stream::unfold;
use hapa_proto::auth::v1::WatchRevocationsResponse;
use hapa_store::change_feed::ChangeFeed;
use tokio::time::Instant;
use tonic::Status;

use crate::error::Error;
use crate::store::Store;

/// Maximum time between two messages. A service treats the stream as broken after one second without one.
const HEARTBEAT_INTERVAL: Duration = Duration::from_millis(250);
/// Maximum number of revocations in one message.
const BATCH_SIZE: i64 = 1_000;
/// A subscriber with a larger lag, in audit log entries, receives a reset instead: authenticating
/// again costs less than sending every entry.
const MAX_LAG: i64 = 10_000;

/// The change feed of revocations. Clones share it.
#[derive(Clone)]
pub(crate) struct RevocationFeed {
    pub(crate) store: Store,
    pub(crate) feed: ChangeFeed,
}

/// The state of one subscription.
struct RevocationWatcher {
    source: RevocationFeed,
    sent_generation: i64,
    sent_at: Option<Instant>,
    /// More revocations are pending than fit into one message.
    has_more: bool,
}

impl RevocationFeed {
    /// Streams all revocations after a generation. Generation 0 starts with a reset.
    pub(crate) fn subscribe(
        self,
        after_generation: i64,
    ) -> impl Stream<Item = Result<WatchRevocationsResponse, Status>> + Send + 'static {
        let watcher = RevocationWatcher {
            source: self,
            sent_generation: after_generation,
            sent_at: None,
            has_more: false,
        };
        unfold(Some(watcher), |watcher| async {
            let mut watcher = watcher?;
            match watcher.next_message().await {
                Ok(message) => Some((Ok(message), Some(watcher))),
                Err(error) => Some((Err(error.into()), None)),
            }
        })
    }
}

impl RevocationWatcher {
    async fn next_message(&mut self) -> Result<WatchRevocationsResponse, Error> {
        loop {
            if self.sent_at.is_some() && !self.has_more {
                self.source.feed.next_poll().await?;
            }
            if let Some(message) = self.poll_message().await? {
                self.sent_at = Some(Instant::now());
                return Ok(message);
            }
        }
    }

    async fn poll_message(&mut self) -> Result<Option<WatchRevocationsResponse>, Error> {
        let head = match self.sent_at {
            Some(_) => self.source.feed.last(),
            None => self.source.store.generation().await?,
        };
        let is_heartbeat_due =
            self.sent_at.is_none_or(|sent_at| sent_at.elapsed() >= HEARTBEAT_INTERVAL);
        if self.sent_generation == 0 || head - self.sent_generation > MAX_LAG {
            self.sent_generation = head;
            return Ok(Some(WatchRevocationsResponse {
                generation: head,
                reset: true,
                ..WatchRevocationsResponse::default()
            }));
        }
        if head > self.sent_generation || is_heartbeat_due {
            let (generation, revocations) =
                self.source.store.revocations_after(self.sent_generation, BATCH_SIZE).await?;
            self.sent_generation = generation;
            self.has_more = generation < head && !revocations.is_empty();
            let message = WatchRevocationsResponse { generation, revocations, reset: false };
            return Ok(
                Some(message).filter(|message| is_heartbeat_due || !message.revocations.is_empty())
            );
        }
        Ok(None)
    }
}
