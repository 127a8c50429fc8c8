//! Processor time and memory of the measured processes during a load.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::sleep;

use crate::process::{self, MachineTime, float, now};
use crate::spec::LoadSpec;

const SAMPLE_INTERVAL: Duration = Duration::from_millis(50);

/// A running observation.
pub(crate) struct Watch {
    pids: Vec<u32>,
    /// The simulator and the load generator.
    others: Vec<u32>,
    begin: u64,
    cpu: Duration,
    others_cpu: Duration,
    machine: MachineTime,
    peak: Arc<AtomicU64>,
    sampler: JoinHandle<()>,
}

/// What was observed.
#[derive(Debug)]
pub(crate) struct Readings {
    pub(crate) seconds: f64,
    pub(crate) cpu_us: f64,
    pub(crate) peak_bytes: u64,
    pub(crate) foreign_cores: f64,
    pub(crate) stolen_cores: f64,
}

impl Watch {
    #[expect(clippy::disallowed_methods, reason = "the sampler ends with its watch")]
    pub(crate) fn start(spec: &LoadSpec) -> Self {
        let pids = process::trees(&spec.pids);
        let peak = Arc::new(AtomicU64::new(process::memory(&pids)));
        let sampler = {
            let (pids, peak) = (pids.clone(), Arc::clone(&peak));
            tokio::spawn(async move {
                loop {
                    sleep(SAMPLE_INTERVAL).await;
                    peak.fetch_max(process::memory(&pids), Relaxed);
                }
            })
        };
        let others = vec![spec.upstream_pid, std::process::id()];
        let (cpu, others_cpu) = (process::cpu(&pids), process::cpu(&others));
        let machine = process::machine();
        Watch { pids, others, begin: now(), cpu, others_cpu, machine, peak, sampler }
    }

    pub(crate) fn stop(self) -> Readings {
        self.sampler.abort();
        let seconds = float(now() - self.begin) / 1e9;
        let machine = process::machine();
        let cpu = process::cpu(&self.pids).saturating_sub(self.cpu);
        let others = process::cpu(&self.others).saturating_sub(self.others_cpu);
        let busy = machine.busy.saturating_sub(self.machine.busy);
        let stolen = machine.stolen.saturating_sub(self.machine.stolen);
        let peak = self.peak.load(Relaxed).max(process::memory(&self.pids));
        Readings {
            seconds,
            cpu_us: cpu.as_secs_f64() * 1e6,
            peak_bytes: peak,
            foreign_cores: busy.saturating_sub(cpu + others).as_secs_f64() / seconds,
            stolen_cores: stolen.as_secs_f64() / seconds,
        }
    }
}
