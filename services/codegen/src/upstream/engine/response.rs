//! The response stream of an engine. It is polled, so a slow client slows the engine down. Dropping it closes the
//! connection, which aborts the engine's work.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body::Body as _;
use tokio::time::{Instant, Sleep, sleep};

use crate::upstream::engine::sse::SseParser;
use crate::upstream::engine::untrusted_text::UntrustedTextLog;
use crate::upstream::engine::{EngineDelta, EngineError};

/// Chunks closer together than this are a burst and are coalesced.
const COALESCE_INTERVAL: Duration = Duration::from_micros(500);
/// Maximum number of chunks in one read.
const MAX_COALESCED_CHUNKS: usize = 32;
/// Wait for the end of the response after `[DONE]`.
const DRAIN_TIMEOUT: Duration = Duration::from_millis(50);

/// The result of a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ReadOutcome {
    /// Data has arrived.
    Data,
    /// The response has ended.
    End,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct ResponseStream {
    body: reqwest::Body,
    parser: SseParser,
    text_log: UntrustedTextLog,
    last_read: Instant,
    /// Chunks of the current read.
    chunk_count: usize,
    /// The connection's task was given a turn to deliver another chunk of the burst.
    has_yielded: bool,
    has_ended: bool,
    drain_timer: Option<Pin<Box<Sleep>>>,
}

impl ResponseStream {
    pub(super) fn new(response: reqwest::Response, text_log: UntrustedTextLog) -> ResponseStream {
        ResponseStream {
            body: response.into(),
            parser: SseParser::default(),
            text_log,
            last_read: Instant::now(),
            chunk_count: 0,
            has_yielded: false,
            has_ended: false,
            drain_timer: None,
        }
    }

    /// Waits for the engine, and adds what it has sent to `delta`, also before an error.
    ///
    /// An engine writes each token as a separate HTTP chunk. In a burst, chunks that have already arrived are coalesced,
    /// because a message for each would cost more than the token.
    pub(crate) fn poll_read(
        &mut self,
        delta: &mut EngineDelta,
        cx: &mut Context<'_>,
    ) -> Poll<Result<ReadOutcome, EngineError>> {
        loop {
            match self.poll_chunk(cx) {
                Poll::Ready(Some(Ok(bytes))) => {
                    self.chunk_count += 1;
                    self.push(&bytes, delta)?;
                    if delta.is_done || !self.is_burst() {
                        return Poll::Ready(Ok(self.end_read()));
                    }
                }
                Poll::Ready(Some(Err(error))) => {
                    self.end_read();
                    return Poll::Ready(Err(error));
                }
                Poll::Ready(None) if self.chunk_count > 0 => {
                    return Poll::Ready(Ok(self.end_read()));
                }
                Poll::Ready(None) => {
                    return Poll::Ready(self.end(delta).map(|()| ReadOutcome::End));
                }
                Poll::Pending if self.chunk_count == 0 => return Poll::Pending,
                Poll::Pending if self.has_yielded => return Poll::Ready(Ok(self.end_read())),
                Poll::Pending => {
                    // The connection's task delivers one chunk each time it runs.
                    self.has_yielded = true;
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
            }
        }
    }

    /// Reads the end of the response after `[DONE]`, so that the connection can be reused. Gives up after a short timeout.
    pub(crate) fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while let Some(Ok(_)) = match self.poll_chunk(cx) {
            Poll::Ready(chunk) => chunk,
            Poll::Pending => {
                let timer = self.drain_timer.get_or_insert_with(|| Box::pin(sleep(DRAIN_TIMEOUT)));
                ready!(timer.as_mut().poll(cx));
                return Poll::Ready(());
            }
        } {}
        Poll::Ready(())
    }

    fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, EngineError>>> {
        while !self.has_ended {
            match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
                Some(Ok(frame)) => {
                    if let Ok(bytes) = frame.into_data() {
                        return Poll::Ready(Some(Ok(bytes)));
                    }
                }
                Some(Err(error)) => {
                    self.has_ended = true;
                    return Poll::Ready(Some(Err(self.text_log.connection_error(&error))));
                }
                None => self.has_ended = true,
            }
        }
        Poll::Ready(None)
    }

    fn is_burst(&self) -> bool {
        self.chunk_count < MAX_COALESCED_CHUNKS && self.last_read.elapsed() < COALESCE_INTERVAL
    }

    fn end_read(&mut self) -> ReadOutcome {
        (self.chunk_count, self.has_yielded, self.last_read) = (0, false, Instant::now());
        ReadOutcome::Data
    }

    /// Adds an event whose end is the end of the body.
    fn end(&mut self, delta: &mut EngineDelta) -> Result<(), EngineError> {
        let text_log = &self.text_log;
        self.parser.finish(|data| push_event(delta, data, text_log))
    }

    fn push(&mut self, bytes: &[u8], delta: &mut EngineDelta) -> Result<(), EngineError> {
        let text_log = &self.text_log;
        self.parser.feed(bytes, |data| push_event(delta, data, text_log))
    }
}

fn push_event(
    delta: &mut EngineDelta,
    data: &[u8],
    text_log: &UntrustedTextLog,
) -> Result<(), EngineError> {
    let piece_count = delta.pieces.len();
    let result = delta.push_event(data);
    let is_empty = delta.pieces.len() == piece_count && delta.usage.is_none() && !delta.is_done;
    if result.is_err() {
        text_log.log("an engine sent an error", data);
    } else if piece_count == 0 && is_empty && delta.model.is_none() {
        text_log.log("an engine sent an event without content", data);
    }
    result
}
