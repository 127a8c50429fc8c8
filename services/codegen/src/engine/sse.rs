//! Server-sent events from bytes that arrive in any pieces: a line may end in CR, LF or both, a
//! letter may be cut in two, many events may come in one read.
//! <https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation>
//!
//! Only `data` matters to this protocol; nothing larger than the caps is ever held.

use memchr::memchr2;

/// Longest line, and longest data of one event.
const LONGEST: usize = 1024 * 1024;

/// The line or the event is over the cap.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("a line or event of the engine's stream is over 1 MiB")]
pub(crate) struct TooLong;

/// What has arrived and is not an event yet.
#[derive(Debug, Default)]
pub(crate) struct Reader {
    /// The begun line.
    line: Vec<u8>,
    /// Lines of the begun event, each with its line feed.
    data: Vec<u8>,
    /// The last byte was CR: a LF that follows belongs to it.
    after_cr: bool,
}

impl Reader {
    /// Takes what one read brought and gives the data of each event that it ends to `event`, until
    /// that says stop.
    pub(crate) fn feed<E: From<TooLong>>(
        &mut self,
        mut bytes: &[u8],
        mut event: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        if std::mem::take(&mut self.after_cr) && bytes.first() == Some(&b'\n') {
            bytes = &bytes[1..];
        }
        while let Some(end) = memchr2(b'\n', b'\r', bytes) {
            let (begun, rest) = (&bytes[..end], &bytes[end + 1..]);
            if self.line.is_empty() {
                self.take_line(begun, &mut event)?;
            } else {
                self.hold(begun)?;
                let line = std::mem::take(&mut self.line);
                self.take_line(&line, &mut event)?;
            }
            let is_cr = bytes[end] == b'\r';
            self.after_cr = is_cr && rest.is_empty();
            bytes = rest.strip_prefix(b"\n").filter(|_| is_cr).unwrap_or(rest);
        }
        Ok(self.hold(bytes)?)
    }

    fn hold(&mut self, bytes: &[u8]) -> Result<(), TooLong> {
        if self.line.len() + bytes.len() > LONGEST {
            return Err(TooLong);
        }
        self.line.extend_from_slice(bytes);
        Ok(())
    }

    fn take_line<E: From<TooLong>>(
        &mut self,
        line: &[u8],
        event: &mut impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        if line.is_empty() {
            let data = std::mem::take(&mut self.data);
            return data.strip_suffix(b"\n").map_or(Ok(()), event);
        }
        // A comment, or a field that says nothing here: event, id, retry.
        let Some(value) = line.strip_prefix(b"data") else { return Ok(()) };
        let value = match value {
            [] => value,
            [b':', b' ', value @ ..] | [b':', value @ ..] => value,
            _ => return Ok(()),
        };
        if self.data.len() + value.len() >= LONGEST {
            return Err(TooLong.into());
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

    fn read(pieces: &[&[u8]]) -> Result<Vec<String>, TooLong> {
        let (mut reader, mut events) = (Reader::default(), Vec::new());
        for piece in pieces {
            reader.feed(piece, |data| {
                events.push(String::from_utf8(data.to_vec()).unwrap());
                Ok::<_, TooLong>(())
            })?;
        }
        Ok(events)
    }

    #[test]
    fn comments_other_fields_and_line_ends_of_all_kinds_are_understood() {
        let stream = b": keep-alive\n\ndata: one\n\nevent: x\rdata:two\r\rid: 1\r\ndata: a\r\ndata: b\r\n\r\ndata\n\nretry\n\n";
        assert_eq!(read(&[stream]).unwrap(), ["one", "two", "a\nb", ""]);
    }

    #[test]
    fn an_event_without_its_empty_line_is_not_given() {
        assert_eq!(read(&[b"data: one\n\ndata: two\n"]).unwrap(), ["one"]);
    }

    #[test]
    fn an_endless_line_and_an_endless_event_are_refused() {
        let piece = [b'x'; 4096];
        let mut reader = Reader::default();
        let mut refuse =
            || (0..300).find_map(|_| reader.feed(&piece, |_| Ok::<_, TooLong>(())).err());
        assert_eq!(refuse(), Some(TooLong));
        assert_eq!(reader.line.len(), LONGEST / 4096 * 4096);
        let line = [b"data: ".as_slice(), &piece, b"\n"].concat();
        let mut reader = Reader::default();
        let refused = (0..300).find_map(|_| reader.feed(&line, |_| Ok::<_, TooLong>(())).err());
        assert_eq!(refused, Some(TooLong));
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
        fn no_bytes_make_it_panic(pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..20)) {
            let mut reader = Reader::default();
            for piece in pieces {
                let _ = reader.feed(&piece, |_| Ok::<_, TooLong>(()));
            }
        }
    }
}
