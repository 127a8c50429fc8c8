//! Child processes of `hapa dev`: start, readiness, exit and shutdown.

use std::fs::File;
use std::io::{ErrorKind, Write as _};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, anyhow, ensure};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep, timeout};

/// Maximum time for one component to become ready.
const READY_TIMEOUT: Duration = Duration::from_mins(1);
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// Number of log lines that an unexpected exit prints.
const LOG_TAIL_LINES: usize = 20;

/// The components in the order of their start. They stop in reverse order: the gateway stops accepting requests, the
/// mesh completes those in progress, and the engine stops last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Component {
    Model,
    Mesh,
    Gateway,
}

impl Component {
    fn name(self) -> &'static str {
        match self {
            Component::Model => "model",
            Component::Mesh => "mesh",
            Component::Gateway => "gateway",
        }
    }

    /// Time between SIGTERM and SIGKILL.
    fn stop_timeout(self) -> Duration {
        match self {
            Component::Mesh => Duration::from_secs(30), // DRAIN_TIMEOUT_SECONDS is 25
            Component::Model | Component::Gateway => Duration::from_secs(5),
        }
    }
}

/// The running components. Dropping it kills them.
pub(super) struct Supervisor {
    log_dir: PathBuf,
    processes: Vec<Process>,
}

struct Process {
    component: Component,
    child: Child,
    /// The process id of the child, which is the id of its process group too.
    pid: Pid,
    log: PathBuf,
}

impl Supervisor {
    pub(super) fn new(log_dir: PathBuf) -> anyhow::Result<Supervisor> {
        std::fs::create_dir_all(&log_dir)
            .with_context(|| format!("cannot create {}", log_dir.display()))?;
        Ok(Supervisor { log_dir, processes: Vec::new() })
    }

    /// Starts a component in a process group of its own, so that Ctrl-C reaches only this process. Call it on the main
    /// thread: the kernel signals the child when the thread that started it ends.
    pub(super) fn start(&mut self, component: Component, command: &Command) -> anyhow::Result<()> {
        let name = component.name();
        let log = self.log_dir.join(format!("{name}.log"));
        let child = spawn(command, &log).with_context(|| format!("cannot start the {name}"))?;
        let pid = child.id().and_then(|pid| Pid::from_raw(pid.try_into().ok()?));
        let pid = pid.with_context(|| format!("the {name} has no process id"))?;
        self.processes.push(Process { component, child, pid, log });
        Ok(())
    }

    /// Polls until a component is ready. Fails if any component exits, or after a timeout.
    pub(super) async fn wait_until_ready(
        &mut self,
        component: Component,
        is_ready: impl AsyncFn() -> bool,
    ) -> anyhow::Result<()> {
        let (name, start) = (component.name(), Instant::now());
        while !is_ready().await {
            self.check_running()?;
            let log = self.log_dir.join(format!("{name}.log"));
            ensure!(
                start.elapsed() < READY_TIMEOUT,
                "the {name} was not ready within {} s; see {}",
                READY_TIMEOUT.as_secs(),
                log.display()
            );
            sleep(POLL_INTERVAL).await;
        }
        writeln!(anstream::stdout(), "{name} is ready")?;
        Ok(())
    }

    /// Waits until any component exits, and returns the error that describes it.
    pub(super) async fn wait_for_exit(&mut self) -> anyhow::Error {
        loop {
            if let Err(error) = self.check_running() {
                return error;
            }
            sleep(POLL_INTERVAL).await;
        }
    }

    /// Fails if a component has exited; prints the end of its log.
    fn check_running(&mut self) -> anyhow::Result<()> {
        for process in &mut self.processes {
            let Some(status) = process.child.try_wait()? else { continue };
            let name = process.component.name();
            print_log_tail(&process.log)?;
            return Err(anyhow!(
                "the {name} exited unexpectedly ({status}); the other components were stopped"
            ));
        }
        Ok(())
    }

    /// Stops the components in reverse order: SIGTERM, and SIGKILL after a timeout.
    pub(super) async fn stop_all(&mut self) {
        while let Some(process) = self.processes.last_mut() {
            process.stop().await;
            self.processes.pop();
        }
    }

    /// Kills all components at once.
    pub(super) fn kill_all(&mut self) {
        self.processes.clear();
    }
}

impl Process {
    async fn stop(&mut self) {
        // The call fails if the child has exited already.
        let _ = kill_process(self.pid, Signal::TERM);
        let _ = timeout(self.component.stop_timeout(), self.child.wait()).await;
        self.kill_group();
        let _ = self.child.wait().await;
    }

    /// Kills the child and its descendants.
    fn kill_group(&self) {
        let _ = kill_process_group(self.pid, Signal::KILL);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill_group();
    }
}

/// Starts a command under setpriv, which makes the kernel terminate the child when this process ends.
fn spawn(command: &Command, log: &Path) -> anyhow::Result<Child> {
    let command = command.as_std();
    let mut wrapped = Command::new("setpriv");
    wrapped.args(["--pdeathsig", "TERM", "--"]).arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs().filter_map(|(name, value)| Some((name, value?))) {
        wrapped.env(name, value);
    }
    let file = File::create(log).with_context(|| format!("cannot create {}", log.display()))?;
    wrapped.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
    wrapped.process_group(0).kill_on_drop(true).spawn().map_err(|error| match error.kind() {
        ErrorKind::NotFound => anyhow!("setpriv is missing; install the package util-linux"),
        _ => error.into(),
    })
}

fn print_log_tail(log: &Path) -> anyhow::Result<()> {
    let text = String::from_utf8_lossy(&std::fs::read(log).unwrap_or_default()).into_owned();
    let lines: Vec<_> = text.lines().collect();
    let mut stderr = anstream::stderr();
    writeln!(stderr, "--- last lines of {}", log.display())?;
    for line in &lines[lines.len().saturating_sub(LOG_TAIL_LINES)..] {
        writeln!(stderr, "{line}")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    fn supervisor(name: &str) -> Supervisor {
        let folder = format!("hapa-supervisor-{name}-{}", std::process::id());
        Supervisor::new(std::env::temp_dir().join(folder)).unwrap()
    }

    /// Waits until every process of a group is dead; zombies of orphans may remain until init reaps them.
    async fn wait_until_dead(group: Pid) {
        let is_alive = |stat: String| {
            // After the command in parentheses: state, parent, process group.
            let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
            let fields: Vec<_> = fields.collect();
            fields.first() != Some(&"Z")
                && fields.get(2) == Some(&group.as_raw_nonzero().to_string().as_str())
        };
        let stats = || {
            let processes = std::fs::read_dir("/proc").unwrap().flatten();
            processes.filter_map(|entry| std::fs::read_to_string(entry.path().join("stat")).ok())
        };
        let dead = async {
            while stats().any(is_alive) {
                sleep(POLL_INTERVAL).await;
            }
        };
        timeout(Duration::from_secs(10), dead).await.expect("a process is alive");
    }

    #[tokio::test]
    async fn the_exit_of_a_component_is_an_error_that_names_it() {
        let mut supervisor = supervisor("exit");
        supervisor.start(Component::Model, &shell("sleep 60")).unwrap();
        supervisor.start(Component::Mesh, &shell("echo no; exit 3")).unwrap();
        let error = supervisor.wait_for_exit().await.to_string();
        assert!(error.contains("mesh") && error.contains('3'), "{error}");
        let ready = supervisor.wait_until_ready(Component::Gateway, async || false).await;
        assert!(ready.unwrap_err().to_string().contains("mesh"));
        let log = std::fs::read_to_string(supervisor.log_dir.join("mesh.log")).unwrap();
        assert_eq!(log, "no\n");
        let model = supervisor.processes[0].pid;
        supervisor.stop_all().await;
        wait_until_dead(model).await;
        std::fs::remove_dir_all(&supervisor.log_dir).unwrap();
    }

    #[tokio::test]
    async fn components_and_their_descendants_stop_within_a_bound() {
        let mut supervisor = supervisor("stop");
        // Ignores SIGTERM and has a child.
        supervisor
            .start(Component::Gateway, &shell("trap '' TERM; sleep 60 & wait; wait"))
            .unwrap();
        let pid = supervisor.processes[0].pid;
        sleep(POLL_INTERVAL).await;
        let start = Instant::now();
        supervisor.stop_all().await;
        assert!(start.elapsed() < Component::Gateway.stop_timeout() + Duration::from_secs(5));
        wait_until_dead(pid).await;
        std::fs::remove_dir_all(&supervisor.log_dir).unwrap();
    }
}
