//! Bounds what requests may hold while they arrive: the length of each message, the bytes of all calls
//! together, and the time until a message is complete.
//!
//! A gRPC message says its length first, so it is refused before anything is buffered:
//! <https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md#requests>.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use bytes::Bytes;
use hapa_core::access::Access;
use hapa_core::call::Call;
use hapa_core::rpc_error::{ErrorCode, Fault};
use http_body::{Body as HttpBody, Frame, SizeHint};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Sleep, sleep};
use tonic::Status;

use crate::middleware::Shared;

/// Longest message of a caller that needs no credential.
const MAX_PUBLIC_MESSAGE_LEN: usize = 64 * 1024;
/// Longest message of a caller with a credential.
const MAX_MESSAGE_LEN: usize = 1024 * 1024;
/// Longest message of a service: batches of events.
const MAX_SERVICE_MESSAGE_LEN: usize = 4 * 1024 * 1024;
/// From a call's begin, or from a message's first byte, until the message is complete.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(10);
/// One byte of flags and four of length.
const PREFIX_LEN: usize = 5;

pub(crate) async fn receive(
    State(shared): State<Arc<Shared>>,
    request: Request,
    next: Next,
) -> Response {
    let access = request.extensions().get::<Call>().and_then(|call| call.rpc).map(|rpc| rpc.access);
    let (max_len, memory) = match access {
        Some(Access::Mesh) => (MAX_SERVICE_MESSAGE_LEN, None),
        Some(Access::Public | Access::Open) | None => {
            (MAX_PUBLIC_MESSAGE_LEN, Some(Arc::clone(&shared.request_memory)))
        }
        Some(_) => (MAX_MESSAGE_LEN, Some(Arc::clone(&shared.request_memory))),
    };
    next.run(request.map(|body| Body::new(BoundedBody::new(body, max_len, memory)))).await
}

/// A request's body that fails where a message breaks a bound.
struct BoundedBody {
    body: Body,
    messages: Messages,
    max_len: usize,
    /// Bytes that may arrive at once, for all calls; `None`: no bound.
    memory: Option<Arc<Semaphore>>,
    /// What the message that is arriving has taken of it.
    held: Option<OwnedSemaphorePermit>,
    /// Set while the client is waited for.
    timer: Option<Pin<Box<Sleep>>>,
}

impl BoundedBody {
    fn new(body: Body, max_len: usize, memory: Option<Arc<Semaphore>>) -> Self {
        let messages = Messages::default();
        BoundedBody { body, messages, max_len, memory, held: None, timer: None }
    }

    fn check(&mut self, mut data: &[u8]) -> Result<(), Fault> {
        while let Some(len) = self.messages.next(&mut data) {
            // The message before was complete: its reader has it.
            self.held = None;
            if len > self.max_len {
                let words = format!("a message of this method has at most {} bytes", self.max_len);
                return Err(Fault::new(ErrorCode::TooLarge, words));
            }
            if len > data.len() {
                self.held = self.take(len)?;
            }
        }
        Ok(())
    }

    fn take(&self, len: usize) -> Result<Option<OwnedSemaphorePermit>, Fault> {
        let Some(memory) = &self.memory else { return Ok(None) };
        let permits = u32::try_from(len).unwrap_or(u32::MAX);
        let taken = Arc::clone(memory).try_acquire_many_owned(permits);
        taken.map(Some).map_err(|_| {
            let words = "too many requests are arriving at once; try again shortly";
            Fault::new(ErrorCode::Overloaded, words).retry_after(Duration::from_secs(1))
        })
    }

    /// Waits for the client, for a bounded time where a message is due.
    fn poll_timer(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if !self.messages.is_due() {
            self.timer = None;
            return Poll::Pending;
        }
        self.timer.get_or_insert_with(|| Box::pin(sleep(MESSAGE_TIMEOUT))).as_mut().poll(cx)
    }

    fn fail(&mut self, fault: Fault) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        self.body = Body::empty();
        self.held = None;
        Poll::Ready(Some(Err(axum::Error::new(Status::from(fault)))))
    }
}

impl HttpBody for BoundedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(cx) else {
            return match self.poll_timer(cx) {
                Poll::Pending => Poll::Pending,
                Poll::Ready(()) => {
                    let words = format!(
                        "the request was not complete within {} s; send it at once",
                        MESSAGE_TIMEOUT.as_secs()
                    );
                    self.fail(Fault::new(ErrorCode::ModelTimeout, words))
                }
            };
        };
        let data = frame.as_ref().and_then(|frame| frame.as_ref().ok()).and_then(Frame::data_ref);
        if let Some(data) = data {
            let completed = self.messages.completed;
            if let Err(fault) = self.check(data) {
                return self.fail(fault);
            }
            if self.messages.completed != completed {
                self.timer = None;
            }
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Where messages begin and end in a body that arrives in pieces of any size.
#[derive(Debug, Default)]
struct Messages {
    prefix: [u8; PREFIX_LEN],
    prefix_len: usize,
    /// Bytes of the current message that have not arrived.
    missing: usize,
    completed: u64,
}

impl Messages {
    /// Reads on to the next message that begins in `data`, which is then what follows its prefix; its
    /// length. `None` where `data` has been read to its end.
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

    /// Whether the client owes bytes: no message was complete yet, or one has begun.
    fn is_due(&self) -> bool {
        self.completed == 0 || self.missing > 0 || self.prefix_len > 0
    }
}

#[cfg(test)]
mod tests {
    use futures_util::stream;
    use http_body_util::BodyExt as _;
    use proptest::prelude::*;

    use super::*;
    use hapa_core::rpc_error::read;

    fn message(len: usize) -> Vec<u8> {
        let prefix = [&[0][..], &u32::try_from(len).unwrap().to_be_bytes()].concat();
        [prefix, vec![7; len]].concat()
    }

    fn body(pieces: Vec<Vec<u8>>) -> Body {
        let pieces = pieces.into_iter().map(|piece| Ok::<_, axum::Error>(Bytes::from(piece)));
        Body::from_stream(stream::iter(pieces))
    }

    /// The published code with which a body of such pieces fails.
    async fn failure(pieces: Vec<Vec<u8>>, memory: &Arc<Semaphore>) -> Option<String> {
        let body = BoundedBody::new(body(pieces), 1_000, Some(Arc::clone(memory)));
        let error = body.collect().await.err()?;
        Some(read(&Status::from_error(Box::new(error))).unwrap().0)
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
    async fn all_arriving_bodies_together_are_bounded_and_give_back_what_they_held() {
        let memory = Arc::new(Semaphore::new(1_500));
        let arriving = |len: usize| {
            let (_, rest) = (0, stream::pending::<Result<Bytes, axum::Error>>());
            let first = stream::iter([Ok(Bytes::from(message(len)[..PREFIX_LEN].to_vec()))]);
            let body = Body::from_stream(futures_util::StreamExt::chain(first, rest));
            BoundedBody::new(body, 1_000, Some(Arc::clone(&memory)))
        };
        let mut first = arriving(1_000);
        assert!(first.frame().await.unwrap().is_ok());
        assert_eq!(memory.available_permits(), 500);
        let mut second = arriving(600);
        let refused = second.frame().await.unwrap().unwrap_err();
        assert_eq!(read(&Status::from_error(Box::new(refused))).unwrap().0, "E5005");
        drop(first);
        assert_eq!(memory.available_permits(), 1_500);
        assert!(arriving(600).frame().await.unwrap().is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_that_does_not_arrive_in_time_is_refused() {
        for begun in [vec![], vec![0, 0], message(100)[..50].to_vec()] {
            let first = stream::iter([Ok::<_, axum::Error>(Bytes::from(begun))]);
            let rest = stream::pending();
            let body = Body::from_stream(futures_util::StreamExt::chain(first, rest));
            let started = tokio::time::Instant::now();
            let error = BoundedBody::new(body, 1_000, None).collect().await.unwrap_err();
            assert_eq!(read(&Status::from_error(Box::new(error))).unwrap().0, "E5001");
            assert_eq!(started.elapsed().as_secs(), MESSAGE_TIMEOUT.as_secs());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_of_requests_may_rest_between_two_messages() {
        let first = stream::iter([Ok::<_, axum::Error>(Bytes::from(message(100)))]);
        let second = stream::once(async {
            sleep(MESSAGE_TIMEOUT * 3).await;
            Ok(Bytes::from(message(100)))
        });
        let body = Body::from_stream(futures_util::StreamExt::chain(first, second));
        assert!(BoundedBody::new(body, 1_000, None).collect().await.is_ok());
    }

    proptest! {
        #[test]
        fn messages_are_found_however_the_body_is_cut(
            lens in prop::collection::vec(0usize..300, 1..8), cut in 1usize..64
        ) {
            let whole: Vec<u8> = lens.iter().flat_map(|len| message(*len)).collect();
            let (mut messages, mut found) = (Messages::default(), Vec::new());
            for mut piece in whole.chunks(cut) {
                while let Some(len) = messages.next(&mut piece) {
                    found.push(len);
                }
            }
            prop_assert_eq!(&found, &lens);
            prop_assert_eq!(messages.completed, lens.len() as u64);
            prop_assert!(!messages.is_due());
        }
    }
}
