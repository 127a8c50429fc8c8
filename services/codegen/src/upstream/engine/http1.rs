//! HTTP/1.1 messages, as far as the client of an engine needs them: the head of a request, the head of a response, and
//! the framing of its body. Nothing here reads or writes. <https://www.rfc-editor.org/rfc/rfc9112>

use bytes::{BufMut as _, Bytes, BytesMut};
use http::header::{CONNECTION, CONTENT_LENGTH, HeaderMap, HeaderName, TRANSFER_ENCODING};
use http::{HeaderValue, StatusCode};

/// Maximum size of the head of a response.
const MAX_HEAD_BYTES: usize = 64 * 1024;
/// Maximum number of headers of a response.
const MAX_HEADER_COUNT: usize = 128;
/// Maximum size of the line before a chunk, and of all trailers together.
const MAX_CHUNK_LINE_BYTES: usize = 16 * 1024;

/// The peer does not follow the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Malformed;

/// The head of a response.
#[derive(Debug)]
pub(super) struct ResponseHead {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    /// Whether the connection can be used for another request after the body.
    pub(super) keeps_alive: bool,
    pub(super) framing: BodyFraming,
}

/// Where a body ends, and what of it is left.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum BodyFraming {
    /// The number of bytes left.
    Length(u64),
    Chunked(ChunkState),
    /// It ends with the connection.
    UntilClose,
}

/// The position in a chunked body.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum ChunkState {
    /// In the line before a chunk.
    Size {
        size: Option<u64>,
        part: SizePart,
        len: usize,
    },
    /// In a chunk, of which this number of bytes is left.
    Data(u64),
    /// Behind a chunk; the bytes of the line end that have been read.
    DataEnd(usize),
    /// In the trailers: the length of the current line, and of all of them.
    Trailers {
        line_len: usize,
        len: usize,
    },
    Ended,
}

/// The part of the line before a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SizePart {
    Digits,
    /// Ignored.
    Extension,
    LineFeed,
}

/// The next part of a body in a buffer.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct BodyPart {
    /// Bytes of the framing in front of the data.
    pub(super) framing_len: usize,
    /// Bytes of the data; 0 if more must be received.
    pub(super) data_len: usize,
    pub(super) is_end: bool,
}

/// The head of a POST request to this path and query, with a body of this length.
pub(super) fn request_head(
    (path, query): (&str, Option<&str>),
    headers: &HeaderMap,
    body_len: usize,
) -> Bytes {
    let mut head = BytesMut::with_capacity(512);
    let separator = if query.is_some() { "?" } else { "" };
    for part in ["POST ", path, separator, query.unwrap_or_default(), " HTTP/1.1\r\n"] {
        head.put_slice(part.as_bytes());
    }
    let length = HeaderValue::from(body_len);
    for (name, value) in headers.iter().chain([(&CONTENT_LENGTH, &length)]) {
        put_header(&mut head, name, value);
    }
    head.put_slice(b"\r\n");
    head.freeze()
}

fn put_header(head: &mut BytesMut, name: &HeaderName, value: &HeaderValue) {
    for part in [name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"] {
        head.put_slice(part);
    }
}

/// Parses the head at the start of a buffer, and returns its length. Interim responses in front of it are skipped.
/// `None`: it is incomplete.
pub(super) fn parse_head(bytes: &[u8]) -> Result<Option<(ResponseHead, usize)>, Malformed> {
    let mut skipped = 0;
    loop {
        let mut headers = [httparse::EMPTY_HEADER; MAX_HEADER_COUNT];
        let mut response = httparse::Response::new(&mut headers);
        let parsed = response.parse(&bytes[skipped..]).map_err(|_| Malformed)?;
        let httparse::Status::Complete(len) = parsed else {
            return if bytes.len() < MAX_HEAD_BYTES { Ok(None) } else { Err(Malformed) };
        };
        skipped += len;
        let status = StatusCode::from_u16(response.code.unwrap_or_default());
        let status = status.map_err(|_| Malformed)?;
        if status.is_informational() && status != StatusCode::SWITCHING_PROTOCOLS {
            continue;
        }
        let is_1_0 = response.version == Some(0);
        let headers = header_map(response.headers)?;
        let framing = framing(status, &headers)?;
        let has = |token: &str| has_token(&headers, &CONNECTION, token);
        let keeps_alive = framing != BodyFraming::UntilClose
            && if is_1_0 { has("keep-alive") } else { !has("close") };
        return Ok(Some((ResponseHead { status, headers, keeps_alive, framing }, skipped)));
    }
}

fn header_map(parsed: &[httparse::Header<'_>]) -> Result<HeaderMap, Malformed> {
    let mut headers = HeaderMap::with_capacity(parsed.len());
    for header in parsed {
        let name = HeaderName::from_bytes(header.name.as_bytes()).map_err(|_| Malformed)?;
        let value = HeaderValue::from_bytes(header.value).map_err(|_| Malformed)?;
        headers.append(name, value);
    }
    Ok(headers)
}

/// <https://www.rfc-editor.org/rfc/rfc9112#section-6.3>
fn framing(status: StatusCode, headers: &HeaderMap) -> Result<BodyFraming, Malformed> {
    if matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED) {
        return Ok(BodyFraming::Length(0));
    }
    if headers.contains_key(TRANSFER_ENCODING) {
        let is_chunked = has_token(headers, &TRANSFER_ENCODING, "chunked");
        return Ok(if is_chunked { BodyFraming::chunked() } else { BodyFraming::UntilClose });
    }
    let mut length = None;
    for value in &headers.get_all(CONTENT_LENGTH) {
        let text = value.to_str().map_err(|_| Malformed)?.trim();
        let is_number = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        let number = text.parse::<u64>().ok().filter(|_| is_number).ok_or(Malformed)?;
        if length.replace(number).is_some_and(|other| other != number) {
            return Err(Malformed);
        }
    }
    Ok(length.map_or(BodyFraming::UntilClose, BodyFraming::Length))
}

/// Whether a header that is a list contains a word.
fn has_token(headers: &HeaderMap, name: &HeaderName, token: &str) -> bool {
    let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|word| word.trim().eq_ignore_ascii_case(token))
}

impl BodyFraming {
    fn chunked() -> BodyFraming {
        BodyFraming::Chunked(ChunkState::size())
    }

    /// Finds the next part in the buffer. The caller removes both of its lengths from the buffer before it calls again.
    pub(super) fn next_part(&mut self, bytes: &[u8]) -> Result<BodyPart, Malformed> {
        match self {
            BodyFraming::Length(left) => {
                let data_len = take(left, bytes.len());
                Ok(BodyPart { framing_len: 0, data_len, is_end: *left == 0 })
            }
            BodyFraming::UntilClose => {
                Ok(BodyPart { framing_len: 0, data_len: bytes.len(), is_end: false })
            }
            BodyFraming::Chunked(state) => state.next_part(bytes),
        }
    }
}

impl ChunkState {
    fn size() -> ChunkState {
        ChunkState::Size { size: None, part: SizePart::Digits, len: 0 }
    }

    fn next_part(&mut self, bytes: &[u8]) -> Result<BodyPart, Malformed> {
        for (framing_len, byte) in bytes.iter().enumerate() {
            match self {
                ChunkState::Data(left) => {
                    let data_len = take(left, bytes.len() - framing_len);
                    if *left == 0 {
                        *self = ChunkState::DataEnd(0);
                    }
                    return Ok(BodyPart { framing_len, data_len, is_end: false });
                }
                ChunkState::Ended => {
                    return Ok(BodyPart { framing_len, data_len: 0, is_end: true });
                }
                _ => self.push(*byte)?,
            }
        }
        let is_end = *self == ChunkState::Ended;
        Ok(BodyPart { framing_len: bytes.len(), data_len: 0, is_end })
    }

    /// Reads one byte of the framing.
    fn push(&mut self, byte: u8) -> Result<(), Malformed> {
        match self {
            ChunkState::Size { size, part, len } => {
                *len += 1;
                let digit = char::from(byte).to_digit(16).map(u64::from);
                match (*part, byte) {
                    _ if *len > MAX_CHUNK_LINE_BYTES => return Err(Malformed),
                    (SizePart::Digits, _) if let Some(digit) = digit => {
                        let shifted = size.unwrap_or_default().checked_mul(16).ok_or(Malformed)?;
                        *size = Some(shifted | digit);
                    }
                    (_, b'\r') if *part != SizePart::LineFeed => *part = SizePart::LineFeed,
                    (SizePart::Digits, b';' | b' ' | b'\t') => *part = SizePart::Extension,
                    (SizePart::Extension, _) if byte != b'\n' => {}
                    (SizePart::LineFeed, b'\n') => {
                        *self = match size.ok_or(Malformed)? {
                            0 => ChunkState::Trailers { line_len: 0, len: 0 },
                            size => ChunkState::Data(size),
                        }
                    }
                    _ => return Err(Malformed),
                }
            }
            ChunkState::DataEnd(len) => match (*len, byte) {
                (0, b'\r') => *len = 1,
                (1, b'\n') => *self = ChunkState::size(),
                _ => return Err(Malformed),
            },
            ChunkState::Trailers { line_len, len } => {
                *len += 1;
                match byte {
                    _ if *len > MAX_CHUNK_LINE_BYTES => return Err(Malformed),
                    b'\n' if *line_len == 0 => *self = ChunkState::Ended,
                    b'\n' => *line_len = 0,
                    b'\r' => {}
                    _ => *line_len += 1,
                }
            }
            ChunkState::Data(_) | ChunkState::Ended => {}
        }
        Ok(())
    }
}

/// Takes as many as there are of both.
fn take(left: &mut u64, available: usize) -> usize {
    let taken = usize::try_from(*left).map_or(available, |left| left.min(available));
    *left -= taken as u64;
    taken
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Decodes a body that arrives in pieces. Returns the data, and whether the body has ended.
    fn decode(mut framing: BodyFraming, pieces: &[&[u8]]) -> Result<(Vec<u8>, bool), Malformed> {
        let (mut data, mut buffer) = (Vec::new(), Vec::new());
        for piece in pieces {
            buffer.extend_from_slice(piece);
            loop {
                let part = framing.next_part(&buffer)?;
                let end = part.framing_len + part.data_len;
                data.extend_from_slice(&buffer[part.framing_len..end]);
                buffer.drain(..end);
                if part.is_end {
                    return Ok((data, true));
                }
                if part.data_len == 0 {
                    break;
                }
            }
        }
        Ok((data, false))
    }

    fn head(text: &str) -> Result<Option<(ResponseHead, usize)>, Malformed> {
        parse_head(text.as_bytes())
    }

    #[test]
    fn the_framing_of_a_body_follows_its_status_and_headers() {
        let chunked = BodyFraming::chunked;
        for (status, headers, framing, keeps_alive) in [
            ("HTTP/1.1 200 OK", "content-length: 5\r\n", BodyFraming::Length(5), true),
            (
                "HTTP/1.1 200",
                "Content-Length: 5\r\ncontent-length: 5\r\n",
                BodyFraming::Length(5),
                true,
            ),
            ("HTTP/1.1 200 OK", "transfer-encoding: chunked\r\n", chunked(), true),
            (
                "HTTP/1.1 200 OK",
                "Transfer-Encoding: gzip, Chunked\r\ncontent-length: 1\r\n",
                chunked(),
                true,
            ),
            (
                "HTTP/1.1 200 OK",
                "connection: x, Close\r\ncontent-length: 1\r\n",
                BodyFraming::Length(1),
                false,
            ),
            ("HTTP/1.1 200 OK", "", BodyFraming::UntilClose, false),
            ("HTTP/1.0 200 OK", "content-length: 1\r\n", BodyFraming::Length(1), false),
            (
                "HTTP/1.0 200 OK",
                "content-length: 1\r\nconnection: keep-alive\r\n",
                BodyFraming::Length(1),
                true,
            ),
            ("HTTP/1.1 204 No Content", "", BodyFraming::Length(0), true),
            (
                "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK",
                "content-length: 2\r\n",
                BodyFraming::Length(2),
                true,
            ),
        ] {
            let text = format!("{status}\r\n{headers}\r\n");
            let (head, len) = head(&text).unwrap().unwrap();
            assert_eq!((head.framing, head.keeps_alive), (framing, keeps_alive), "{text}");
            assert_eq!(len, text.len());
        }
    }

    #[test]
    fn an_invalid_head_is_refused_and_an_incomplete_one_is_awaited() {
        for text in [
            "ICY 200 OK\r\n\r\n",
            "HTTP/1.1 OK\r\n\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: 5, 6\r\n\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: 99999999999999999999\r\n\r\n",
        ] {
            assert_eq!(head(text).unwrap_err(), Malformed, "{text}");
        }
        let whole = "HTTP/1.1 200 OK\r\nserver: uvicorn\r\n\r\n";
        for len in 0..whole.len() {
            assert!(head(&whole[..len]).unwrap().is_none(), "{len}");
        }
        let endless = format!("HTTP/1.1 200 OK\r\na: {}", "x".repeat(MAX_HEAD_BYTES));
        assert_eq!(head(&endless).unwrap_err(), Malformed);
    }

    #[test]
    fn chunks_have_extensions_and_trailers_and_any_length_of_number() {
        let body = b"5;a=\"b\"\r\nhello\r\n0001 \r\n!\r\n0\r\nx: y\r\n\r\n";
        assert_eq!(decode(BodyFraming::chunked(), &[body]), Ok((b"hello!".to_vec(), true)));
        for invalid in
            [&b"x\r\n"[..], b"\r\n", b"5\nhello", b"1\r\nab", b"10000000000000000\r\n", b"1;\n"]
        {
            assert_eq!(decode(BodyFraming::chunked(), &[invalid]), Err(Malformed), "{invalid:?}");
        }
        let endless = [b"1;".as_slice(), &[b'x'; MAX_CHUNK_LINE_BYTES]].concat();
        assert_eq!(decode(BodyFraming::chunked(), &[&endless]), Err(Malformed));
        let trailers = [b"0\r\n".as_slice(), &b"x: y\r\n".repeat(MAX_CHUNK_LINE_BYTES)].concat();
        assert_eq!(decode(BodyFraming::chunked(), &[&trailers]), Err(Malformed));
    }

    #[test]
    fn a_request_head_has_its_headers_and_the_length_of_the_body() {
        let mut headers = HeaderMap::new();
        headers.insert("host", HeaderValue::from_static("h:1"));
        let head = request_head(("/v1/chat", Some("x=1")), &headers, 12);
        assert_eq!(
            &head[..],
            b"POST /v1/chat?x=1 HTTP/1.1\r\nhost: h:1\r\ncontent-length: 12\r\n\r\n"
        );
    }

    proptest! {
        #[test]
        fn a_chunked_body_is_decoded_wherever_it_is_split(
            chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..40), 0..6),
            cut in 1_usize..20,
        ) {
            let mut body = Vec::new();
            for chunk in &chunks {
                body.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
                body.extend_from_slice(chunk);
                body.extend_from_slice(b"\r\n");
            }
            body.extend_from_slice(b"0\r\n\r\n");
            let pieces: Vec<_> = body.chunks(cut).collect();
            prop_assert_eq!(decode(BodyFraming::chunked(), &pieces), Ok((chunks.concat(), true)));
            let (data, has_ended) =
                decode(BodyFraming::chunked(), &pieces[..pieces.len() - 1]).unwrap();
            prop_assert!(!has_ended && data.len() <= chunks.concat().len());
        }

        #[test]
        fn no_bytes_make_the_parsers_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse_head(&bytes);
            let _ = decode(BodyFraming::chunked(), &[&bytes]);
        }
    }
}
