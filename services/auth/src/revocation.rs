//! Tells replicas what has changed. The audit log is the one source: whoever made a change, through
//! whichever replica of auth, it is told to all who watch.

use std::time::Duration;

use futures_util::Stream;
use futures_util::stream::unfold;
use hapa_proto::auth::v1::WatchRevocationsResponse;
use hapa_store::change_feed::Tail;
use tokio::time::Instant;
use tonic::Status;

use crate::error::Error;
use crate::store::Store;

/// A sign of life at least this often; services take a second without one for silence.
const SIGN: Duration = Duration::from_millis(250);
/// Changes in one message.
const MOST: i64 = 1_000;
/// Who is further behind asks for everything again: that costs less than telling.
const FARTHEST: i64 = 10_000;
/// Who can be told.
#[derive(Clone)]
pub(crate) struct News {
    pub(crate) store: Store,
    pub(crate) tail: Tail,
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
                self.news.tail.look().await?;
            }
            if let Some(message) = self.gather().await? {
                self.last = Some(Instant::now());
                return Ok(message);
            }
        }
    }

    async fn gather(&mut self) -> Result<Option<WatchRevocationsResponse>, Error> {
        let head = match self.last {
            Some(_) => self.news.tail.last(),
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
