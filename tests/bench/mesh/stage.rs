//! The measured processes: the engine, `hapa all`, and the gateway as users run it. They use loopback only.
//!
//! Invariant: the processes end with this one, however it ends.

use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use secrecy::SecretString;
use tempfile::TempDir;
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep, timeout};

use crate::Binaries;
use crate::engine::Engine;
use crate::http::{Ask, Connection};

/// Maximum time until a process is ready.
const WAIT_TIMEOUT: Duration = Duration::from_secs(20);
const TRIES: usize = 3;
/// The highest limit that a key can have: it never refuses here, and is counted all the same.
const LIMIT: &str = "*=1000000/60";

/// The running processes.
pub(crate) struct Stage {
    pub(crate) engine: Engine,
    pub(crate) hapa: ChildProcess,
    pub(crate) gateway: ChildProcess,
    pub(crate) key: String,
    pub(crate) mesh_token: SecretString,
    _folder: TempDir,
}

/// One process and the port it serves.
pub(crate) struct ChildProcess {
    child: Child,
    port: u16,
}

impl ChildProcess {
    pub(crate) fn pid(&self) -> anyhow::Result<u32> {
        self.child.id().context("a process ended early")
    }

    pub(crate) fn address(&self) -> SocketAddr {
        loopback(self.port)
    }
}

impl Stage {
    /// Starts all processes, which export spans if there is a collector. Another process may bind a port
    /// between its choice and its use; then all processes are started again.
    pub(crate) async fn start(
        binaries: &Binaries,
        collector: Option<&str>,
    ) -> anyhow::Result<Self> {
        let mut failure = None;
        for _ in 0..TRIES {
            match Self::try_start(binaries, collector).await {
                Ok(stage) => return Ok(stage),
                Err(error) => failure = Some(error),
            }
        }
        failure.map_or_else(|| bail!("nothing was tried"), Err)
    }

    async fn try_start(binaries: &Binaries, collector: Option<&str>) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let engine = Engine::start().await?;
        let (mut hapa, metrics) = start_hapa(binaries, folder.path(), engine.port, collector)?;
        ready(&mut hapa, loopback(metrics), &Ask::get("/readyz", "")).await.context("hapa")?;
        let key = make_key(binaries, folder.path(), hapa.port).await?;
        let mesh_token = fs::read_to_string(folder.path().join("data/mesh-token"))?;
        let mesh_token = SecretString::from(mesh_token.trim());
        let mut gateway = start_gateway(binaries, folder.path(), hapa.port).await?;
        let address = gateway.address();
        let health = Ask::get("/api/v1/code/health", &key);
        ready(&mut gateway, address, &health).await.context("the gateway")?;
        Ok(Stage { engine, hapa, gateway, key, mesh_token, _folder: folder })
    }
}

fn start_hapa(
    binaries: &Binaries,
    folder: &Path,
    engine: u16,
    collector: Option<&str>,
) -> anyhow::Result<(ChildProcess, u16)> {
    let [port, metrics] = free_ports()?;
    let child = tied(&binaries.hapa)
        .arg("all")
        // Settings of the surrounding shell must not change the measured processes.
        .env_clear()
        .env("DATA_DIR", folder.join("data"))
        .env("PORT", port.to_string())
        .env("METRICS_PORT", metrics.to_string())
        .env("AI_MODEL_ENDPOINT", format!("http://{}/v1", loopback(engine)))
        .env("LOG_LEVEL", "info")
        .envs(collector.map(|url| ("OTEL_EXPORTER_OTLP_ENDPOINT", url)))
        .stdout(Stdio::null())
        .stderr(File::create(folder.join("hapa.log"))?)
        .spawn()
        .with_context(|| format!("starting {}", binaries.hapa.display()))?;
    Ok((ChildProcess { child, port }, metrics))
}

async fn make_key(binaries: &Binaries, folder: &Path, port: u16) -> anyhow::Result<String> {
    let file = folder.join("key");
    let words = ["key", "create", "--name=bench", "--owner=bench", "--all-scopes"];
    let mut command = tied(&binaries.hapa);
    command.args(words).args(["--never-expires", "--limit", LIMIT, "--out"]).arg(&file);
    command.env_clear().env("DATA_DIR", folder.join("data"));
    command.env("HAPA_ADDRESS", format!("http://{}", loopback(port)));
    run(command).await?;
    Ok(fs::read_to_string(file)?.trim().to_owned())
}

async fn start_gateway(
    binaries: &Binaries,
    folder: &Path,
    hapa: u16,
) -> anyhow::Result<ChildProcess> {
    let [port, admin] = free_ports()?;
    let out = folder.join("gateway");
    let mut command = tied(&binaries.hapa);
    command.arg("gateway").arg("--out").arg(&out).env_clear();
    command.env("PORT", hapa.to_string()).env("GATEWAY_PORT", port.to_string());
    command.env("ENVOY_ADMIN_PORT", admin.to_string());
    run(command).await?;
    start_envoy(binaries, &out.join("envoy.yaml"), port)
}

/// As `make run` starts it.
fn start_envoy(binaries: &Binaries, config: &Path, port: u16) -> anyhow::Result<ChildProcess> {
    let log = File::create(config.with_extension("log"))?;
    let child = tied(&binaries.envoy)
        .arg("-c")
        .arg(config)
        .args(["--disable-hot-restart", "--concurrency", "2", "--log-level", "warning"])
        .args(["--file-flush-interval-msec", "1000"])
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("starting {}", binaries.envoy.display()))?;
    Ok(ChildProcess { child, port })
}

/// A command that the kernel kills when this process ends. A terminal's Ctrl-C does not reach it,
/// because that would end it in the middle of a measurement.
pub(crate) fn tied(program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program);
    command.stdin(Stdio::null()).kill_on_drop(true).process_group(0);
    command
}

async fn run(mut command: Command) -> anyhow::Result<()> {
    let done = timeout(WAIT_TIMEOUT, command.stdout(Stdio::null()).output()).await??;
    ensure!(done.status.success(), "{:?}: {}", command, String::from_utf8_lossy(&done.stderr));
    Ok(())
}

async fn ready(part: &mut ChildProcess, address: SocketAddr, ask: &Ask) -> anyhow::Result<()> {
    let from = Instant::now();
    loop {
        if let Some(status) = part.child.try_wait()? {
            bail!("it ended by itself: {status}");
        }
        let asked = async { Connection::open(address).await?.ask(ask).await };
        match timeout(Duration::from_secs(2), asked).await {
            Ok(Ok(200)) => return Ok(()),
            _ if from.elapsed() > WAIT_TIMEOUT => bail!("it was not ready in {WAIT_TIMEOUT:?}"),
            _ => sleep(Duration::from_millis(20)).await,
        }
    }
}

/// Free ports. All are bound at the same time, so that they differ, and then released.
fn free_ports<const N: usize>() -> anyhow::Result<[u16; N]> {
    let mut listeners = Vec::new();
    let mut ports = [0; N];
    for port in &mut ports {
        let listener = TcpListener::bind(loopback(0))?;
        *port = listener.local_addr()?.port();
        listeners.push(listener);
    }
    Ok(ports)
}

pub(crate) fn loopback(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

/// A path of the repository.
pub(crate) fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(path)
}
