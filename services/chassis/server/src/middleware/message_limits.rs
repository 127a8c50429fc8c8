//! Limits for request messages while they arrive: length of a message, bytes of all calls together, and time until a
//! message is complete.
//!
//! A gRPC message starts with its length, so a message that is too long is refused before it is buffered:
//! <https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md#requests>.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use hapa_core::access::Access;
use hapa_core::call::Call;
use hapa_core::rpc_error::{ErrorCode, RpcError};
use http::{Request, Response};
use http_body::Frame;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Sleep, sleep};
use tonic::Status;

use crate::middleware::body::{BodyWrapper, CallBody, PolledFrame, WrappedBody, poll_body};
use crate::middleware::shared::SharedState;

/// Maximum message length of a caller without a credential, in bytes.
const MAX_PUBLIC_MESSAGE_LEN: usize = 64 * 1024;
/// Maximum message length of a caller with a credential, in bytes.
const MAX_MESSAGE_LEN: usize = 1024 * 1024;
/// Maximum message length of a service, in bytes: services send batches of events.
const MAX_SERVICE_MESSAGE_LEN: usize = 4 * 1024 * 1024;
/// Maximum time from the start of a call, or from the first byte of a message, until the message is complete.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(10);
/// Length of the prefix of a message: one byte of flags and four bytes of length.
const PREFIX_LEN: usize = 5;

/// Puts the limits of the caller around the request body.
pub(crate) async fn limit_messages<Q: CallBody, B>(
    shared: &SharedState,
    request: Request<Q>,
    next: impl AsyncFnOnce(Request<Body>) -> Response<B>,
) -> Response<B> {
    let access = request.extensions().get::<Call>().and_then(|call| call.rpc).map(|rpc| rpc.access);
    let (max_len, memory) = match access {
        Some(Access::Service) => (MAX_SERVICE_MESSAGE_LEN, None),
        Some(Access::NoAuth | Access::Login) | None => {
            (MAX_PUBLIC_MESSAGE_LEN, Some(Arc::clone(&shared.request_memory)))
        }
        Some(_) => (MAX_MESSAGE_LEN, Some(Arc::clone(&shared.request_memory))),
    };
    let bounded = BoundedBody::new(max_len, memory);
    next(request.map(|body| Body::new(WrappedBody::new(body, bounded)))).await
}

/// Fails a request body when one of its messages exceeds a limit.
struct BoundedBody {
    messages: MessageScanner,
    max_len: usize,
    /// One permit for each byte that may arrive at once, for all calls together. `None`: no limit.
    memory: Option<Arc<Semaphore>>,
    /// The permits of the message that is arriving.
    reserved: Option<OwnedSemaphorePermit>,
    /// Runs while the next bytes must come from the client.
    timer: Option<Pin<Box<Sleep>>>,
}

impl BoundedBody {
    fn new(max_len: usize, memory: Option<Arc<Semaphore>>) -> Self {
        let messages = MessageScanner::default();
        BoundedBody { messages, max_len, memory, reserved: None, timer: None }
    }

    fn check(&mut self, mut data: &[u8]) -> Result<(), RpcError> {
        while let Some(len) = self.messages.next(&mut data) {
            // The previous message is complete, and its handler has it.
            self.reserved = None;
            if len > self.max_len {
                let message =
                    format!("a message of this method has at most {} bytes", self.max_len);
                return Err(RpcError::new(ErrorCode::TooLarge, message));
            }
            if len > data.len() {
                self.reserved = self.reserve(len)?;
            }
        }
        Ok(())
    }

    fn reserve(&self, len: usize) -> Result<Option<OwnedSemaphorePermit>, RpcError> {
        let Some(memory) = &self.memory else { return Ok(None) };
        let permits = u32::try_from(len).unwrap_or(u32::MAX);
        let reserved = Arc::clone(memory).try_acquire_many_owned(permits);
        reserved.map(Some).map_err(|_| {
            let message = "too many requests are arriving at once; try again shortly";
            RpcError::new(ErrorCode::Overloaded, message).retry_after(Duration::from_secs(1))
        })
    }

    /// Completes when a message is incomplete for too long.
    fn poll_timer(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if !self.messages.is_incomplete() {
            self.timer = None;
            return Poll::Pending;
        }
        self.timer.get_or_insert_with(|| Box::pin(sleep(MESSAGE_TIMEOUT))).as_mut().poll(cx)
    }

    fn fail<B>(&mut self, body: &mut Option<B>, fault: RpcError) -> PolledFrame {
        *body = None;
        self.reserved = None;
        Poll::Ready(Some(Err(axum::Error::new(Status::from(fault)))))
    }
}

impl BodyWrapper for BoundedBody {
    fn poll_frame<B: CallBody>(
        &mut self,
        body: &mut Option<B>,
        cx: &mut Context<'_>,
    ) -> PolledFrame {
        let Poll::Ready(frame) = poll_body(body, cx) else {
            return match self.poll_timer(cx) {
                Poll::Pending => Poll::Pending,
                Poll::Ready(()) => {
                    let message = format!(
                        "the request was not complete within {} s; send it at once",
                        MESSAGE_TIMEOUT.as_secs()
                    );
                    self.fail(body, RpcError::new(ErrorCode::DeadlineExceeded, message))
                }
            };
        };
        let data = frame.as_ref().and_then(|frame| frame.as_ref().ok()).and_then(Frame::data_ref);
        if let Some(data) = data {
            let completed = self.messages.completed;
            if let Err(fault) = self.check(data) {
                return self.fail(body, fault);
            }
            if self.messages.completed != completed {
                self.timer = None;
            }
        }
        Poll::Ready(frame)
    }
}

/// Finds the messages in a body that arrives in pieces of any size.
#[derive(Debug, Default)]
struct MessageScanner {
    prefix: [u8; PREFIX_LEN],
    prefix_len: usize,
    /// Bytes of the current message that have not arrived.
    missing: usize,
    completed: u64,
}

impl MessageScanner {
    /// Reads to the next message that starts in `data` and returns its length; `data` then starts after its prefix.
    /// `None`: `data` has no further message.
    fn next(&mut self, data: &mut &[u8]) -> Option<usize> {
        let skipped = self.missing.min(data.len());
        if skipped > 0 {
            *data = &data[skipped..];
            self.missing -= skipped;
            self.completed += u64::from(self.missing == 0);
        }
        let read = (PREFIX_LEN - self.prefix_len).min(data.len());
        if self.missing > 0 || read == 0 {
            return None;
        }
        self.prefix[self.prefix_len..self.prefix_len + read].copy_from_slice(&data[..read]);
        self.prefix_len += read;
        *data = &data[read..];
        if self.prefix_len < PREFIX_LEN {
            return None;
        }
        self.prefix_len = 0;
        let [_, len @ ..] = self.prefix;
        let len = usize::try_from(u32::from_be_bytes(len)).unwrap_or(usize::MAX);
        self.missing = len;
        self.completed += u64::from(len == 0);
        Some(len)
    }

    /// Whether more bytes must come: no message is complete yet, or one has started.
    fn is_incomplete(&self) -> bool {
        self.completed == 0 || self.missing > 0 || self.prefix_len > 0
    }
}

#[cfg(test)]
mod tests {
    use futures_util::stream;
    use http_body_util::BodyExt as _;
    use proptest::prelude::*;

    use bytes::Bytes;
    use hapa_core::rpc_error::published_code;

    use super::*;

    fn message(len: usize) -> Vec<u8> {
        let prefix = [&[0][..], &u32::try_from(len).unwrap().to_be_bytes()].concat();
        [prefix, vec![7; len]].concat()
    }

    fn body(pieces: Vec<Vec<u8>>) -> Body {
        let pieces = pieces.into_iter().map(|piece| Ok::<_, axum::Error>(Bytes::from(piece)));
        Body::from_stream(stream::iter(pieces))
    }

    fn bounded(body: Body, memory: Option<Arc<Semaphore>>) -> WrappedBody<Body, BoundedBody> {
        WrappedBody::new(body, BoundedBody::new(1_000, memory))
    }

    /// The published error code with which a body of these pieces fails.
    async fn failure(pieces: Vec<Vec<u8>>, memory: &Arc<Semaphore>) -> Option<String> {
        let body = bounded(body(pieces), Some(Arc::clone(memory)));
        let error = body.collect().await.err()?;
        Some(published_code(&Status::from_error(Box::new(error))).unwrap().0)
    }

    #[tokio::test]
    async fn a_message_over_the_limit_is_refused_by_its_prefix_alone() {
        let memory = Arc::new(Semaphore::new(10_000));
        assert_eq!(failure(vec![message(1_000)], &memory).await, None);
        let prefix = message(1_001)[..PREFIX_LEN].to_vec();
        assert_eq!(failure(vec![prefix], &memory).await.unwrap(), "E4006");
        let second = [message(10), message(1_001)].concat();
        assert_eq!(failure(vec![second], &memory).await.unwrap(), "E4006");
        assert_eq!(memory.available_permits(), 10_000);
    }

    #[tokio::test]
    async fn all_arriving_bodies_share_one_memory_limit_and_release_their_part() {
        let memory = Arc::new(Semaphore::new(1_500));
        let arriving = |len: usize| {
            let (_, rest) = (0, stream::pending::<Result<Bytes, axum::Error>>());
            let first = stream::iter([Ok(Bytes::from(message(len)[..PREFIX_LEN].to_vec()))]);
            let body = Body::from_stream(futures_util::StreamExt::chain(first, rest));
            bounded(body, Some(Arc::clone(&memory)))
        };
        let mut first = arriving(1_000);
        assert!(first.frame().await.unwrap().is_ok());
        assert_eq!(memory.available_permits(), 500);
        let mut second = arriving(600);
        let refused = second.frame().await.unwrap().unwrap_err();
        assert_eq!(published_code(&Status::from_error(Box::new(refused))).unwrap().0, "E5005");
        drop(first);
        assert_eq!(memory.available_permits(), 1_500);
        assert!(arriving(600).frame().await.unwrap().is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_that_is_incomplete_after_the_timeout_is_refused() {
        for begun in [vec![], vec![0, 0], message(100)[..50].to_vec()] {
            let first = stream::iter([Ok::<_, axum::Error>(Bytes::from(begun))]);
            let rest = stream::pending();
            let body = Body::from_stream(futures_util::StreamExt::chain(first, rest));
            let started = tokio::time::Instant::now();
            let error = bounded(body, None).collect().await.unwrap_err();
            assert_eq!(published_code(&Status::from_error(Box::new(error))).unwrap().0, "E5012");
            assert_eq!(started.elapsed().as_secs(), MESSAGE_TIMEOUT.as_secs());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_of_requests_may_pause_between_two_messages() {
        let first = stream::iter([Ok::<_, axum::Error>(Bytes::from(message(100)))]);
        let second = stream::once(async {
            sleep(MESSAGE_TIMEOUT * 3).await;
            Ok(Bytes::from(message(100)))
        });
        let body = Body::from_stream(futures_util::StreamExt::chain(first, second));
        assert!(bounded(body, None).collect().await.is_ok());
    }

    proptest! {
        #[test]
        fn messages_are_found_wherever_the_body_is_split(
            lens in prop::collection::vec(0usize..300, 1..8), cut in 1usize..64
        ) {
            let whole: Vec<u8> = lens.iter().flat_map(|len| message(*len)).collect();
            let (mut messages, mut found) = (MessageScanner::default(), Vec::new());
            for mut piece in whole.chunks(cut) {
                while let Some(len) = messages.next(&mut piece) {
                    found.push(len);
                }
            }
            prop_assert_eq!(&found, &lens);
            prop_assert_eq!(messages.completed, lens.len() as u64);
            prop_assert!(!messages.is_incomplete());
        }
    }
}
