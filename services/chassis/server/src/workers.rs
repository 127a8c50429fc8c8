//! The threads that serve connections. Each has a runtime of its own, so that a call and its connections stay on one
//! thread. To hand work to another thread costs more than the work for a token.
//!
//! Background work, such as the stores' and the outbox', runs on the runtime that started the server.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use hapa_telemetry::scheduler_lag;
use tokio::runtime::{Builder, Handle};
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;
use tracing::dispatcher::{self, Dispatch, get_default};
use tracing::subscriber::NoSubscriber;

/// Maximum number of threads for blocking work of each worker.
const MAX_BLOCKING_THREADS: usize = 64;
/// Maximum time for blocking work at the end of a worker.
const BLOCKING_TIMEOUT: Duration = Duration::from_secs(1);

/// The workers of a server. They end when this is dropped; what still runs on them is dropped then.
#[derive(Debug)]
pub(crate) struct Workers {
    workers: Vec<Worker>,
    _end: DropGuard,
}

#[derive(Debug)]
struct Worker {
    runtime: Handle,
    /// Connections in progress.
    connections: Arc<AtomicUsize>,
}

/// Counts a connection until it is dropped.
struct ConnectionCount(Arc<AtomicUsize>);

impl Drop for ConnectionCount {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Workers {
    /// Starts `count` workers.
    pub(crate) fn start(count: usize) -> io::Result<Workers> {
        let end = CancellationToken::new();
        let start = |number| Worker::start(number, end.clone());
        let workers = (0..count.max(1)).map(start).collect::<io::Result<_>>()?;
        Ok(Workers { workers, _end: end.drop_guard() })
    }

    /// Runs a connection on the worker with the fewest connections.
    pub(crate) fn spawn(
        &self,
        tasks: &TaskTracker,
        connection: impl Future<Output = ()> + Send + 'static,
    ) {
        let open = |worker: &&Worker| worker.connections.load(Ordering::Relaxed);
        let Some(worker) = self.workers.iter().min_by_key(open) else { return };
        worker.connections.fetch_add(1, Ordering::Relaxed);
        let count = ConnectionCount(Arc::clone(&worker.connections));
        let counted = async move {
            connection.await;
            drop(count);
        };
        tasks.spawn_on(counted, &worker.runtime);
    }
}

impl Worker {
    fn start(number: usize, end: CancellationToken) -> io::Result<Worker> {
        let runtime = Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(MAX_BLOCKING_THREADS)
            .build()?;
        let handle = runtime.handle().clone();
        let subscriber = get_default(Dispatch::clone);
        thread::Builder::new().name(format!("worker-{number}")).spawn(move || {
            // Without a subscriber of the process, the worker logs to that of the thread that starts it. One for a
            // thread makes the log calls of all threads slower.
            let is_unset = get_default(Dispatch::is::<NoSubscriber>);
            let _subscriber = is_unset.then(|| dispatcher::set_default(&subscriber));
            runtime.block_on(async {
                tokio::select! {
                    () = end.cancelled() => {}
                    () = scheduler_lag::measure() => {}
                }
            });
            runtime.shutdown_timeout(BLOCKING_TIMEOUT);
        })?;
        Ok(Worker { runtime: handle, connections: Arc::default() })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::future::pending;

    use tokio::sync::mpsc;

    use super::*;

    #[tokio::test]
    async fn connections_are_spread_by_load_and_end_with_the_workers() {
        let workers = Workers::start(3).unwrap();
        let (tasks, ends) = (TaskTracker::new(), CancellationToken::new());
        let (sender, mut threads) = mpsc::unbounded_channel();
        for number in 0..9 {
            let (sender, ends) = (sender.clone(), ends.clone());
            workers.spawn(&tasks, async move {
                sender.send(thread::current().id()).unwrap();
                if number < 6 { ends.cancelled().await } else { pending().await }
            });
        }
        let mut counts = HashMap::new();
        for _ in 0..9 {
            *counts.entry(threads.recv().await.unwrap()).or_insert(0) += 1;
        }
        assert_eq!(counts.into_values().collect::<Vec<_>>(), [3, 3, 3]);
        ends.cancel();
        drop(workers);
        tasks.close();
        tasks.wait().await;
    }
}
