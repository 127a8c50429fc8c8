//! The end of a log in a store, for who tells others what is added to it, by whichever replica: one task
//! looks, and all who watch wait for its looks.
//!
//! Kept true: who waits learns when nobody could look for too long. Nobody knows then that nothing was
//! added.

use std::fmt::Display;
use std::time::Duration;

use hapa_core::rpc_error::{ErrorCode, Fault};
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// How often a log is looked at for what other replicas wrote.
const LOOK: Duration = Duration::from_millis(200);
/// How long who waits believes that somebody looks.
const BLIND: Duration = Duration::from_secs(3);

/// What has rising numbers.
pub trait Log: Send + Sync + 'static {
    /// Why it can't be read.
    type Error: Display + Send;

    /// The number of what was added last.
    fn last(&self) -> impl Future<Output = Result<i64, Self::Error>> + Send;

    /// Ends when this process has added something.
    fn added(&self) -> impl Future<Output = ()> + Send;
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Tail {
    last: watch::Receiver<i64>,
    closing: CancellationToken,
}

/// Why nobody is told any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Over {
    /// The server ends.
    #[error("this replica is going; ask another, from where you are")]
    Closing,
    /// Nobody could look for too long.
    #[error("the store can't be read at the moment; try again, from where you are")]
    Blind,
}

impl Tail {
    /// With the task that looks, which runs for as long as the server does.
    pub fn of(
        log: impl Log,
        closing: CancellationToken,
    ) -> (Tail, impl Future<Output = ()> + Send + 'static) {
        let (told, last) = watch::channel(0);
        (Tail { last, closing }, look(log, told))
    }

    /// The last number, as of the last look.
    pub fn last(&mut self) -> i64 {
        *self.last.borrow_and_update()
    }

    /// Fails when the server ends.
    pub fn goes_on(&self) -> Result<(), Over> {
        if self.closing.is_cancelled() { Err(Over::Closing) } else { Ok(()) }
    }

    /// Waits for the next look, also one that finds nothing. Can be dropped and called again.
    pub async fn look(&mut self) -> Result<(), Over> {
        tokio::select! {
            () = self.closing.cancelled() => Err(Over::Closing),
            looked = timeout(BLIND, self.last.changed()) => match looked {
                Ok(Ok(())) => Ok(()),
                Ok(Err(_)) => Err(Over::Closing),
                Err(_) => Err(Over::Blind),
            },
        }
    }
}

async fn look(log: impl Log, told: watch::Sender<i64>) {
    loop {
        match log.last().await {
            // Told also when nothing was added: it says that somebody looked.
            Ok(last) => drop(told.send_replace(last)),
            Err(error) => tracing::debug!(%error, "a log can't be read at the moment"),
        }
        let _ = timeout(LOOK, log.added()).await;
    }
}

impl From<Over> for Fault {
    fn from(over: Over) -> Fault {
        let code = match over {
            Over::Closing => ErrorCode::ShuttingDown,
            Over::Blind => ErrorCode::DatabaseError,
        };
        Fault::new(code, over.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One that nobody can read.
    struct Torn;

    impl Log for Torn {
        type Error = &'static str;

        async fn last(&self) -> Result<i64, &'static str> {
            Err("torn")
        }

        async fn added(&self) {
            std::future::pending::<()>().await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_learns_that_nobody_can_look_and_that_the_server_ends() {
        let closing = CancellationToken::new();
        let (mut tail, looking) = Tail::of(Torn, closing.clone());
        let looking = async {
            looking.await;
            unreachable!("it looks for ever")
        };
        let waiting = async {
            assert_eq!(tail.look().await, Err(Over::Blind));
            closing.cancel();
            assert_eq!(tail.look().await, Err(Over::Closing));
            assert_eq!(tail.goes_on(), Err(Over::Closing));
        };
        tokio::select! {
            () = looking => {}
            () = waiting => {}
        }
    }
}
