//! An incremental parser of server-sent events. Lines may end in CR, LF or both, a character may be
//! split over two reads, and one read may contain many events.
//! <https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation>
//!
//! Only data and errors matter to this protocol. The buffers never exceed the size limit.
//!
//! Three deviations from the standard serve engines:
//!
//! * The end of the body ends an event.
//! * JSON without a field name is an event.
//! * An event named `error` is passed on as `{"error": data}`.

use memchr::{memchr, memchr2};
use serde::de::IgnoredAny;

/// Maximum size of a line, and of the data of one event.
const MAX_EVENT_BYTES: usize = 1024 * 1024;
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

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
    /// The first line has ended, so no byte order mark can follow.
    has_first_line: bool,
    /// The incomplete event is an error.
    is_error: bool,
    /// Number of open brackets of the JSON without a field name in `data`.
    json_depth: usize,
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
            if let Some(data) = partial.strip_prefix(b"data: ")
                && let Some(after) = rest.strip_prefix(b"\n")
                && bytes[end] == b'\n'
                && data.len() < MAX_EVENT_BYTES
                && self.is_between_events()
            {
                // An event of one line, as almost all are, needs no copy.
                event(data)?;
                bytes = after;
                continue;
            }
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

    /// Ends the body. Calls `event` with the data of an event that lacks its empty line or its line
    /// end.
    pub(crate) fn finish<E: From<EventTooLong>>(
        &mut self,
        mut event: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let line = std::mem::take(&mut self.line);
        if !line.is_empty() {
            self.end_line(&line, &mut event)?;
        }
        self.end_event(&mut event)
    }

    /// Whether the next line begins an event.
    fn is_between_events(&self) -> bool {
        let SseParser { line, data, is_error, json_depth, has_first_line, .. } = self;
        line.is_empty() && data.is_empty() && !is_error && *json_depth == 0 && *has_first_line
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
        mut line: &[u8],
        event: &mut impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        if !std::mem::replace(&mut self.has_first_line, true) {
            line = line.strip_prefix(BYTE_ORDER_MARK).unwrap_or(line);
        }
        if self.json_depth > 0 {
            if !is_field(line) {
                return self.json_line(line, event);
            }
            // The JSON is incomplete, and a field follows.
            self.end_event(event)?;
        }
        match line.trim_ascii_start() {
            [] if line.is_empty() => return self.end_event(event),
            [b'{' | b'[', ..] if self.data.is_empty() => return self.json_line(line, event),
            // JSON that continues a data line.
            [b'{' | b'[', ..] => return Ok(self.append(line)?),
            _ => {}
        }
        let end = memchr(b':', line).unwrap_or(line.len());
        let value = line.get(end + 1..).unwrap_or_default();
        let value = value.strip_prefix(b" ").unwrap_or(value);
        match &line[..end] {
            b"data" => self.append(value)?,
            // The field that llama.cpp used before it sent errors as data.
            b"error" => {
                self.is_error = true;
                self.append(value)?;
            }
            b"event" => self.is_error = value == b"error",
            // Comments and the fields id and retry are ignored.
            _ => {}
        }
        Ok(())
    }

    /// Adds a line of JSON that has no field name. The JSON ends with its last bracket.
    fn json_line<E: From<EventTooLong>>(
        &mut self,
        line: &[u8],
        event: &mut impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.append(line)?;
        let (mut in_string, mut is_escaped) = (false, false);
        for byte in line {
            match byte {
                _ if std::mem::take(&mut is_escaped) => {}
                b'\\' => is_escaped = in_string,
                b'"' => in_string = !in_string,
                b'{' | b'[' if !in_string => self.json_depth += 1,
                b'}' | b']' if !in_string => self.json_depth = self.json_depth.saturating_sub(1),
                _ => {}
            }
        }
        if self.json_depth == 0 { self.end_event(event) } else { Ok(()) }
    }

    fn append(&mut self, value: &[u8]) -> Result<(), EventTooLong> {
        if self.data.len() + value.len() >= MAX_EVENT_BYTES {
            return Err(EventTooLong);
        }
        self.data.extend_from_slice(value);
        self.data.push(b'\n');
        Ok(())
    }

    fn end_event<E>(&mut self, event: &mut impl FnMut(&[u8]) -> Result<(), E>) -> Result<(), E> {
        self.json_depth = 0;
        let is_error = std::mem::take(&mut self.is_error);
        let mut buffer = std::mem::take(&mut self.data);
        let result = match buffer.strip_suffix(b"\n") {
            None => Ok(()),
            Some(b"") if is_error => Ok(()),
            Some(data) if is_error && !data.starts_with(b"[DONE]") => event(&error_event(data)),
            Some(data) => event(data),
        };
        buffer.clear();
        self.data = buffer;
        result
    }
}

/// The line begins a field of an event.
fn is_field(line: &[u8]) -> bool {
    [b"data:".as_slice(), b"event:", b"error:"].iter().any(|name| line.starts_with(name))
}

/// The data of an event named `error`: JSON, or a plain text.
fn error_event(data: &[u8]) -> Vec<u8> {
    let is_json = serde_json::from_slice::<IgnoredAny>(data).is_ok();
    let quoted = || serde_json::Value::from(String::from_utf8_lossy(data)).to_string();
    let value = if is_json { data.to_vec() } else { quoted().into_bytes() };
    [b"{\"error\":".as_slice(), &value, b"}"].concat()
}

#[cfg(test)]
mod tests;
