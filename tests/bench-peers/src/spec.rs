//! What passes between the processes: settings of the simulator, specifications of loads, and their reports.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Answers of the simulator. Zero intervals mean: as fast as possible.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub(crate) struct SimSettings {
    /// Delay of the first token.
    pub(crate) first_token: Duration,
    /// Interval between two tokens.
    pub(crate) interval: Duration,
    /// Whether only headers are sent.
    pub(crate) is_silent: bool,
}

/// Protocol between the load generator and a system.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub(crate) enum Protocol {
    /// JSON and server-sent events over HTTP/1.1, as engines serve them.
    OpenAi,
    /// gRPC over HTTP/2 without TLS.
    Grpc,
    /// gRPC-Web over HTTP/2 without TLS.
    GrpcWeb,
}

/// When a client drops its stream.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub(crate) enum Leave {
    /// After a number of tokens.
    Tokens(u64),
    /// After a time since the request.
    Time(Duration),
}

/// One load, without the system that gets it.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub(crate) struct LoadShape {
    /// Tokens that every answer must have.
    pub(crate) tokens: u64,
    /// Streams or calls at a time.
    pub(crate) concurrency: usize,
    /// Measured streams or calls; no new one begins after `max_time`.
    pub(crate) count: u64,
    pub(crate) max_time: Duration,
    /// Streams or calls before the measured ones.
    pub(crate) warm_up: u64,
    /// The first streams begin within this time.
    pub(crate) spread: Duration,
    pub(crate) is_unary: bool,
    /// Whether every question is the same, so that the answer is cached.
    pub(crate) is_repeated: bool,
    pub(crate) leave: Option<Leave>,
    /// Measures only while all streams are open, for this time.
    pub(crate) hold: Option<Duration>,
}

/// A load on a system.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct LoadSpec {
    pub(crate) shape: LoadShape,
    pub(crate) protocol: Protocol,
    pub(crate) port: u16,
    pub(crate) key: Option<String>,
    pub(crate) upstream_port: u16,
    pub(crate) upstream_pid: u32,
    /// The processes of the system, without descendants.
    pub(crate) pids: Vec<u32>,
}

/// Quantiles of times, in microseconds.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub(crate) struct Quantiles {
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    pub(crate) max: f64,
}

/// What became of the streams that clients dropped.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub(crate) struct AbortReport {
    /// From the drop to the abort in the simulator.
    pub(crate) time: Option<Quantiles>,
    /// Drops that the simulator did not detect within a second.
    pub(crate) missed: u64,
}

/// The results of a load.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct LoadReport {
    /// Complete answers, with exactly the expected text.
    pub(crate) complete: u64,
    pub(crate) left: u64,
    pub(crate) tokens: u64,
    pub(crate) errors: BTreeMap<String, u64>,
    pub(crate) seconds: f64,
    pub(crate) first_text: Option<Quantiles>,
    pub(crate) total: Option<Quantiles>,
    pub(crate) aborts: Option<AbortReport>,
    /// Processor time of the system, in microseconds.
    pub(crate) cpu_us: f64,
    /// Highest resident memory of the system.
    pub(crate) peak_bytes: u64,
    /// Processors that neither the system nor the simulator nor the load generator used.
    pub(crate) foreign_cores: f64,
    /// Processors that the hypervisor gave to other machines.
    pub(crate) stolen_cores: f64,
}

impl LoadReport {
    pub(crate) fn error_count(&self) -> u64 {
        self.errors.values().sum()
    }
}
