//! An engine that speaks HTTP like vLLM 0.32, says what a script tells it to and fails on demand.
//!
//! Kept true: the simulator decides every byte and every close on the wire, so a test never sleeps
//! to make a failure happen; and it watches the client at all times, so an [`Abort`] is noticed the
//! moment the socket closes, also while nothing is being sent. HTTP/1.1 is written by hand for that
//! reason: a server library owns the framing, the flushes and the end of a connection.

mod http;
mod ledger;
mod play;
mod request;
mod script;
mod serve;
mod shapes;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ledger::Ledger;
pub use ledger::{Abort, Counts, Recorded};
pub use script::{Fault, LineEnd, Script};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{Semaphore, oneshot, watch};
use tokio::task::JoinSet;

/// How long a `wait_…` waits before it fails the test.
const PATIENCE: Duration = Duration::from_mins(1);

/// What an engine serves; `Setup::default()` is what [`Engine::start`] uses.
#[derive(Clone, Debug)]
pub struct Setup {
    /// The base model's name.
    pub model: String,
    /// The adapters on it, each a model name of its own.
    pub adapters: Vec<String>,
    /// The context in tokens, prompt and answer together; a prompt counts one token per four
    /// characters.
    pub max_model_len: usize,
    /// When set, `/v1` answers 401 to everyone without this bearer token.
    pub api_key: Option<String>,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            model: "sim-coder".into(),
            adapters: ["autocomplete", "prompt", "comment", "error-fix"].map(Into::into).into(),
            max_model_len: 32_768,
            api_key: None,
        }
    }
}

/// A running engine. Dropping it frees the port and closes every connection.
#[derive(Debug)]
pub struct Engine {
    address: SocketAddr,
    url: String,
    shared: Arc<Shared>,
    port: Mutex<Port>,
}

/// The port stays ours between `stop` and `resume`: a socket that is bound but does not listen
/// refuses connections and keeps anyone else from taking the number.
#[derive(Debug)]
enum Port {
    Serving { accepting: JoinSet<()>, stop: oneshot::Sender<()> },
    Refusing(TcpSocket),
    Changing,
}

/// What all connections of one engine share.
#[derive(Debug)]
struct Shared {
    setup: Setup,
    ledger: Ledger,
    scripts: Mutex<Scripts>,
    adapters: Mutex<Vec<String>>,
    frozen: watch::Sender<bool>,
    gate: Semaphore,
    serial: AtomicU64,
}

#[derive(Debug)]
struct Scripts {
    default: Script,
    once: VecDeque<Script>,
}

impl Engine {
    /// Starts an engine with the default [`Setup`] on a free loopback port.
    pub fn start() -> Self {
        Self::start_with(Setup::default())
    }

    /// Starts an engine with this setup on a free loopback port.
    pub fn start_with(setup: Setup) -> Self {
        let socket = reserve(([127, 0, 0, 1], 0).into()).expect("a free loopback port");
        Self::start_on(socket.listen(1024).expect("a free loopback port"), setup)
    }

    fn start_on(listener: TcpListener, setup: Setup) -> Self {
        let address = listener.local_addr().expect("a bound listener");
        let shared = Arc::new(Shared {
            adapters: Mutex::new(setup.adapters.clone()),
            frozen: watch::Sender::new(false),
            setup,
            ledger: Ledger::default(),
            scripts: Mutex::new(Scripts { default: Script::default(), once: VecDeque::new() }),
            gate: Semaphore::new(0),
            serial: AtomicU64::new(0),
        });
        let port = Mutex::new(serve_on(listener, Arc::clone(&shared)));
        Self { address, url: format!("http://{address}/v1"), shared, port }
    }

    /// The base URL that clients are configured with: `http://127.0.0.1:PORT/v1`.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The address it listens on, for requests outside `/v1`.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Goes down: every connection is closed (streams count as `cut`), new ones are refused.
    pub async fn stop(&self) {
        let before = std::mem::replace(&mut *lock(&self.port), Port::Changing);
        let after = match before {
            Port::Serving { mut accepting, stop } => {
                // Taken a second time before it is given up, so that nobody else gets the number.
                let kept = reserve(self.address).expect("the port that was ours");
                let _ = stop.send(());
                while accepting.join_next().await.is_some() {}
                Port::Refusing(kept)
            }
            other => other,
        };
        *lock(&self.port) = after;
    }

    /// Comes back on the same port, with its scripts and its counts.
    pub fn resume(&self) {
        let mut port = lock(&self.port);
        *port = match std::mem::replace(&mut *port, Port::Changing) {
            Port::Refusing(socket) => {
                let listener = socket.listen(1024).expect("the port that was ours");
                serve_on(listener, Arc::clone(&self.shared))
            }
            other => other,
        };
    }

    /// Answers every request from now on with this script, unless one set by [`Engine::once`] waits.
    pub fn script(&self, script: impl Into<Script>) {
        lock(&self.shared.scripts).default = script.into();
    }

    /// Answers one request with this script; several calls queue up in order. Requests that are
    /// refused for what they say (400, 401, 404) use up none.
    pub fn once(&self, script: impl Into<Script>) {
        lock(&self.shared.scripts).once.push_back(script.into());
    }

    /// Freezes: connections are neither accepted nor closed, and nothing is written any more.
    pub fn freeze(&self) {
        self.shared.frozen.send_replace(true);
    }

    /// Goes on where it froze.
    pub fn thaw(&self) {
        self.shared.frozen.send_replace(false);
    }

    /// Loads an adapter, as `/v1/load_lora_adapter` does.
    pub fn add_adapter(&self, name: &str) {
        lock(&self.shared.adapters).push(name.to_owned());
    }

    /// Unloads an adapter; its requests that run go on.
    pub fn remove_adapter(&self, name: &str) {
        lock(&self.shared.adapters).retain(|own| own != name);
    }

    /// Lets one stream through one [`Script::hold`]: the one that waits longest, or else the next
    /// to arrive.
    pub fn release(&self) {
        self.shared.gate.add_permits(1);
    }

    /// The latest generation requests (at most 4,096), in the order in which they arrived.
    pub fn requests(&self) -> Vec<Recorded> {
        self.shared.ledger.requests()
    }

    /// The counts as of now. They may trail what a client has seen by a moment, except for
    /// `tokens_sent`, which never does: wait for them instead of comparing at once.
    pub fn counts(&self) -> Counts {
        self.shared.ledger.counts()
    }

    /// How many generations are being answered.
    pub fn in_flight(&self) -> u64 {
        self.counts().in_flight()
    }

    /// Every generation whose client left before its end, in the order in which it was noticed.
    pub fn aborts(&self) -> Vec<Abort> {
        self.shared.ledger.aborts()
    }

    /// Waits until `n` generation requests have arrived.
    pub async fn wait_for_started(&self, n: u64) -> Counts {
        self.wait_until(|counts| counts.started >= n).await
    }

    /// Waits until `n` generations were aborted; returns when the n-th was noticed.
    pub async fn wait_for_aborted(&self, n: u64) -> Instant {
        self.wait_until(|counts| counts.aborted >= n).await;
        let index = usize::try_from(n.saturating_sub(1)).expect("a small number");
        self.aborts()[index].noticed_at
    }

    /// Waits until the counts satisfy `wanted`; panics after a minute, naming the counts.
    pub async fn wait_until(&self, wanted: impl Fn(Counts) -> bool) -> Counts {
        let met = self.shared.ledger.wait_until(wanted);
        tokio::time::timeout(PATIENCE, met).await.unwrap_or_else(|_| {
            panic!("the engine did not get there in {PATIENCE:?}: {:?}", self.counts())
        })
    }
}

impl Shared {
    fn next_script(&self) -> Script {
        let mut scripts = lock(&self.scripts);
        scripts.once.pop_front().unwrap_or_else(|| scripts.default.clone())
    }

    fn serves(&self, model: &str) -> bool {
        model == self.setup.model || lock(&self.adapters).iter().any(|own| own == model)
    }

    /// Waits while the engine is frozen.
    async fn pass_frost(&self) {
        let mut frozen = self.frozen.subscribe();
        let _ = frozen.wait_for(|frozen| !frozen).await;
    }

    fn next_serial(&self) -> u64 {
        self.serial.fetch_add(1, Ordering::Relaxed)
    }

    /// Takes one release, waiting for it if there is none yet.
    async fn pass_gate(&self) {
        if let Ok(permit) = self.gate.try_acquire() {
            return permit.forget();
        }
        let _held = self.ledger.hold();
        self.gate.acquire().await.expect("the gate is never closed").forget();
    }
}

fn serve_on(listener: TcpListener, shared: Arc<Shared>) -> Port {
    let (stop, stopped) = oneshot::channel();
    let mut accepting = JoinSet::new();
    accepting.spawn(accept(listener, shared, stopped));
    Port::Serving { accepting, stop }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>, mut stopped: oneshot::Receiver<()>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            biased;
            _ = &mut stopped => break,
            accepted = next_connection(&listener, &shared) => match accepted {
                Ok((stream, _)) => {
                    connections.spawn(serve::connection(stream, Arc::clone(&shared)));
                }
                // Out of file descriptors, most likely: give the others time to close theirs.
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            },
            Some(_) = connections.join_next() => {}
        }
    }
    drop(listener);
    connections.shutdown().await;
}

async fn next_connection(
    listener: &TcpListener,
    shared: &Shared,
) -> io::Result<(TcpStream, SocketAddr)> {
    shared.pass_frost().await;
    listener.accept().await
}

/// A bound socket whose number may be bound a second time, by us. A free number is chosen before
/// that is allowed: with it the kernel may choose one that another engine has.
fn reserve(address: SocketAddr) -> io::Result<TcpSocket> {
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    socket.set_reuseport(address.port() != 0)?;
    socket.bind(address)?;
    socket.set_reuseport(true)?;
    Ok(socket)
}

/// A panic of one test's predicate must not turn into a second panic here.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
