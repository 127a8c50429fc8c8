//! The processes of a round. They use free ports of loopback, and a folder that is emptied first.
//!
//! Invariant: the processes end with this one, however it ends.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};

use crate::compare::measure::{http, load};
use crate::compare::system::System;
use crate::compare::workload::FIRST_STREAMS;
use crate::process;
use crate::spec::{LoadShape, LoadSpec, SimSettings};

/// Maximum time until a system answers.
const READY_TIMEOUT: Duration = Duration::from_secs(40);
/// Time after the first streams, before memory is read.
const SETTLE_PERIOD: Duration = Duration::from_millis(500);
/// The highest limit that a key can have: it never refuses here, and is counted all the same.
const LIMIT: &str = "*=1000000/60";
/// Bounds of HAPA that its largest scale would exceed.
const SCALE_SETTINGS: [(&str, &str); 2] =
    [("MAX_IN_FLIGHT", "16384"), ("MAX_GENERATIONS", "16384")];
const PLAIN_ENVOY: &str = include_str!("plain-envoy.yaml");

/// The programs that are measured and that measure.
#[derive(Debug)]
pub(crate) struct Programs {
    /// The folder of build results.
    pub(crate) target: PathBuf,
    pub(crate) own: PathBuf,
    hapa: PathBuf,
    tools: PathBuf,
}

impl Programs {
    /// HAPA is beside this program, and its peers are where the tool installer puts them.
    pub(crate) fn find() -> anyhow::Result<Self> {
        let own = std::env::current_exe()?;
        let folder = own.parent().context("this program is in no folder")?;
        let target = folder.parent().context("no folder of build results")?.to_owned();
        let tools = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.tools/bin");
        Ok(Programs { hapa: folder.join("hapa"), target, tools, own })
    }

    fn tool(&self, name: &str) -> anyhow::Result<PathBuf> {
        let file = self.tools.join(name);
        ensure!(file.exists(), "not installed; run: infra/tools/install bench");
        Ok(file)
    }
}

/// A process that is killed when it is dropped.
#[derive(Debug)]
struct RunningProcess(Child);

impl Drop for RunningProcess {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A system that answers.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) system: System,
    port: u16,
    pids: Vec<u32>,
    key: Option<String>,
    /// Resident memory after the first streams.
    pub(crate) idle_bytes: u64,
}

impl Running {
    fn new(system: System, port: u16, pids: Vec<u32>, key: Option<String>) -> Self {
        Running { system, port, pids, key, idle_bytes: 0 }
    }
}

/// All processes of a round.
pub(crate) struct Stage<'a> {
    pub(crate) programs: &'a Programs,
    pub(crate) running: Vec<Running>,
    /// The systems that did not start, with the reasons.
    pub(crate) missing: BTreeMap<String, String>,
    pub(crate) upstream_port: u16,
    upstream_pid: u32,
    folder: PathBuf,
    processes: Vec<RunningProcess>,
    is_large: bool,
}

impl<'a> Stage<'a> {
    /// Starts the systems. `is_large` raises the bounds of HAPA for thousands of streams.
    pub(crate) fn start(
        programs: &'a Programs,
        folder: &Path,
        systems: &[System],
        is_large: bool,
    ) -> anyhow::Result<Self> {
        if folder.exists() {
            fs::remove_dir_all(folder)?;
        }
        fs::create_dir_all(folder)?;
        ensure!(programs.hapa.exists(), "{} is missing; run: make bench", programs.hapa.display());
        let [upstream_port] = free_ports()?;
        let mut stage = Stage {
            programs,
            running: Vec::new(),
            missing: BTreeMap::new(),
            upstream_port,
            upstream_pid: 0,
            folder: folder.to_owned(),
            processes: Vec::new(),
            is_large,
        };
        let mut upstream = tied(&programs.own);
        upstream.arg("upstream").arg(upstream_port.to_string());
        stage.upstream_pid = stage.spawn("upstream", upstream)?;
        for &system in systems {
            let before = stage.processes.len();
            if let Err(error) = stage.add(system) {
                ensure!(!matches!(system, System::Upstream | System::Hapa), error);
                stage.processes.truncate(before);
                stage.missing.insert(system.title().to_owned(), format!("{error:#}"));
            }
        }
        sleep(SETTLE_PERIOD);
        for running in &mut stage.running {
            running.idle_bytes = process::memory(&process::trees(&running.pids));
        }
        Ok(stage)
    }

    /// The load of a shape on a system.
    pub(crate) fn spec(&self, at: usize, shape: LoadShape) -> LoadSpec {
        let running = &self.running[at];
        LoadSpec {
            shape,
            protocol: running.system.protocol(),
            port: running.port,
            key: running.key.clone(),
            upstream_port: self.upstream_port,
            upstream_pid: self.upstream_pid,
            pids: running.pids.clone(),
        }
    }

    pub(crate) fn set_upstream(&self, settings: SimSettings) -> anyhow::Result<()> {
        http(self.upstream_port, "POST", "/settings", &serde_json::to_string(&settings)?).map(drop)
    }

    fn add(&mut self, system: System) -> anyhow::Result<()> {
        let running = match system {
            System::Upstream => Running::new(system, self.upstream_port, Vec::new(), None),
            System::Hapa => self.start_hapa()?,
            System::Gateway => self.start_gateway()?,
            System::GatewayWeb => {
                let gateway = self.running.iter().find(|found| found.system == System::Gateway);
                let gateway = match gateway {
                    Some(found) => {
                        Running::new(system, found.port, found.pids.clone(), found.key.clone())
                    }
                    None => self.start_gateway()?,
                };
                Running { system, ..gateway }
            }
            System::Floor => {
                let [port] = free_ports()?;
                let mut command = tied(&self.programs.own);
                command.args(["floor", &port.to_string(), &self.upstream_port.to_string()]);
                let pid = self.spawn("floor", command)?;
                Running::new(system, port, vec![pid], None)
            }
            System::Envoy => self.start_plain_envoy()?,
            System::VllmRouter => {
                self.start_router(system, "vllm-router", &["--log-level", "warning"])?
            }
            System::Smg => {
                let options = ["launch", "--log-level", "warn", "--disable-tokenizer-autoload"];
                self.start_router(system, "smg", &options)?
            }
        };
        self.running.push(running);
        let at = self.running.len() - 1;
        if let Err(error) = self.first_streams(at) {
            self.running.truncate(at);
            return Err(error);
        }
        Ok(())
    }

    /// Some systems listen before their upstream is known, so a stream must pass.
    fn first_streams(&mut self, at: usize) -> anyhow::Result<()> {
        let begin = Instant::now();
        loop {
            let failure = match load(self.programs, &self.spec(at, FIRST_STREAMS)) {
                Ok(report) if report.error_count() == 0 => return Ok(()),
                Ok(report) => format!("{:?}", report.errors),
                Err(error) => format!("{error:#}"),
            };
            if let Some(process) = self.processes.last_mut()
                && let Some(status) = process.0.try_wait()?
            {
                bail!("it ended by itself: {status}");
            }
            ensure!(begin.elapsed() < READY_TIMEOUT, "no answer in {READY_TIMEOUT:?}: {failure}");
            sleep(Duration::from_millis(100));
        }
    }

    fn start_hapa(&mut self) -> anyhow::Result<Running> {
        let [port, metrics] = free_ports()?;
        let mut command = self.hapa(port);
        command.arg("all").env("METRICS_PORT", metrics.to_string());
        let engine = format!("http://127.0.0.1:{}/v1", self.upstream_port);
        command.env("AI_MODEL_ENDPOINT", engine).env("LOG_LEVEL", "info");
        if self.is_large {
            command.envs(SCALE_SETTINGS);
        }
        let pid = self.spawn("hapa", command)?;
        let begin = Instant::now();
        while http(metrics, "GET", "/readyz", "").is_err() {
            ensure!(begin.elapsed() < READY_TIMEOUT, "not ready in {READY_TIMEOUT:?}");
            sleep(Duration::from_millis(50));
        }
        let file = self.folder.join("key");
        let mut command = self.hapa(port);
        command.args(["key", "create", "--name=bench", "--owner=bench", "--all-scopes"]);
        command.args(["--never-expires", "--limit", LIMIT, "--out"]).arg(&file);
        finish(command.env("HAPA_ADDRESS", format!("http://127.0.0.1:{port}")))?;
        let key = fs::read_to_string(file)?.trim().to_owned();
        Ok(Running::new(System::Hapa, port, vec![pid], Some(key)))
    }

    /// Settings of the surrounding shell must not change the measured processes.
    fn hapa(&self, port: u16) -> Command {
        let mut command = tied(&self.programs.hapa);
        command.env_clear().env("DATA_DIR", self.folder.join("data"));
        command.env("PORT", port.to_string());
        command
    }

    fn start_gateway(&mut self) -> anyhow::Result<Running> {
        let hapa = self.running.iter().find(|running| running.system == System::Hapa);
        let hapa = hapa.context("HAPA does not run")?;
        let (pids, key, mesh) = (hapa.pids.clone(), hapa.key.clone(), hapa.port);
        let ([port, admin], out) = (free_ports()?, self.folder.join("gateway"));
        let mut command = self.hapa(mesh);
        command.arg("gateway").arg("--out").arg(&out);
        command.env("GATEWAY_PORT", port.to_string()).env("ENVOY_ADMIN_PORT", admin.to_string());
        finish(&mut command)?;
        let pid = self.start_envoy("gateway", &out.join("envoy.yaml"))?;
        Ok(Running::new(System::Gateway, port, [vec![pid], pids].concat(), key))
    }

    fn start_plain_envoy(&mut self) -> anyhow::Result<Running> {
        let ([port], config) = (free_ports()?, self.folder.join("plain-envoy.yaml"));
        let text = PLAIN_ENVOY.replace("${PORT}", &port.to_string());
        fs::write(&config, text.replace("${ENGINE_PORT}", &self.upstream_port.to_string()))?;
        let pid = self.start_envoy("envoy", &config)?;
        Ok(Running::new(System::Envoy, port, vec![pid], None))
    }

    /// As `make run` starts it.
    fn start_envoy(&mut self, name: &str, config: &Path) -> anyhow::Result<u32> {
        let mut command = tied(&self.programs.tool("envoy")?);
        command.arg("-c").arg(config);
        command.args(["--disable-hot-restart", "--concurrency", "2", "--log-level", "warning"]);
        command.args(["--file-flush-interval-msec", "1000"]);
        self.spawn(name, command)
    }

    /// Both routers have the same options besides those given.
    fn start_router(
        &mut self,
        system: System,
        name: &str,
        options: &[&str],
    ) -> anyhow::Result<Running> {
        let [port, metrics] = free_ports()?;
        let mut command = tied(&self.programs.tool(name)?);
        command.args(options).args(["--host", "127.0.0.1", "--policy", "round_robin"]);
        command.args(["--max-concurrent-requests", "4096", "--prometheus-host", "127.0.0.1"]);
        command.args(["--port", &port.to_string(), "--prometheus-port", &metrics.to_string()]);
        command.args(["--worker-urls", &format!("http://127.0.0.1:{}", self.upstream_port)]);
        let pid = self.spawn(name, command)?;
        Ok(Running::new(system, port, vec![pid], None))
    }

    /// Starts a process, with a log of its own.
    fn spawn(&mut self, name: &str, mut command: Command) -> anyhow::Result<u32> {
        let log = File::create(self.folder.join(format!("{name}.log")))?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let child = command.spawn().with_context(|| format!("starting {name}"))?;
        let pid = child.id();
        self.processes.push(RunningProcess(child));
        Ok(pid)
    }
}

/// A command that the kernel kills when this process ends. Ctrl-C does not reach it by itself.
pub(crate) fn tied(program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program).process_group(0);
    command
}

fn finish(command: &mut Command) -> anyhow::Result<()> {
    let done = command.stdin(Stdio::null()).output()?;
    ensure!(done.status.success(), "{command:?}: {}", String::from_utf8_lossy(&done.stderr));
    Ok(())
}

/// Free ports. All are bound at the same time, so that they differ, and then released.
fn free_ports<const N: usize>() -> anyhow::Result<[u16; N]> {
    let mut listeners = Vec::new();
    let mut ports = [0; N];
    for port in &mut ports {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        *port = listener.local_addr()?.port();
        listeners.push(listener);
    }
    Ok(ports)
}
