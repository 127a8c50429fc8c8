//! The stored form of a complete answer: its text by track, and its end.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::{BufMut as _, Bytes, BytesMut};
use hapa_proto::codegen::v1::stream_generate_code_response::{self as message, Finished, Kind};
use prost::Message as _;

use crate::stream::item::{AnswerEnd, Delta, StreamItem, Track};
use crate::stream::log::MAX_LOG_BYTES;

/// Version of the encoding. Entries of other versions are ignored.
const VERSION: u8 = 2;

/// An answer. Its messages are those of the API, which stays compatible.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct CacheEntry {
    /// Adjacent parts differ in kind.
    #[prost(message, repeated, tag = "1")]
    parts: Vec<message::Delta>,
    #[prost(message, optional, tag = "2")]
    finished: Option<Finished>,
}

impl CacheEntry {
    /// `None` for answers that are empty, too large, or whose finish reason need not occur again.
    pub(super) fn new(items: &VecDeque<StreamItem>, finish: &AnswerEnd) -> Option<CacheEntry> {
        let mut parts: Vec<message::Delta> = Vec::new();
        for item in items {
            if matches!(item, StreamItem::Reclassified) {
                for part in &mut parts {
                    part.kind = Kind::Reasoning.into();
                }
            }
            let StreamItem::Delta(Delta { track, text }) = item else { continue };
            let kind = kind_of(*track)?;
            match parts.last_mut() {
                Some(last) if last.kind() == kind => last.text.push_str(text),
                _ => parts.push(message::Delta { text: text.clone(), kind: kind.into() }),
            }
        }
        let is_complete = matches!(finish.finish_reason.as_str(), "stop" | "length");
        if parts.is_empty() || !is_complete {
            return None;
        }
        let finished = Some(Finished {
            finish_reason: finish.finish_reason.clone(),
            usage: finish.usage,
            warnings: finish.warnings.clone(),
            ..Finished::default()
        });
        let entry = CacheEntry { parts, finished };
        (entry.encoded_len() < MAX_LOG_BYTES).then_some(entry)
    }

    /// The items of the answer.
    pub(super) fn items(&self) -> Vec<StreamItem> {
        let deltas = self.parts.iter().map(|part| {
            let track = match part.kind() {
                Kind::Code => Track::Code,
                Kind::Reasoning => Track::Reasoning,
                Kind::Explanation | Kind::Unspecified => Track::Explanation,
            };
            StreamItem::Delta(Delta::new(track, &part.text))
        });
        let finished = self.finished.clone().unwrap_or_default();
        let finish = AnswerEnd {
            finish_reason: finished.finish_reason,
            usage: finished.usage,
            warnings: finished.warnings,
            ..AnswerEnd::default()
        };
        let end = StreamItem::Finished(Arc::new(finish));
        std::iter::once(StreamItem::Started).chain(deltas).chain([end]).collect()
    }

    pub(super) fn encode_with_version(&self) -> Bytes {
        let mut bytes = BytesMut::with_capacity(1 + self.encoded_len());
        bytes.put_u8(VERSION);
        // The buffer grows as needed.
        let _ = self.encode(&mut bytes);
        bytes.freeze()
    }

    /// `None` if the bytes are no entry of this version.
    pub(super) fn decode_with_version(bytes: &[u8]) -> Option<CacheEntry> {
        let (version, message) = bytes.split_first()?;
        let entry = (*version == VERSION).then(|| CacheEntry::decode(message).ok())??;
        entry.finished.is_some().then_some(entry)
    }
}

/// Only generations are cached.
fn kind_of(track: Track) -> Option<Kind> {
    match track {
        Track::Code => Some(Kind::Code),
        Track::Explanation => Some(Kind::Explanation),
        Track::Reasoning => Some(Kind::Reasoning),
        Track::Suggestion(_) => None,
    }
}

#[cfg(test)]
impl CacheEntry {
    pub(super) fn of_text(text: &str) -> CacheEntry {
        let items = [StreamItem::Delta(Delta::new(Track::Code, text))].into();
        let finish = AnswerEnd { finish_reason: "stop".to_owned(), ..AnswerEnd::default() };
        CacheEntry::new(&items, &finish).unwrap()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn delta(text: &str, track: Track) -> StreamItem {
        StreamItem::Delta(Delta::new(track, text))
    }

    fn finish(reason: &str) -> AnswerEnd {
        AnswerEnd { finish_reason: reason.to_owned(), is_reusable: true, ..AnswerEnd::default() }
    }

    #[test]
    fn text_is_joined_by_track_and_survives_encoding() {
        let items = VecDeque::from([
            StreamItem::Started,
            delta("r", Track::Reasoning),
            delta("a", Track::Explanation),
            delta("b", Track::Explanation),
            delta("x", Track::Code),
            delta("c", Track::Explanation),
        ]);
        let entry = CacheEntry::new(&items, &finish("stop")).unwrap();
        let texts: Vec<_> = entry.parts.iter().map(|part| part.text.as_str()).collect();
        assert_eq!(texts, ["r", "ab", "x", "c"]);
        let bytes = entry.encode_with_version();
        assert_eq!(CacheEntry::decode_with_version(&bytes), Some(entry.clone()));
        assert_eq!(entry.items().len(), 6);
        let other_version = [&[9], &bytes[1..]].concat();
        assert_eq!(CacheEntry::decode_with_version(&other_version), None);
        for length in 0..bytes.len() {
            // Must not panic.
            let _ = CacheEntry::decode_with_version(&bytes[..length]);
        }
    }

    #[test]
    fn only_complete_answers_of_a_limited_size_are_cached() {
        let text: VecDeque<_> = [delta("a", Track::Code)].into();
        for reason in ["stop", "length"] {
            assert!(CacheEntry::new(&text, &finish(reason)).is_some());
        }
        assert!(CacheEntry::new(&text, &finish("repetition")).is_none());
        assert!(CacheEntry::new(&VecDeque::new(), &finish("stop")).is_none());
        let large = [delta(&"x".repeat(MAX_LOG_BYTES), Track::Code)].into();
        assert!(CacheEntry::new(&large, &finish("stop")).is_none());
    }
}
