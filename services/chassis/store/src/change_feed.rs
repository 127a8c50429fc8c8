//! A change feed over an append-only table. One background task polls the latest sequence number and notifies all
//! subscribers, so the poll rate does not depend on their number.
//!
//! Invariant: a subscriber receives an error if no poll has succeeded for too long, because the absence of changes is
//! then unknown.

use std::fmt::Display;
use std::time::Duration;

use hapa_core::rpc_error::{ErrorCode, RpcError};
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// Interval of polls for changes by other replicas.
const POLL_INTERVAL: Duration = Duration::from_millis(200);
/// Time without a successful poll after which subscribers receive an error.
const STALE_TIMEOUT: Duration = Duration::from_secs(3);

/// An append-only table with rising sequence numbers.
pub trait ChangeSource: Send + Sync + 'static {
    /// The error of a poll.
    type Error: Display + Send;

    /// The latest sequence number.
    fn last(&self) -> impl Future<Output = Result<i64, Self::Error>> + Send;

    /// Completes when this process has appended a row.
    fn added(&self) -> impl Future<Output = ()> + Send;
}

/// A subscription to the latest sequence number of a table.
#[derive(Clone, Debug)]
pub struct ChangeFeed {
    latest: watch::Receiver<i64>,
    shutdown: CancellationToken,
}

/// Why a feed has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FeedClosed {
    /// The server shuts down.
    #[error("this replica shuts down; reconnect and resume from the last event")]
    ShuttingDown,
    /// No poll has succeeded for too long.
    #[error("the database is not available; reconnect and resume from the last event")]
    Stale,
}

impl ChangeFeed {
    /// A feed, and the task that polls the table until it is dropped.
    pub fn new(
        source: impl ChangeSource,
        shutdown: CancellationToken,
    ) -> (ChangeFeed, impl Future<Output = ()> + Send + 'static) {
        let (publisher, latest) = watch::channel(0);
        (ChangeFeed { latest, shutdown }, poll(source, publisher))
    }

    /// The latest sequence number, as of the last poll.
    pub fn last(&mut self) -> i64 {
        *self.latest.borrow_and_update()
    }

    /// Fails if the server shuts down.
    pub fn check_open(&self) -> Result<(), FeedClosed> {
        if self.shutdown.is_cancelled() { Err(FeedClosed::ShuttingDown) } else { Ok(()) }
    }

    /// Waits for the next successful poll, with or without changes. Cancel-safe.
    pub async fn next_poll(&mut self) -> Result<(), FeedClosed> {
        tokio::select! {
            () = self.shutdown.cancelled() => Err(FeedClosed::ShuttingDown),
            polled = timeout(STALE_TIMEOUT, self.latest.changed()) => match polled {
                Ok(Ok(())) => Ok(()),
                Ok(Err(_)) => Err(FeedClosed::ShuttingDown),
                Err(_) => Err(FeedClosed::Stale),
            },
        }
    }
}

async fn poll(source: impl ChangeSource, publisher: watch::Sender<i64>) {
    loop {
        match source.last().await {
            // Published without changes too, so that subscribers know of the successful poll.
            Ok(latest) => drop(publisher.send_replace(latest)),
            Err(error) => tracing::debug!(%error, "a change feed can't poll its table"),
        }
        let _ = timeout(POLL_INTERVAL, source.added()).await;
    }
}

impl From<FeedClosed> for RpcError {
    fn from(closed: FeedClosed) -> RpcError {
        let code = match closed {
            FeedClosed::ShuttingDown => ErrorCode::ShuttingDown,
            FeedClosed::Stale => ErrorCode::DatabaseError,
        };
        RpcError::new(code, closed.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A table that cannot be read.
    struct UnreadableTable;

    impl ChangeSource for UnreadableTable {
        type Error = &'static str;

        async fn last(&self) -> Result<i64, &'static str> {
            Err("unreadable")
        }

        async fn added(&self) {
            std::future::pending::<()>().await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_subscriber_receives_an_error_if_polls_fail_and_on_shutdown() {
        let shutdown = CancellationToken::new();
        let (mut feed, polling) = ChangeFeed::new(UnreadableTable, shutdown.clone());
        let polling = async {
            polling.await;
            unreachable!("polling does not end")
        };
        let subscriber = async {
            assert_eq!(feed.next_poll().await, Err(FeedClosed::Stale));
            shutdown.cancel();
            assert_eq!(feed.next_poll().await, Err(FeedClosed::ShuttingDown));
            assert_eq!(feed.check_open(), Err(FeedClosed::ShuttingDown));
        };
        tokio::select! {
            () = polling => {}
            () = subscriber => {}
        }
    }
}
