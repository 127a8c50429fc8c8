//! Slow-reader guard: ends a call if its client stops reading. The work that feeds the call is dropped, and its stream
//! is reset.
//!
//! While the client's flow-control window is closed, hyper does not poll the response body. So no timer inside the
//! body can expire. [`SlowReaderTimeout`] stands around hyper's own future of the call. The response body reports
//! each poll through the [`ReaderState`] in the request's extensions.

use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::thread::{self, ThreadId};
use std::time::Duration;

use pin_project_lite::pin_project;
use tokio::time::{Instant, Sleep, sleep_until};

/// The last result of polling a response body, while hyper polled the call once.
#[derive(Clone, Copy, Debug, PartialEq)]
enum PollOutcome {
    /// The body was not polled: the client's window is closed.
    NotPolled = 0,
    /// The body returned a frame, which hyper took, and was not polled again.
    Frame = 1,
    /// The body has no frame, so the call does not wait for the client.
    Pending = 2,
}

/// The reader of one call, as its response body and [`SlowReaderTimeout`] see it. Clones share one state. The task
/// of the call alone uses it, so the order of its fields' updates needs no barrier.
#[derive(Clone, Debug, Default)]
pub(crate) struct ReaderState(Arc<ReaderFlags>);

#[derive(Debug, Default)]
struct ReaderFlags {
    /// A [`PollOutcome`].
    outcome: AtomicU8,
    timed_out: AtomicBool,
}

impl ReaderState {
    /// Records a result of polling the response body.
    pub(crate) fn record_poll<T>(&self, polled: &Poll<T>) {
        self.set(if polled.is_pending() { PollOutcome::Pending } else { PollOutcome::Frame });
    }

    /// Whether the call is dropped because its client does not read.
    pub(crate) fn timed_out(&self) -> bool {
        self.0.timed_out.load(Ordering::Relaxed)
    }

    fn set(&self, outcome: PollOutcome) {
        self.0.outcome.store(outcome as u8, Ordering::Relaxed);
    }

    fn outcome(&self) -> PollOutcome {
        match self.0.outcome.load(Ordering::Relaxed) {
            1 => PollOutcome::Frame,
            2 => PollOutcome::Pending,
            _ => PollOutcome::NotPolled,
        }
    }
}

/// Passes the reader of a request from the service of a connection to its executor.
///
/// hyper calls the service with a request and at once, on the same thread, hands the future of the call to the
/// executor. The tasks of calls use the executor too, on any thread, for upgrades; those get a reader of their own.
#[derive(Clone, Debug, Default)]
pub(crate) struct ReaderHandoff(Arc<Mutex<Option<(ThreadId, ReaderState)>>>);

impl ReaderHandoff {
    /// The reader of a new request.
    pub(crate) fn start(&self) -> ReaderState {
        let reader = ReaderState::default();
        *self.slot() = Some((thread::current().id(), reader.clone()));
        reader
    }

    /// The reader of the request that the service was called with last, on this thread.
    pub(crate) fn take(&self) -> ReaderState {
        let thread = thread::current().id();
        let taken = self.slot().take_if(|(started_on, _)| *started_on == thread);
        taken.map(|(_, reader)| reader).unwrap_or_default()
    }

    fn slot(&self) -> MutexGuard<'_, Option<(ThreadId, ReaderState)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pin_project! {
    /// hyper's future of a call, which ends if the client does not read for `timeout`.
    pub(crate) struct SlowReaderTimeout<F> {
        #[pin]
        call: Option<F>,
        timeout: Duration,
        reader: ReaderState,
        timer: Option<Pin<Box<Sleep>>>,
        waits_for_reader: bool,
    }
}

impl<F> SlowReaderTimeout<F> {
    pub(crate) fn new(call: F, timeout: Duration, reader: ReaderState) -> Self {
        let (timer, waits_for_reader) = (None, false);
        SlowReaderTimeout { call: Some(call), timeout, reader, timer, waits_for_reader }
    }
}

impl<F: Future> Future for SlowReaderTimeout<F> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let mut this = self.project();
        let Some(call) = this.call.as_mut().as_pin_mut() else { return Poll::Ready(()) };
        this.reader.set(PollOutcome::NotPolled);
        if call.poll(cx).is_ready() {
            return Poll::Ready(());
        }
        match this.reader.outcome() {
            PollOutcome::Pending => *this.waits_for_reader = false,
            PollOutcome::NotPolled => {}
            PollOutcome::Frame => {
                *this.waits_for_reader = true;
                let deadline = Instant::now() + *this.timeout;
                match this.timer {
                    Some(timer) => timer.as_mut().reset(deadline),
                    None => *this.timer = Some(Box::pin(sleep_until(deadline))),
                }
            }
        }
        let Some(timer) = this.timer.as_mut().filter(|_| *this.waits_for_reader) else {
            return Poll::Pending;
        };
        if timer.as_mut().poll(cx).is_pending() {
            return Poll::Pending;
        }
        this.reader.0.timed_out.store(true, Ordering::Relaxed);
        this.call.set(None);
        Poll::Ready(())
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(30);

    /// Reports, when it is dropped, whether the reader timed out.
    struct ReportOnDrop(ReaderState, std::sync::mpsc::Sender<bool>);

    impl Drop for ReportOnDrop {
        fn drop(&mut self) {
            let _ = self.1.send(self.0.timed_out());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_whose_body_returned_a_frame_and_is_not_polled_again_times_out() {
        let (sender, timed_out) = std::sync::mpsc::channel();
        let reader = ReaderState::default();
        let body = ReportOnDrop(reader.clone(), sender);
        let mut has_polled = false;
        let call = poll_fn(move |_| {
            if !std::mem::replace(&mut has_polled, true) {
                body.0.record_poll(&Poll::Ready(()));
            }
            Poll::<()>::Pending
        });
        let started = Instant::now();
        SlowReaderTimeout::new(call, TIMEOUT, reader).await;
        assert_eq!(started.elapsed().as_secs(), TIMEOUT.as_secs());
        assert_eq!(timed_out.try_recv(), Ok(true));
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_that_waits_for_its_handler_is_left_to_the_deadline() {
        let mut timer = Box::pin(sleep_until(Instant::now() + 100 * TIMEOUT));
        let reader = ReaderState::default();
        let body = reader.clone();
        let call = poll_fn(move |cx| {
            let ready = timer.as_mut().poll(cx);
            body.record_poll(&Poll::Ready(()));
            body.record_poll(&ready);
            ready
        });
        let started = Instant::now();
        SlowReaderTimeout::new(call, TIMEOUT, reader.clone()).await;
        assert_eq!(started.elapsed().as_secs(), 100 * TIMEOUT.as_secs());
        assert!(!reader.timed_out());
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_client_that_goes_on_reading_is_served() {
        let mut left = 10;
        let mut timer = Box::pin(sleep_until(Instant::now() + TIMEOUT / 2));
        let reader = ReaderState::default();
        let body = reader.clone();
        let call = poll_fn(move |cx| {
            while timer.as_mut().poll(cx).is_ready() {
                timer.as_mut().reset(Instant::now() + TIMEOUT / 2);
                body.record_poll(&Poll::Ready(()));
                left -= 1;
                if left == 0 {
                    return Poll::Ready(());
                }
            }
            Poll::Pending
        });
        let started = Instant::now();
        SlowReaderTimeout::new(call, TIMEOUT, reader.clone()).await;
        assert_eq!(started.elapsed().as_secs(), 5 * TIMEOUT.as_secs());
        assert!(!reader.timed_out());
    }

    #[test]
    fn calls_of_one_connection_do_not_share_a_reader() {
        let handoff = ReaderHandoff::default();
        let (first, taken) = (handoff.start(), handoff.take());
        taken.0.timed_out.store(true, Ordering::Relaxed);
        assert!(first.timed_out());
        let second = handoff.start();
        thread::scope(|scope| {
            let other = scope.spawn(|| handoff.take());
            other.join().unwrap().0.timed_out.store(true, Ordering::Relaxed);
        });
        assert!(!second.timed_out(), "another thread does not take it");
        handoff.take().0.timed_out.store(true, Ordering::Relaxed);
        assert!(second.timed_out());
    }
}
