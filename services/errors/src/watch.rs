//! Tells occurrences as they are stored, through whichever replica: their numbers are the one source.
//!
//! At most 1,000 a second are told. Who is a little behind catches up; who is far behind is told how
//! many were left out.

use std::time::Duration;

use futures_util::Stream;
use futures_util::stream::unfold;
use hapa_core::violations::Violations;
use hapa_proto::errors::v1::{WatchOccurrencesRequest, WatchOccurrencesResponse};
use hapa_store::change_feed::Tail;
use tokio::time::{Instant, sleep_until};
use tonic::Status;

use crate::check;
use crate::error::Error;
use crate::store::Store;
use crate::view::View;

/// A sign of life at least this often; also the second in which so many are told.
const SECOND: Duration = Duration::from_secs(1);
/// Occurrences of a second.
const MOST: i64 = 1_000;
/// Occurrences of a message: with the longest texts they fit into what a client takes.
const TOGETHER: i64 = 50;
/// Who is further behind is not told everything.
const FARTHEST: i64 = 10_000;
/// Numbers that are left out at once: counting them takes a while.
const LEAP: i64 = 100_000;
/// Who can be told.
#[derive(Clone)]
pub(crate) struct News {
    pub(crate) store: Store,
    pub(crate) tail: Tail,
}

/// One who watches.
struct Watcher {
    news: News,
    view: View,
    error_code: String,
    told: i64,
    /// How many may be told until a second is over.
    left: i64,
    until: Instant,
    last: Option<Instant>,
}

impl News {
    /// Everything from a cursor on, as it happens.
    pub(crate) async fn since(
        self,
        view: View,
        request: WatchOccurrencesRequest,
    ) -> Result<impl Stream<Item = Result<WatchOccurrencesResponse, Status>> + Send + 'static, Error>
    {
        let mut found = Violations::default();
        check::code_or_none(&request.error_code, &mut found);
        found.check()?;
        let head = self.store.head().await?.sequence;
        let told = if request.cursor.is_empty() { head } else { number(&request.cursor, head)? };
        let watcher = Watcher {
            news: self,
            view,
            error_code: request.error_code,
            told,
            left: MOST,
            until: Instant::now() + SECOND,
            last: None,
        };
        Ok(unfold(Some(watcher), |watcher| async {
            let mut watcher = watcher?;
            match watcher.next().await {
                Ok(message) => Some((Ok(message), Some(watcher))),
                Err(error) => Some((Err(error.into()), None)),
            }
        }))
    }
}

/// A cursor that a message had.
fn number(cursor: &str, head: i64) -> Result<i64, Violations> {
    let number = cursor.parse().ok().filter(|number| (0..=head).contains(number));
    let number = number.filter(|number: &i64| number.to_string() == cursor);
    number.ok_or_else(|| Violations::one("cursor", "is not one that a message had"))
}

impl Watcher {
    async fn next(&mut self) -> Result<WatchOccurrencesResponse, Error> {
        loop {
            if self.until <= Instant::now() {
                (self.left, self.until) = (MOST, Instant::now() + SECOND);
            }
            let head = self.news.tail.last();
            let message = self.gather(head).await?;
            let due = self.last.is_none_or(|last| last.elapsed() >= SECOND);
            if due || !message.occurrences.is_empty() || message.skipped > 0 {
                self.last = Some(Instant::now());
                return Ok(message);
            }
            self.wait(head).await?;
        }
    }

    /// Waits for news, or for the next second where there is something left to tell.
    async fn wait(&mut self, head: i64) -> Result<(), Error> {
        tokio::select! {
            () = sleep_until(self.until), if self.told < head => Ok(()),
            looked = self.news.tail.look() => Ok(looked?),
        }
    }

    async fn gather(&mut self, head: i64) -> Result<WatchOccurrencesResponse, Error> {
        let mut message = WatchOccurrencesResponse::default();
        let (store, code) = (&self.news.store, self.error_code.as_str());
        self.news.tail.goes_on()?;
        if head - self.told > FARTHEST {
            let end = (head - MOST).min(self.told + LEAP);
            let left_out = (self.told, end);
            message.skipped = match &self.view {
                View::Mesh => store.count_between(left_out, code).await?,
                View::Owner(owner) => store.own_count_between(owner, left_out, code).await?,
            };
            self.told = end;
        } else if head > self.told && self.left > 0 {
            let most = TOGETHER.min(self.left);
            let range = (self.told, head);
            let found = match &self.view {
                View::Mesh => store.occurrences_between(range, code, most).await?,
                View::Owner(owner) => {
                    store.own_occurrences_between(owner, range, code, most).await?
                }
            };
            let count = i64::try_from(found.len()).unwrap_or(most);
            let last = found.last().map(|(number, _)| *number).filter(|_| count == most);
            self.told = last.unwrap_or(head);
            self.left -= count;
            message.occurrences = found.into_iter().map(|(_, occurrence)| occurrence).collect();
        }
        message.cursor = self.told.to_string();
        Ok(message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_a_message_had_is_a_cursor() {
        assert_eq!(number("7", 9).unwrap(), 7);
        for wrong in ["10", "-1", "07", "+7", "x", "7 ", "99999999999999999999"] {
            assert!(number(wrong, 9).is_err(), "{wrong}");
        }
    }
}
