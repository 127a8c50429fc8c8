//! The engine simulator: an engine with the HTTP interface of vLLM 0.32 that plays scripts and fails on demand.
//!
//! Invariants: the simulator controls every byte and every close on the wire, so that a test never sleeps
//! to produce a failure. It reads from the client at all times, so that it records an [`Abort`] when the
//! socket closes, even if it is sending nothing. HTTP/1.1 is written by hand for this reason: a server
//! library would control framing, flushes and closes.

pub mod demo;
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
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use std::{fmt, io};

use ledger::Ledger;
pub use ledger::{Abort, Counts, Recorded};
pub use script::{Fault, LineEnd, Script};
use serde_json::Value;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{Semaphore, oneshot, watch};
use tokio::task::JoinSet;

/// Time after which a `wait_…` function fails the test.
const WAIT_TIMEOUT: Duration = Duration::from_mins(1);

/// The models of an engine. [`Engine::start`] uses the default.
#[derive(Clone, Debug)]
pub struct Setup {
    /// The base model's name.
    pub model: String,
    /// The adapters of the base model. Each is a model name.
    pub adapters: Vec<String>,
    /// The context length in tokens, for prompt and answer together. A prompt has one token per four
    /// characters.
    pub max_model_len: usize,
    /// If set, `/v1` answers 401 to every request without this bearer token.
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

/// The port stays reserved between `stop` and `resume`: a socket that is bound and does not listen
/// refuses connections, and no other process can bind the port.
#[derive(Debug)]
enum Port {
    Serving { accepting: JoinSet<()>, stop: oneshot::Sender<()> },
    Refusing(TcpSocket),
    Changing,
}

/// The state that all connections of one engine share.
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
    responder: Option<Responder>,
}

/// Chooses a script by the body of the request.
struct Responder(Box<dyn Fn(&Value) -> Script + Send + Sync>);

impl fmt::Debug for Responder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Responder")
    }
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

    /// Serves this setup on a listener.
    ///
    /// # Panics
    ///
    /// If the listener has no address.
    pub fn start_on(listener: TcpListener, setup: Setup) -> Self {
        let address = listener.local_addr().expect("a bound listener");
        let shared = Arc::new(Shared {
            adapters: Mutex::new(setup.adapters.clone()),
            frozen: watch::Sender::new(false),
            setup,
            ledger: Ledger::default(),
            scripts: Mutex::new(Scripts {
                default: Script::default(),
                once: VecDeque::new(),
                responder: None,
            }),
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

    /// Closes every connection (streams count as `cut`) and refuses new ones.
    pub async fn stop(&self) {
        let before = std::mem::replace(&mut *lock(&self.port), Port::Changing);
        let after = match before {
            Port::Serving { mut accepting, stop } => {
                // The second bind comes before the close, so that no other process can take the port.
                let kept = reserve(self.address).expect("the reserved port");
                let _ = stop.send(());
                while accepting.join_next().await.is_some() {}
                Port::Refusing(kept)
            }
            other => other,
        };
        *lock(&self.port) = after;
    }

    /// Serves again on the same port, with its scripts and counts.
    pub fn resume(&self) {
        let mut port = lock(&self.port);
        *port = match std::mem::replace(&mut *port, Port::Changing) {
            Port::Refusing(socket) => {
                let listener = socket.listen(1024).expect("the reserved port");
                serve_on(listener, Arc::clone(&self.shared))
            }
            other => other,
        };
    }

    /// Answers every later request with this script, unless one of [`Engine::once`] is queued.
    pub fn script(&self, script: impl Into<Script>) {
        lock(&self.shared.scripts).default = script.into();
    }

    /// Chooses the script of every later request by its body, unless one of [`Engine::once`] is queued.
    pub fn respond_with(&self, responder: impl Fn(&Value) -> Script + Send + Sync + 'static) {
        lock(&self.shared.scripts).responder = Some(Responder(Box::new(responder)));
    }

    /// Answers one request with this script; several calls queue in order. Requests that are
    /// refused with 400, 401 or 404 consume none.
    pub fn once(&self, script: impl Into<Script>) {
        lock(&self.shared.scripts).once.push_back(script.into());
    }

    /// Freezes the engine: it accepts and closes no connections, and writes nothing.
    pub fn freeze(&self) {
        self.shared.frozen.send_replace(true);
    }

    /// Continues after [`Engine::freeze`].
    pub fn thaw(&self) {
        self.shared.frozen.send_replace(false);
    }

    /// Loads an adapter, as `/v1/load_lora_adapter` does.
    pub fn add_adapter(&self, name: &str) {
        lock(&self.shared.adapters).push(name.to_owned());
    }

    /// Unloads an adapter; its active requests continue.
    pub fn remove_adapter(&self, name: &str) {
        lock(&self.shared.adapters).retain(|own| own != name);
    }

    /// Releases one stream at a [`Script::hold`]: the one that waits longest, or else the next
    /// to arrive.
    pub fn release(&self) {
        self.shared.gate.add_permits(1);
    }

    /// The latest generation requests (at most 4,096), in the order of their arrival.
    pub fn requests(&self) -> Vec<Recorded> {
        self.shared.ledger.requests()
    }

    /// The present counts. Except for `tokens_sent` they may lag behind the client's view: wait for
    /// them instead of comparing them at once.
    pub fn counts(&self) -> Counts {
        self.shared.ledger.counts()
    }

    /// The number of generations that are being answered.
    pub fn in_flight(&self) -> u64 {
        self.counts().in_flight()
    }

    /// Every generation that its client aborted, in the order of detection.
    pub fn aborts(&self) -> Vec<Abort> {
        self.shared.ledger.aborts()
    }

    /// Waits until `n` generation requests have arrived.
    pub async fn wait_for_started(&self, n: u64) -> Counts {
        self.wait_until(|counts| counts.started >= n).await
    }

    /// Waits until `n` generations were aborted; returns the time at which the n-th was detected.
    pub async fn wait_for_aborted(&self, n: u64) -> Instant {
        self.wait_until(|counts| counts.aborted >= n).await;
        let index = usize::try_from(n.saturating_sub(1)).expect("a small number");
        self.aborts()[index].noticed_at
    }

    /// Waits until the counts satisfy `wanted`. Panics with the counts after a minute.
    pub async fn wait_until(&self, wanted: impl Fn(Counts) -> bool) -> Counts {
        let met = self.shared.ledger.wait_until(wanted);
        tokio::time::timeout(WAIT_TIMEOUT, met).await.unwrap_or_else(|_| {
            panic!("the engine did not reach the counts in {WAIT_TIMEOUT:?}: {:?}", self.counts())
        })
    }
}

impl Shared {
    fn next_script(&self, body: &Value) -> Script {
        let mut scripts = lock(&self.scripts);
        if let Some(script) = scripts.once.pop_front() {
            return script;
        }
        let responder = scripts.responder.as_ref();
        responder.map_or_else(|| scripts.default.clone(), |responder| (responder.0)(body))
    }

    fn serves(&self, model: &str) -> bool {
        model == self.setup.model || lock(&self.adapters).iter().any(|own| own == model)
    }

    /// Waits while the engine is frozen.
    async fn wait_while_frozen(&self) {
        let mut frozen = self.frozen.subscribe();
        let _ = frozen.wait_for(|frozen| !frozen).await;
    }

    fn next_serial(&self) -> u64 {
        self.serial.fetch_add(1, Ordering::Relaxed)
    }

    /// Consumes one release, and waits for it if there is none.
    async fn wait_for_release(&self) {
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
                // Most likely the process has no file descriptors left; other connections will close some.
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
    shared.wait_while_frozen().await;
    listener.accept().await
}

/// A bound socket with a port that this process may bind a second time. SO_REUSEPORT is set after a free port
/// is chosen: with it the kernel may choose the port of another engine.
fn reserve(address: SocketAddr) -> io::Result<TcpSocket> {
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    socket.set_reuseport(address.port() != 0)?;
    socket.bind(address)?;
    socket.set_reuseport(true)?;
    Ok(socket)
}

/// A panic of a test's predicate must not cause a second panic here.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
