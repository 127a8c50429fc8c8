//! Tells replicas what has changed. The audit log is the one source: whoever made a change, through
//! whichever replica of auth, it is told to all who watch.

use std::time::Duration;

use futures_util::Stream;
use futures_util::stream::unfold;
use hapa_proto::auth::v1::WatchRevocationsResponse;
use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::error::Error;
use crate::store::Store;

/// How often the log is looked at for what other replicas of auth wrote.
const LOOK: Duration = Duration::from_millis(200);
/// A sign of life at least this often.
const SIGN: Duration = Duration::from_millis(500);
/// Changes in one message.
const MOST: i64 = 1_000;
/// Who is further behind asks for everything again: that costs less than telling.
const FARTHEST: i64 = 10_000;
/// After this long without a look at the store, nobody must believe that nothing has changed.
const BLIND: Duration = Duration::from_secs(3);

/// The end of the log, as of the last look.
#[derive(Clone)]
pub(crate) struct News {
    store: Store,
    head: watch::Receiver<i64>,
    closing: CancellationToken,
}

/// Looks at the log for as long as the server runs.
pub(crate) async fn look(store: Store, head: watch::Sender<i64>) {
    loop {
        match store.generation().await {
            // Sent also when nothing has changed: it says that somebody looked.
            Ok(generation) => drop(head.send_replace(generation)),
            Err(error) => tracing::debug!(%error, "the audit log can't be read at the moment"),
        }
        let _ = timeout(LOOK, store.changed()).await;
    }
}

/// One who watches.
struct Watcher {
    news: News,
    told: i64,
    last: Option<Instant>,
    /// More is to be told than fits into one message.
    behind: bool,
}

impl News {
    pub(crate) fn new(
        store: Store,
        head: watch::Receiver<i64>,
        closing: CancellationToken,
    ) -> Self {
        News { store, head, closing }
    }

    /// Everything after a generation, as it happens.
    pub(crate) fn since(
        self,
        told: i64,
    ) -> impl Stream<Item = Result<WatchRevocationsResponse, Status>> + Send + 'static {
        let watcher = Watcher { news: self, told, last: None, behind: false };
        unfold(Some(watcher), |watcher| async {
            let mut watcher = watcher?;
            match watcher.next().await {
                Ok(message) => Some((Ok(message), Some(watcher))),
                Err(error) => Some((Err(error.into()), None)),
            }
        })
    }
}

impl Watcher {
    async fn next(&mut self) -> Result<WatchRevocationsResponse, Error> {
        loop {
            if self.last.is_some() && !self.behind {
                let closing = self.news.closing.clone();
                tokio::select! {
                    () = closing.cancelled() => return Err(Error::ShuttingDown),
                    looked = timeout(BLIND, self.news.head.changed()) => match looked {
                        Ok(Ok(())) => {}
                        Ok(Err(_)) => return Err(Error::ShuttingDown),
                        Err(_) => return Err(Error::Blind),
                    },
                }
            }
            if let Some(message) = self.gather().await? {
                self.last = Some(Instant::now());
                return Ok(message);
            }
        }
    }

    async fn gather(&mut self) -> Result<Option<WatchRevocationsResponse>, Error> {
        let head = match self.last {
            Some(_) => *self.news.head.borrow_and_update(),
            None => self.news.store.generation().await?,
        };
        let due = self.last.is_none_or(|last| last.elapsed() >= SIGN);
        if self.told == 0 || head - self.told > FARTHEST {
            self.told = head;
            return Ok(Some(WatchRevocationsResponse {
                generation: head,
                reset: true,
                ..WatchRevocationsResponse::default()
            }));
        }
        if head > self.told || due {
            let (generation, revocations) = self.news.store.changes_after(self.told, MOST).await?;
            self.told = generation;
            self.behind = generation < head && !revocations.is_empty();
            let message = WatchRevocationsResponse { generation, revocations, reset: false };
            return Ok(Some(message).filter(|message| due || !message.revocations.is_empty()));
        }
        Ok(None)
    }
}
