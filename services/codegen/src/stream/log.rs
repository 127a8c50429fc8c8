//! The items of a shared answer, and the position of each of its readers.
//!
//! While the answer can be joined or cached, all items are kept. Afterwards items that every reader has read are
//! evicted, and a reader that lags too far is given up, so the log is bounded.

use std::collections::VecDeque;

use super::item::{Delta, StreamItem};

/// Maximum size of the kept text, in bytes. Far more than the tokens of any answer.
pub(crate) const MAX_LOG_BYTES: usize = 1024 * 1024;

/// The number of an item, and a number of bytes of its text.
pub(super) type Position = (usize, usize);

/// See the module.
#[derive(Debug, Default)]
pub(super) struct AnswerLog {
    /// The items from number `evicted_count`.
    items: VecDeque<StreamItem>,
    evicted_count: usize,
    buffered_bytes: usize,
}

impl AnswerLog {
    /// Appends an item. Short deltas of one track are joined, because thousands of tokens would be as many items.
    pub(super) fn push(&mut self, item: StreamItem) {
        self.buffered_bytes += item.text_bytes();
        let rest = match self.items.back_mut() {
            Some(last) => last.try_join(item),
            None => Some(item),
        };
        self.items.extend(rest);
    }

    pub(super) fn items(&self) -> &VecDeque<StreamItem> {
        &self.items
    }

    pub(super) fn is_too_large(&self) -> bool {
        self.buffered_bytes > MAX_LOG_BYTES
    }

    /// Copies what follows a position to `into`, and advances the position. Returns whether there was anything.
    pub(super) fn read(&self, position: &mut Position, into: &mut VecDeque<StreamItem>) -> bool {
        let end = self.end();
        if *position >= end {
            return false;
        }
        let (first, mut known) = *position;
        for item in self.items.range(first.saturating_sub(self.evicted_count)..) {
            match item {
                StreamItem::Delta(delta) if known == delta.text.len() => {}
                StreamItem::Delta(delta) => {
                    let rest = Delta::new(delta.track, &delta.text[known..]);
                    into.push_back(StreamItem::Delta(rest));
                }
                item => into.push_back(item.clone()),
            }
            known = 0;
        }
        *position = end;
        true
    }

    /// Evicts the items before a position.
    pub(super) fn evict_before(&mut self, position: Position) {
        while let Some(first) = self.items.front()
            && (position.0 > self.evicted_count || position == self.after(first))
        {
            self.buffered_bytes -= first.text_bytes();
            self.evicted_count += 1;
            self.items.pop_front();
        }
    }

    /// The position of the first kept item.
    pub(super) fn start(&self) -> Position {
        (self.evicted_count, 0)
    }

    /// The position after the last item. A delta can still grow, so it is the end of its text.
    pub(super) fn end(&self) -> Position {
        let count = self.evicted_count + self.items.len();
        match self.items.back() {
            Some(StreamItem::Delta(last)) => (count - 1, last.text.len()),
            _ => (count, 0),
        }
    }

    /// The position after the first item.
    fn after(&self, first: &StreamItem) -> Position {
        match first {
            StreamItem::Delta(delta) => (self.evicted_count, delta.text.len()),
            _ => (self.evicted_count + 1, 0),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::stream::{AnswerEnd, Track};

    fn text(text: &str) -> StreamItem {
        StreamItem::Delta(Delta::new(Track::Code, text))
    }

    /// The text after a position; items without text are "|".
    fn read(log: &AnswerLog, position: &mut Position) -> String {
        let mut items = VecDeque::new();
        log.read(position, &mut items);
        let text = |item: &StreamItem| match item {
            StreamItem::Delta(delta) => delta.text.clone(),
            _ => "|".to_owned(),
        };
        items.iter().map(text).collect()
    }

    #[test]
    fn each_reader_reads_all_of_it_at_its_own_pace_and_consumed_items_are_evicted() {
        let (mut log, mut fast, mut slow) = (AnswerLog::default(), (0, 0), (0, 0));
        let chunk = "x".repeat(3_000);
        log.push(StreamItem::Started);
        log.push(text("한"));
        assert_eq!(read(&log, &mut fast), "|한");
        assert_eq!(read(&log, &mut slow), "|한");
        log.evict_before(fast.min(slow));
        (fast, slow) = (fast.max(log.start()), slow.max(log.start()));
        assert_eq!(log.buffered_bytes, 0);
        log.push(text("글"));
        log.push(text(&chunk));
        assert_eq!(read(&log, &mut fast), format!("글{chunk}"));
        log.evict_before(fast.min(slow));
        log.push(text("c"));
        log.push(StreamItem::Finished(Arc::new(AnswerEnd::default())));
        assert_eq!(read(&log, &mut slow), format!("글{chunk}c|"));
        assert_eq!(read(&log, &mut fast), "c|");
        log.evict_before(fast.min(slow));
        assert_eq!((log.buffered_bytes, log.items.len()), (0, 0));
        assert_eq!(read(&log, &mut fast), "");
    }

    #[test]
    fn short_deltas_of_one_track_are_joined() {
        let mut log = AnswerLog::default();
        for _ in 0..1_000 {
            log.push(text("abc"));
        }
        assert_eq!(log.items.len(), 2);
        log.push(StreamItem::Delta(Delta::new(Track::Explanation, "d")));
        assert_eq!(log.items.len(), 3);
    }
}
