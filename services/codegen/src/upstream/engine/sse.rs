//! An incremental parser of server-sent events. Lines may end in CR, LF or both, a character may be
//! split over two reads, and one read may contain many events.
//! <https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation>
//!
//! Only the `data` field matters to this protocol. The buffers never exceed the size limit.

use memchr::memchr2;

/// Maximum size of a line, and of the data of one event.
const MAX_EVENT_BYTES: usize = 1024 * 1024;

/// A line or an event exceeds the size limit.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("a line or event of the engine's stream is over 1 MiB")]
pub(crate) struct EventTooLong;

/// Holds the bytes of the incomplete event.
#[derive(Debug, Default)]
pub(crate) struct SseParser {
    /// The incomplete line.
    line: Vec<u8>,
    /// Data lines of the incomplete event, each with its line feed.
    data: Vec<u8>,
    /// The last byte was CR, so a LF that follows belongs to it.
    after_cr: bool,
}

impl SseParser {
    /// Parses the bytes of one read. Calls `event` with the data of each completed event, until it
    /// returns an error.
    pub(crate) fn feed<E: From<EventTooLong>>(
        &mut self,
        mut bytes: &[u8],
        mut event: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        if std::mem::take(&mut self.after_cr) && bytes.first() == Some(&b'\n') {
            bytes = &bytes[1..];
        }
        while let Some(end) = memchr2(b'\n', b'\r', bytes) {
            let (partial, rest) = (&bytes[..end], &bytes[end + 1..]);
            if self.line.is_empty() {
                self.end_line(partial, &mut event)?;
            } else {
                self.buffer(partial)?;
                let line = std::mem::take(&mut self.line);
                self.end_line(&line, &mut event)?;
            }
            let is_cr = bytes[end] == b'\r';
            self.after_cr = is_cr && rest.is_empty();
            bytes = rest.strip_prefix(b"\n").filter(|_| is_cr).unwrap_or(rest);
        }
        Ok(self.buffer(bytes)?)
    }

    fn buffer(&mut self, bytes: &[u8]) -> Result<(), EventTooLong> {
        if self.line.len() + bytes.len() > MAX_EVENT_BYTES {
            return Err(EventTooLong);
        }
        self.line.extend_from_slice(bytes);
        Ok(())
    }

    fn end_line<E: From<EventTooLong>>(
        &mut self,
        line: &[u8],
        event: &mut impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        if line.is_empty() {
            let data = std::mem::take(&mut self.data);
            return data.strip_suffix(b"\n").map_or(Ok(()), event);
        }
        // Comments and the fields event, id and retry are ignored.
        let Some(value) = line.strip_prefix(b"data") else { return Ok(()) };
        let value = match value {
            [] => value,
            [b':', b' ', value @ ..] | [b':', value @ ..] => value,
            _ => return Ok(()),
        };
        if self.data.len() + value.len() >= MAX_EVENT_BYTES {
            return Err(EventTooLong.into());
        }
        self.data.extend_from_slice(value);
        self.data.push(b'\n');
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(pieces: &[&[u8]]) -> Result<Vec<String>, EventTooLong> {
        let (mut parser, mut events) = (SseParser::default(), Vec::new());
        for piece in pieces {
            parser.feed(piece, |data| {
                events.push(String::from_utf8(data.to_vec()).unwrap());
                Ok::<_, EventTooLong>(())
            })?;
        }
        Ok(events)
    }

    #[test]
    fn comments_other_fields_and_line_ends_of_all_kinds_are_parsed() {
        let stream = b": keep-alive\n\ndata: one\n\nevent: x\rdata:two\r\rid: 1\r\ndata: a\r\ndata: b\r\n\r\ndata\n\nretry\n\n";
        assert_eq!(read(&[stream]).unwrap(), ["one", "two", "a\nb", ""]);
    }

    #[test]
    fn an_event_without_its_empty_line_is_not_emitted() {
        assert_eq!(read(&[b"data: one\n\ndata: two\n"]).unwrap(), ["one"]);
    }

    #[test]
    fn an_endless_line_and_an_endless_event_are_rejected() {
        let piece = [b'x'; 4096];
        let mut parser = SseParser::default();
        let mut refuse =
            || (0..300).find_map(|_| parser.feed(&piece, |_| Ok::<_, EventTooLong>(())).err());
        assert_eq!(refuse(), Some(EventTooLong));
        assert_eq!(parser.line.len(), MAX_EVENT_BYTES / 4096 * 4096);
        let line = [b"data: ".as_slice(), &piece, b"\n"].concat();
        let mut parser = SseParser::default();
        let refused =
            (0..300).find_map(|_| parser.feed(&line, |_| Ok::<_, EventTooLong>(())).err());
        assert_eq!(refused, Some(EventTooLong));
    }

    proptest! {
        #[test]
        fn events_are_the_same_however_the_bytes_are_cut(
            texts in prop::collection::vec("[^\r\n]{0,12}", 0..8),
            ends in prop::collection::vec(prop::sample::select(vec!["\n", "\r\n", "\r"]), 8),
            cuts in prop::collection::vec(1usize..9, 0..200),
        ) {
            let end = |index: usize| ends[index % ends.len()];
            let mut stream = String::new();
            for (index, text) in texts.iter().enumerate() {
                stream.extend([": 주석", end(index), "data: ", text, end(index), end(index)]);
            }
            let mut rest = stream.as_bytes();
            let mut pieces = Vec::new();
            for cut in cuts {
                let (piece, after) = rest.split_at(cut.min(rest.len()));
                pieces.push(piece);
                rest = after;
            }
            pieces.push(rest);
            prop_assert_eq!(read(&pieces).unwrap(), texts);
        }

        #[test]
        fn no_bytes_make_the_parser_panic(pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..20)) {
            let mut parser = SseParser::default();
            for piece in pieces {
                let _ = parser.feed(&piece, |_| Ok::<_, EventTooLong>(()));
            }
        }
    }
}
