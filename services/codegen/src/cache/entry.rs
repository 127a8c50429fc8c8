//! A whole answer as it is kept: its text by kind, and how it ended. A broken answer has no entry.

use bytes::{BufMut as _, Bytes, BytesMut};
use hapa_proto::codegen::v1::stream_generate_code_response::{Delta, Event, Finished};
use prost::Message as _;

/// Of the form below; what begins otherwise is not read.
const VERSION: u8 = 1;
/// The largest that is kept, in bytes: many times what 4,096 tokens are.
pub(crate) const LARGEST: usize = 1024 * 1024;

#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Entry {
    /// Neighbours differ in kind.
    #[prost(message, repeated, tag = "1")]
    pub(crate) parts: Vec<Delta>,
    #[prost(message, optional, tag = "2")]
    pub(crate) finished: Option<Finished>,
}

impl Entry {
    /// Of the events of an answer that ended well; none where they are not worth keeping: nothing was
    /// said, or the engine stopped for a reason that another time it may not have.
    pub(crate) fn of<'e>(events: impl IntoIterator<Item = &'e Event>) -> Option<Entry> {
        let mut entry = Entry::default();
        for event in events {
            match event {
                Event::Delta(delta) => match entry.parts.last_mut() {
                    Some(last) if last.kind == delta.kind => last.text.push_str(&delta.text),
                    _ => entry.parts.push(delta.clone()),
                },
                Event::Finished(finished) => entry.finished = Some(finished.clone()),
                _ => {}
            }
        }
        let reason = entry.finished.as_ref()?.finish_reason.as_str();
        let is_whole = matches!(reason, "stop" | "length") && !entry.parts.is_empty();
        (is_whole && entry.encoded_len() < LARGEST).then_some(entry)
    }

    pub(crate) fn encode_with_version(&self) -> Bytes {
        let mut bytes = BytesMut::with_capacity(1 + self.encoded_len());
        bytes.put_u8(VERSION);
        // It grows as needed, so there is always room.
        let _ = self.encode(&mut bytes);
        bytes.freeze()
    }

    pub(crate) fn read(bytes: &[u8]) -> Option<Entry> {
        let (version, message) = bytes.split_first()?;
        let entry = (*version == VERSION).then(|| Entry::decode(message).ok())??;
        entry.finished.is_some().then_some(entry)
    }
}

#[cfg(test)]
mod tests {
    use hapa_proto::codegen::v1::stream_generate_code_response::Kind;

    use super::*;

    fn said(text: &str, kind: Kind) -> Event {
        Event::Delta(Delta { text: text.to_owned(), kind: kind.into() })
    }

    fn ended(reason: &str) -> Event {
        Event::Finished(Finished { finish_reason: reason.to_owned(), ..Finished::default() })
    }

    #[test]
    fn text_is_joined_by_kind_and_comes_back_as_it_was() {
        let events = [
            said("a", Kind::Explanation),
            said("b", Kind::Explanation),
            said("x", Kind::Code),
            said("c", Kind::Explanation),
            ended("stop"),
        ];
        let entry = Entry::of(&events).unwrap();
        let texts: Vec<_> = entry.parts.iter().map(|part| part.text.as_str()).collect();
        assert_eq!(texts, ["ab", "x", "c"]);
        let bytes = entry.encode_with_version();
        assert_eq!(Entry::read(&bytes), Some(entry));
        assert_eq!(Entry::read(&[&[9], &bytes[1..]].concat()), None, "another version");
        for cut in 0..bytes.len() {
            // Never a panic, whatever someone put there.
            let _ = Entry::read(&bytes[..cut]);
        }
    }

    #[test]
    fn only_whole_answers_are_worth_keeping() {
        let text = said("a", Kind::Code);
        for reason in ["stop", "length"] {
            assert!(Entry::of(&[text.clone(), ended(reason)]).is_some());
        }
        for events in
            [vec![text.clone()], vec![ended("stop")], vec![text.clone(), ended("repetition")]]
        {
            assert_eq!(Entry::of(&events), None, "{events:?}");
        }
        let large = said(&"x".repeat(LARGEST), Kind::Code);
        assert_eq!(Entry::of(&[large, ended("stop")]), None);
    }
}
