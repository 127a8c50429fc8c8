//! A call whose client has stopped reading is given up: what feeds it is dropped, and its stream is
//! reset. Nobody asks the body for more while the client's window is closed, so no timer in there
//! could tell; this one stands around hyper's own future of the call, which knows.

use std::cell::Cell;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use pin_project_lite::pin_project;
use tokio::time::{Instant, Sleep, sleep_until};

/// What a body did while hyper polled the call.
#[derive(Clone, Copy, Default, PartialEq)]
enum Turn {
    /// It was not asked: the client has room for no more.
    #[default]
    Unasked,
    /// It gave a frame, which hyper took, and was not asked again.
    Gave,
    /// It has nothing to give, so nobody waits for the client.
    Waits,
}

thread_local! {
    static TURN: Cell<Turn> = const { Cell::new(Turn::Unasked) };
    static GIVING_UP: Cell<bool> = const { Cell::new(false) };
}

/// Said by the body of each call when it was asked for a frame.
pub(crate) fn asked<T>(answer: &Poll<T>) {
    TURN.set(if answer.is_pending() { Turn::Waits } else { Turn::Gave });
}

/// Whether what is being dropped is dropped because its client reads no more.
pub(crate) fn is_given_up() -> bool {
    GIVING_UP.get()
}

pin_project! {
    /// A call as hyper drives it, for as long as its client reads.
    pub(crate) struct Read<F> {
        #[pin]
        call: Option<F>,
        patience: Duration,
        timer: Option<Pin<Box<Sleep>>>,
        waits_for_reader: bool,
    }
}

impl<F> Read<F> {
    pub(crate) fn new(call: F, patience: Duration) -> Self {
        Read { call: Some(call), patience, timer: None, waits_for_reader: false }
    }
}

impl<F: Future> Future for Read<F> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let mut this = self.project();
        let Some(call) = this.call.as_mut().as_pin_mut() else { return Poll::Ready(()) };
        TURN.set(Turn::Unasked);
        if call.poll(cx).is_ready() {
            return Poll::Ready(());
        }
        match TURN.get() {
            Turn::Waits => *this.waits_for_reader = false,
            Turn::Unasked => {}
            Turn::Gave => {
                *this.waits_for_reader = true;
                let at = Instant::now() + *this.patience;
                match this.timer {
                    Some(timer) => timer.as_mut().reset(at),
                    None => *this.timer = Some(Box::pin(sleep_until(at))),
                }
            }
        }
        let Some(timer) = this.timer.as_mut().filter(|_| *this.waits_for_reader) else {
            return Poll::Pending;
        };
        if timer.as_mut().poll(cx).is_pending() {
            return Poll::Pending;
        }
        GIVING_UP.set(true);
        this.call.set(None);
        GIVING_UP.set(false);
        Poll::Ready(())
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(30);

    /// Says how it ended when it is dropped.
    struct Told(std::sync::mpsc::Sender<bool>);

    impl Drop for Told {
        fn drop(&mut self) {
            let _ = self.0.send(is_given_up());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_whose_body_gives_and_is_not_asked_again_is_given_up() {
        let (told, given_up) = std::sync::mpsc::channel();
        let told = Told(told);
        let mut gave = false;
        let call = poll_fn(move |_| {
            let _ = &told;
            if !std::mem::replace(&mut gave, true) {
                asked(&Poll::Ready(()));
            }
            Poll::<()>::Pending
        });
        let begun = Instant::now();
        Read::new(call, PATIENCE).await;
        assert_eq!(begun.elapsed().as_secs(), PATIENCE.as_secs());
        assert_eq!(given_up.try_recv(), Ok(true));
        assert!(!is_given_up());
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_that_waits_for_its_handler_is_left_to_the_deadline() {
        let mut timer = Box::pin(sleep_until(Instant::now() + 100 * PATIENCE));
        let call = poll_fn(move |cx| {
            let ready = timer.as_mut().poll(cx);
            asked(&Poll::Ready(()));
            asked(&ready);
            ready
        });
        let begun = Instant::now();
        Read::new(call, PATIENCE).await;
        assert_eq!(begun.elapsed().as_secs(), 100 * PATIENCE.as_secs());
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_reader_who_goes_on_reading_is_served() {
        let mut left = 10;
        let mut timer = Box::pin(sleep_until(Instant::now() + PATIENCE / 2));
        let call = poll_fn(move |cx| {
            while timer.as_mut().poll(cx).is_ready() {
                timer.as_mut().reset(Instant::now() + PATIENCE / 2);
                asked(&Poll::Ready(()));
                left -= 1;
                if left == 0 {
                    return Poll::Ready(());
                }
            }
            Poll::Pending
        });
        let begun = Instant::now();
        Read::new(call, PATIENCE).await;
        assert_eq!(begun.elapsed().as_secs(), 5 * PATIENCE.as_secs());
    }
}
