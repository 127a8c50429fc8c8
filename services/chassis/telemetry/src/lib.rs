//! What operators see: log lines, metrics, and spans for a collector. None ever holds a key, a prompt or an answer.

pub mod config;
pub mod logging;
pub mod metrics_list;
pub mod panics;
pub mod recorder;
pub mod scheduler_lag;
pub mod trace;
