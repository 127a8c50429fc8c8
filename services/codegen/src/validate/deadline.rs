//! A deadline that is polled once per syntax node, and therefore reads the system clock rarely.

use std::cell::Cell;
use std::time::{Duration, Instant};

/// Polls between two readings of the system clock.
const CLOCK_READ_INTERVAL: u32 = 256;

#[derive(Debug)]
pub(super) struct Deadline {
    expires_at: Instant,
    poll_count: Cell<u32>,
    is_past: Cell<bool>,
}

impl Deadline {
    pub(super) fn new(timeout: Duration) -> Deadline {
        Deadline {
            expires_at: Instant::now() + timeout,
            poll_count: Cell::new(0),
            is_past: Cell::new(timeout.is_zero()),
        }
    }

    /// Polls the deadline. Only every 256th call reads the clock; the others return `false`.
    pub(super) fn is_expired(&self) -> bool {
        self.poll_count.set(self.poll_count.get().wrapping_add(1));
        self.poll_count.get().is_multiple_of(CLOCK_READ_INTERVAL) && self.is_expired_now()
    }

    /// Reads the clock. An expired deadline stays expired.
    pub(super) fn is_expired_now(&self) -> bool {
        self.is_past.set(self.is_past.get() || Instant::now() >= self.expires_at);
        self.is_past.get()
    }
}
