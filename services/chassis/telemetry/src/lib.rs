//! Telemetry for operators: logs, metrics and spans. It never contains a key, a prompt or an answer.

pub mod config;
pub mod logging;
pub mod metrics_list;
pub mod panics;
pub mod recorder;
pub mod scheduler_lag;
pub mod trace;
