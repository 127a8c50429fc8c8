//! The state that the handles and tasks of an outbox share, and its metrics.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::Notify;

use super::priority::{EventKind, Priority};

/// How long health reports a dropped event.
const DROP_REPORT_PERIOD: Duration = Duration::from_mins(1);

/// Why an event is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DropReason {
    /// The queue in front of the writer is full.
    QueueFull,
    /// The file can't be written.
    Disk,
    /// The writer has ended.
    Closed,
    /// The file has reached its maximum number of events.
    FileFull,
    /// The event has reached its maximum age.
    TooOld,
    /// The receiver refuses the event as invalid.
    Refused,
}

impl DropReason {
    const ALL: [DropReason; 6] = [
        DropReason::QueueFull,
        DropReason::Disk,
        DropReason::Closed,
        DropReason::FileFull,
        DropReason::TooOld,
        DropReason::Refused,
    ];

    /// The value of the metric label `reason`.
    fn label(self) -> &'static str {
        match self {
            DropReason::QueueFull => "busy",
            DropReason::Disk => "disk",
            DropReason::Closed => "ended",
            DropReason::FileFull => "full",
            DropReason::TooOld => "old",
            DropReason::Refused => "refused",
        }
    }
}

/// The state of one outbox.
#[derive(Debug, Default)]
pub(super) struct OutboxState {
    pub(super) max_events: AtomicU64,
    /// Stored events by priority.
    pub(super) depth: [AtomicU64; 3],
    /// When an event was last dropped for a reason other than the disk, in milliseconds since 1970.
    last_drop: AtomicU64,
    /// The last write to the file failed.
    pub(super) is_unwritable: AtomicBool,
    /// Fires when there are more events of a kind to deliver.
    pub(super) more: [Notify; 2],
}

impl OutboxState {
    /// Creates the drop counters at 0, so that the first dropped event is visible as an increase.
    pub(super) fn register_drop_counters() {
        for kind in EventKind::ALL {
            for reason in DropReason::ALL {
                let labels = [("kind", kind.label()), ("reason", reason.label())];
                metrics::counter!("hapa_outbox_dropped_total", &labels).increment(0);
            }
        }
    }

    pub(super) fn record_drop(&self, kind: EventKind, reason: DropReason, count: u64) {
        if count == 0 {
            return;
        }
        let labels = [("kind", kind.label()), ("reason", reason.label())];
        metrics::counter!("hapa_outbox_dropped_total", &labels).increment(count);
        // Health reports a failing disk by `is_unwritable`.
        if reason != DropReason::Disk {
            self.last_drop.store(now_ms(), Ordering::Relaxed);
        }
    }

    /// Whether an event was dropped within the last minute.
    pub(super) fn has_dropped_recently(&self) -> bool {
        let since = now_ms().saturating_sub(self.last_drop.load(Ordering::Relaxed));
        u128::from(since) < DROP_REPORT_PERIOD.as_millis()
    }

    /// Stored events of a kind.
    pub(super) fn depth(&self, kind: EventKind) -> u64 {
        let depth = |priority: &Priority| self.depth[*priority as usize].load(Ordering::Relaxed);
        kind.priorities().iter().map(depth).sum()
    }
}

/// Milliseconds since 1970.
pub(super) fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
