//! The response stream of an engine. It is polled, so a slow client slows the engine down. Dropping it closes the
//! connection, which aborts the engine's work.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Sleep, sleep};

use crate::upstream::engine::connection::PooledResponse;
use crate::upstream::engine::decode::StreamDecoder;
use crate::upstream::engine::sse::SseParser;
use crate::upstream::engine::untrusted_text::UntrustedTextLog;
use crate::upstream::engine::{EngineDelta, EngineError};

/// A read ends when it exceeds this size, which is far below the buffer of a shared stream. An engine that never pauses
/// then gives other tasks a turn.
const MAX_READ_BYTES: usize = 64 * 1024;
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
    response: Option<PooledResponse>,
    parser: SseParser,
    decoder: StreamDecoder,
    text_log: UntrustedTextLog,
    drain_timer: Option<Pin<Box<Sleep>>>,
}

impl ResponseStream {
    /// `request` is the body of the request.
    pub(super) fn new(
        response: PooledResponse,
        request: Bytes,
        text_log: UntrustedTextLog,
    ) -> ResponseStream {
        let (response, parser) = (Some(response), SseParser::default());
        let decoder = StreamDecoder::new(request);
        ResponseStream { response, parser, decoder, text_log, drain_timer: None }
    }

    /// Waits for the engine, and adds what it has sent to `delta`, also before an error. Everything that has arrived is
    /// read at once, because a message for each token would cost more than the token.
    pub(crate) fn poll_read(
        &mut self,
        delta: &mut EngineDelta,
        cx: &mut Context<'_>,
    ) -> Poll<Result<ReadOutcome, EngineError>> {
        let ResponseStream { response, parser, decoder, text_log, .. } = self;
        let mut byte_count = 0;
        while byte_count < MAX_READ_BYTES && !delta.is_done {
            let Some(open) = response else {
                return Poll::Ready(Ok(ReadOutcome::End));
            };
            match open.poll_data(cx) {
                Poll::Ready(Some(Ok(bytes))) => {
                    byte_count += bytes.len();
                    parser.feed(bytes, |data| push_event(decoder, delta, data, text_log))?;
                }
                Poll::Ready(Some(Err(error))) => {
                    let error = text_log.transport_error(error);
                    *response = None;
                    return Poll::Ready(Err(error));
                }
                Poll::Ready(None) | Poll::Pending if byte_count > 0 => break,
                Poll::Ready(None) => {
                    return Poll::Ready(self.end(delta).map(|()| ReadOutcome::End));
                }
                Poll::Pending => return Poll::Pending,
            }
        }
        Poll::Ready(Ok(ReadOutcome::Data))
    }

    /// Reads the end of the response after `[DONE]`, and returns its connection to the pool. Gives up after a short
    /// timeout.
    pub(crate) fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while let Some(response) = &mut self.response {
            match response.poll_data(cx) {
                Poll::Ready(Some(Ok(_))) => {}
                Poll::Ready(Some(Err(_))) => self.response = None,
                Poll::Ready(None) => {
                    if let Some(response) = self.response.take() {
                        response.release();
                    }
                }
                Poll::Pending => {
                    let timer =
                        self.drain_timer.get_or_insert_with(|| Box::pin(sleep(DRAIN_TIMEOUT)));
                    ready!(timer.as_mut().poll(cx));
                    self.response = None;
                }
            }
        }
        Poll::Ready(())
    }

    /// Adds an event whose end is the end of the body.
    fn end(&mut self, delta: &mut EngineDelta) -> Result<(), EngineError> {
        let ResponseStream { parser, decoder, text_log, .. } = self;
        parser.finish(|data| push_event(decoder, delta, data, text_log))
    }
}

fn push_event(
    decoder: &mut StreamDecoder,
    delta: &mut EngineDelta,
    data: &[u8],
    text_log: &UntrustedTextLog,
) -> Result<(), EngineError> {
    let piece_count = delta.pieces.len();
    let result = decoder.push_event(data, delta);
    let is_empty = delta.pieces.len() == piece_count && delta.usage.is_none() && !delta.is_done;
    if result.is_err() {
        text_log.log("an engine sent an error", data);
    } else if piece_count == 0 && is_empty && delta.model.is_none() {
        text_log.log("an engine sent an event without content", data);
    }
    result
}
