//! WatchOccurrences: streams occurrences as any replica stores them, in the order of their sequence
//! numbers.
//!
//! A subscriber receives at most 1,000 occurrences a second. One that lags catches up; one that
//! lags by more than `MAX_LAG` receives the number of skipped occurrences instead.

use std::time::Duration;

use futures_util::Stream;
use futures_util::stream::unfold;
use hapa_core::violations::Violations;
use hapa_proto::errors::v1::{WatchOccurrencesRequest, WatchOccurrencesResponse};
use hapa_store::change_feed::ChangeFeed;
use tokio::time::{Instant, sleep_until};
use tonic::Status;

use crate::error::Error;
use crate::store::Store;
use crate::validation::validate_code_filter;
use crate::visibility::Visibility;

/// Longest time between two messages, and the period of the rate limit.
const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(1);
/// Most occurrences per subscriber and `HEARTBEAT_INTERVAL`.
const MAX_OCCURRENCES_PER_SECOND: i64 = 1_000;
/// Most occurrences in one message: with texts of maximum length it stays below a client's message
/// limit.
const MESSAGE_BATCH_SIZE: i64 = 50;
/// A subscriber that lags by more sequence numbers skips occurrences.
const MAX_LAG: i64 = 10_000;
/// Most sequence numbers skipped by one message, because counting their occurrences takes time.
const MAX_SKIP_COUNT: i64 = 100_000;

/// The source of all subscriptions.
#[derive(Clone)]
pub(crate) struct OccurrenceFeed {
    pub(crate) store: Store,
    pub(crate) tail: ChangeFeed,
}

/// The state of one WatchOccurrences stream.
struct Subscriber {
    feed: OccurrenceFeed,
    visibility: Visibility,
    error_code: String,
    /// The last sequence number that was delivered or skipped.
    delivered_until: i64,
    /// How many occurrences may be delivered until `period_end`.
    remaining: i64,
    period_end: Instant,
    last_message: Option<Instant>,
}

impl OccurrenceFeed {
    /// Streams all occurrences after the request's cursor, or after now without a cursor.
    pub(crate) async fn subscribe(
        self,
        visibility: Visibility,
        request: WatchOccurrencesRequest,
    ) -> Result<impl Stream<Item = Result<WatchOccurrencesResponse, Status>> + Send + 'static, Error>
    {
        let mut violations = Violations::default();
        validate_code_filter(&request.error_code, &mut violations);
        violations.check()?;
        let head = self.store.head().await?.sequence;
        let delivered_until =
            if request.cursor.is_empty() { head } else { parse_cursor(&request.cursor, head)? };
        let subscriber = Subscriber {
            feed: self,
            visibility,
            error_code: request.error_code,
            delivered_until,
            remaining: MAX_OCCURRENCES_PER_SECOND,
            period_end: Instant::now() + HEARTBEAT_INTERVAL,
            last_message: None,
        };
        Ok(unfold(Some(subscriber), |subscriber| async {
            let mut subscriber = subscriber?;
            match subscriber.next().await {
                Ok(message) => Some((Ok(message), Some(subscriber))),
                Err(error) => Some((Err(error.into()), None)),
            }
        }))
    }
}

/// Parses the cursor of an earlier message. `head`: the newest sequence number.
fn parse_cursor(cursor: &str, head: i64) -> Result<i64, Violations> {
    let sequence = cursor.parse().ok().filter(|sequence| (0..=head).contains(sequence));
    let sequence = sequence.filter(|sequence: &i64| sequence.to_string() == cursor);
    sequence.ok_or_else(|| Violations::single("cursor", "must be the cursor of an earlier message"))
}

impl Subscriber {
    async fn next(&mut self) -> Result<WatchOccurrencesResponse, Error> {
        loop {
            if self.period_end <= Instant::now() {
                (self.remaining, self.period_end) =
                    (MAX_OCCURRENCES_PER_SECOND, Instant::now() + HEARTBEAT_INTERVAL);
            }
            let head = self.feed.tail.last();
            let message = self.read_message(head).await?;
            let is_due = self.last_message.is_none_or(|sent| sent.elapsed() >= HEARTBEAT_INTERVAL);
            if is_due || !message.occurrences.is_empty() || message.skipped > 0 {
                self.last_message = Some(Instant::now());
                return Ok(message);
            }
            self.wait(head).await?;
        }
    }

    /// Waits for new occurrences, or for the next period if stored ones are still undelivered.
    async fn wait(&mut self, head: i64) -> Result<(), Error> {
        tokio::select! {
            () = sleep_until(self.period_end), if self.delivered_until < head => Ok(()),
            polled = self.feed.tail.next_poll() => Ok(polled?),
        }
    }

    async fn read_message(&mut self, head: i64) -> Result<WatchOccurrencesResponse, Error> {
        let mut message = WatchOccurrencesResponse::default();
        let (store, code) = (&self.feed.store, self.error_code.as_str());
        self.feed.tail.check_open()?;
        if head - self.delivered_until > MAX_LAG {
            let end =
                (head - MAX_OCCURRENCES_PER_SECOND).min(self.delivered_until + MAX_SKIP_COUNT);
            let skipped = (self.delivered_until, end);
            message.skipped = match &self.visibility {
                Visibility::All => store.count_between(skipped, code).await?,
                Visibility::Owner(owner) => store.owner_count_between(owner, skipped, code).await?,
            };
            self.delivered_until = end;
        } else if head > self.delivered_until && self.remaining > 0 {
            let limit = MESSAGE_BATCH_SIZE.min(self.remaining);
            let range = (self.delivered_until, head);
            let rows = match &self.visibility {
                Visibility::All => store.occurrences_between(range, code, limit).await?,
                Visibility::Owner(owner) => {
                    store.owner_occurrences_between(owner, range, code, limit).await?
                }
            };
            let count = i64::try_from(rows.len()).unwrap_or(limit);
            let last = rows.last().map(|(sequence, _)| *sequence).filter(|_| count == limit);
            self.delivered_until = last.unwrap_or(head);
            self.remaining -= count;
            message.occurrences = rows.into_iter().map(|(_, occurrence)| occurrence).collect();
        }
        message.cursor = self.delivered_until.to_string();
        Ok(message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_cursor_of_an_earlier_message_is_valid() {
        assert_eq!(parse_cursor("7", 9).unwrap(), 7);
        for wrong in ["10", "-1", "07", "+7", "x", "7 ", "99999999999999999999"] {
            assert!(parse_cursor(wrong, 9).is_err(), "{wrong}");
        }
    }
}
