//! `hapa dev`: a whole HAPA in the foreground for development: an engine, the mesh (`hapa all`) and the gateway.
//!
//! Invariants: a component that exits stops the others; every wait has a timeout; no child outlives this process. If
//! this process is killed, the kernel signals the children (PR_SET_PDEATHSIG).

mod engine;
mod http;
mod ports;
mod supervisor;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anstyle::Style;
use anyhow::{Context as _, anyhow, bail, ensure};
use hapa_server::file_descriptors;
use tokio::process::Command;
use tokio::time::timeout;

use self::engine::Engine;
use self::supervisor::{Component, Supervisor};
use crate::cli::CliError;
use crate::cli::serve::ShutdownSignals;

/// Maximum time for a command that ends by itself, such as `hapa key create`.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(30);

const BOLD: Style = Style::new().bold();

#[derive(clap::Args, Clone, Debug)]
#[command(after_help = "Examples:\n  \
    hapa dev\n  \
    hapa dev --engine http://gpu-box:8000/v1\n  \
    PORT=50052 METRICS_PORT=9465 GATEWAY_PORT=8001 hapa dev --engine sim")]
pub(super) struct DevArgs {
    /// Engine: `model` (SmolLM2-135M on this machine), `sim` (the engine simulator, without a model) or the
    /// base URL of an OpenAI-compatible server. Default: AI_MODEL_ENDPOINT if set, else model.
    #[arg(long, value_name = "model|sim|URL")]
    engine: Option<Engine>,
    /// Base URL of the engine; --engine takes precedence.
    #[arg(long, env = "AI_MODEL_ENDPOINT", value_name = "URL")]
    ai_model_endpoint: Option<String>,
    /// Port of the engine that this command starts.
    #[arg(long, env = "MODEL_PORT", default_value_t = 8002)]
    model_port: u16,
    /// gRPC port of the mesh.
    #[arg(long, env = "PORT", default_value_t = 50051)]
    port: u16,
    /// HTTP port of /metrics, /livez and /readyz of the mesh.
    #[arg(long, env = "METRICS_PORT", default_value_t = 9464)]
    metrics_port: u16,
    /// Port of the gateway: gRPC, gRPC-Web and JSON.
    #[arg(long, env = "GATEWAY_PORT", default_value_t = 8000)]
    gateway_port: u16,
    /// Port of Envoy's admin interface.
    #[arg(long, env = "ENVOY_ADMIN_PORT", default_value_t = 9901)]
    envoy_admin_port: u16,
    /// Directory of the stores, the development key (dev-key) and the logs (log/).
    #[arg(long, env = "DATA_DIR", default_value = "data")]
    data_dir: PathBuf,
    /// Root of the repository, with .tools/ and infra/.
    #[arg(long, value_name = "DIR", default_value = ".")]
    repository: PathBuf,
}

/// Runs until Ctrl-C or until a component exits, then stops all components. A second signal kills them.
pub(super) async fn dev(args: DevArgs) -> Result<(), CliError> {
    let mut signals = ShutdownSignals::new(true)?;
    file_descriptors::raise_limit(); // the children inherit the limit
    let mut supervisor = Supervisor::new(args.data_dir.join("log"))?;
    let result = tokio::select! {
        result = run(&args, &mut supervisor) => result,
        () = signals.next() => Ok(()),
    };
    tokio::select! {
        () = supervisor.stop_all() => Ok(result?),
        () = signals.next() => {
            supervisor.kill_all();
            Err(anyhow!("a second signal killed the components before they stopped").into())
        }
    }
}

/// Starts the components in the order of their dependencies; returns when one of them exits.
async fn run(args: &DevArgs, supervisor: &mut Supervisor) -> anyhow::Result<()> {
    let engine = args.engine.clone().or_else(|| {
        let url = args.ai_model_endpoint.clone().filter(|url| !url.is_empty());
        url.map(Engine::Url)
    });
    let engine = engine.unwrap_or(Engine::Model);
    let hapa = std::env::current_exe().context("cannot find the path of this binary")?;
    let envoy = args.repository.join(".tools/bin/envoy");
    require_file(&envoy, "infra/tools/install run")?;
    args.check_ports(&engine)?;

    let endpoint = start_engine(args, &engine, supervisor).await?;
    start_mesh(args, &hapa, &endpoint, supervisor).await?;
    let key = development_key(args, &hapa).await?;
    start_gateway(args, &hapa, &envoy, &key, supervisor).await?;

    let (url, file) = (format!("http://127.0.0.1:{}", args.gateway_port), args.key_file());
    writeln!(
        anstream::stdout(),
        "{BOLD}HAPA is ready at {url} with x-api-key: {key}{BOLD:#} (in {}; Ctrl-C stops it)",
        file.display()
    )?;
    Err(supervisor.wait_for_exit().await)
}

/// Starts the engine unless it is an URL; returns its base URL.
async fn start_engine(
    args: &DevArgs,
    engine: &Engine,
    supervisor: &mut Supervisor,
) -> anyhow::Result<String> {
    let port = args.model_port;
    let command = match engine {
        Engine::Url(url) => {
            writeln!(anstream::stdout(), "model: {url}")?;
            return Ok(url.clone());
        }
        Engine::Model => engine::model_command(&args.repository, port)?,
        Engine::Sim => engine::simulator_command(port)?,
    };
    let name = engine.description();
    writeln!(
        anstream::stdout(),
        "model: starting {name} on port {port} (--engine or AI_MODEL_ENDPOINT selects another engine)"
    )?;
    supervisor.start(Component::Model, &command)?;
    let is_ready = async || http::is_success(port, "/health", None).await;
    supervisor.wait_until_ready(Component::Model, is_ready).await?;
    Ok(format!("http://127.0.0.1:{port}/v1"))
}

async fn start_mesh(
    args: &DevArgs,
    hapa: &Path,
    endpoint: &str,
    supervisor: &mut Supervisor,
) -> anyhow::Result<()> {
    let mut command = Command::new(hapa);
    command.arg("all").env("AI_MODEL_ENDPOINT", endpoint).env("DATA_DIR", &args.data_dir);
    command.env("PORT", args.port.to_string());
    command.env("METRICS_PORT", args.metrics_port.to_string());
    supervisor.start(Component::Mesh, &command)?;
    let is_ready = async || http::is_success(args.metrics_port, "/readyz", None).await;
    supervisor.wait_until_ready(Component::Mesh, is_ready).await
}

/// Returns the development key. A missing or refused key is replaced by a new one.
async fn development_key(args: &DevArgs, hapa: &Path) -> anyhow::Result<String> {
    let file = args.key_file();
    let command = || {
        let mut command = Command::new(hapa);
        command.env("DATA_DIR", &args.data_dir);
        command.env("HAPA_ADDRESS", format!("http://127.0.0.1:{}", args.port));
        command
    };
    let mut check = command();
    check.args(["key", "check", "--file"]).arg(&file);
    if run_to_end(check).await.is_err() {
        let mut create = command();
        create.args(["key", "create", "--name", "dev", "--owner", "dev", "--all-scopes"]);
        create.args(["--unlimited", "--never-expires", "--out"]).arg(&file);
        run_to_end(create).await.context("cannot create the development key")?;
    }
    let key = std::fs::read_to_string(&file);
    let key = key.with_context(|| format!("cannot read the development key {}", file.display()))?;
    Ok(key.trim().to_owned())
}

async fn start_gateway(
    args: &DevArgs,
    hapa: &Path,
    envoy: &Path,
    key: &str,
    supervisor: &mut Supervisor,
) -> anyhow::Result<()> {
    let folder = args.data_dir.join("gateway");
    let mut write = Command::new(hapa);
    write.arg("gateway").arg("--out").arg(&folder).env("DATA_DIR", &args.data_dir);
    write.env("PORT", args.port.to_string());
    write.env("GATEWAY_PORT", args.gateway_port.to_string());
    write.env("ENVOY_ADMIN_PORT", args.envoy_admin_port.to_string());
    run_to_end(write).await.context("cannot write the gateway's configuration")?;
    let mut command = Command::new(envoy);
    command.arg("-c").arg(folder.join("envoy.yaml"));
    command.args(["--disable-hot-restart", "--concurrency", "2", "--log-level", "warning"]);
    command.args(["--file-flush-interval-msec", "1000"]);
    supervisor.start(Component::Gateway, &command)?;
    let is_ready =
        async || http::is_success(args.gateway_port, "/api/v1/code/health", Some(key)).await;
    supervisor.wait_until_ready(Component::Gateway, is_ready).await
}

/// Runs a command to its end; the error holds its standard error.
async fn run_to_end(mut command: Command) -> anyhow::Result<()> {
    let output = timeout(COMMAND_TIMEOUT, command.kill_on_drop(true).output()).await;
    let output =
        output.with_context(|| format!("no end within {} s", COMMAND_TIMEOUT.as_secs()))?;
    let output = output.context("cannot run this binary")?;
    if !output.status.success() {
        bail!("{}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

impl DevArgs {
    fn key_file(&self) -> PathBuf {
        self.data_dir.join("dev-key")
    }

    /// Fails if a port is in use; the error names its holder and its setting.
    fn check_ports(&self, engine: &Engine) -> anyhow::Result<()> {
        ports::check(self.gateway_port, "GATEWAY_PORT")?;
        ports::check(self.port, "PORT")?;
        ports::check(self.metrics_port, "METRICS_PORT")?;
        ports::check(self.envoy_admin_port, "ENVOY_ADMIN_PORT")?;
        match engine {
            Engine::Url(_) => Ok(()),
            Engine::Model | Engine::Sim => ports::check(self.model_port, "MODEL_PORT"),
        }
    }
}

/// Fails if a file of the development set-up is missing; the error names the command that creates it.
fn require_file(file: &Path, command: &str) -> anyhow::Result<()> {
    ensure!(file.exists(), "{} is missing; run `{command}`", file.display());
    Ok(())
}
