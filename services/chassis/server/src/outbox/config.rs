//! The settings of the outbox.

use std::time::Duration;

use clap::{ArgAction, Args};

/// Settings of the outbox.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Outbox")]
pub struct OutboxConfig {
    /// Maximum number of events that wait in DATA_DIR for analytics and errors. Beyond it the oldest are dropped, first
    /// those of successful calls.
    #[arg(long, alias = "spool-max-events", env = "OUTBOX_MAX_EVENTS", default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(1..))]
    pub outbox_max_events: u64,
    /// Maximum time that an event waits, in hours, from 1 to 8760. Older events are dropped.
    #[arg(long, alias = "spool-max-age-hours", env = "OUTBOX_MAX_AGE_HOURS", default_value_t = 168, value_parser = clap::value_parser!(u32).range(1..=8760))]
    pub outbox_max_age_hours: u32,
    /// Whether failed calls are reported to the errors service.
    #[arg(long, env = "ERROR_MONITORING_ENABLED", action = ArgAction::Set, value_parser = hapa_core::config::boolean, default_value_t = true)]
    pub error_monitoring_enabled: bool,
    /// Whether the usage of calls is reported to the analytics service.
    #[arg(long, env = "USAGE_RECORDING_ENABLED", action = ArgAction::Set, value_parser = hapa_core::config::boolean, default_value_t = true)]
    pub usage_recording_enabled: bool,
}

impl OutboxConfig {
    pub(crate) fn limits(&self) -> OutboxLimits {
        OutboxLimits {
            max_events: self.outbox_max_events,
            max_age: Duration::from_hours(self.outbox_max_age_hours.into()),
        }
    }
}

/// The limits of an outbox.
#[derive(Clone, Copy, Debug)]
pub struct OutboxLimits {
    /// Maximum number of events of all kinds.
    pub max_events: u64,
    /// Maximum age of an event.
    pub max_age: Duration,
}
