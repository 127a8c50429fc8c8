//! When to give up: asked often, and so looked up seldom.

use std::cell::Cell;
use std::time::{Duration, Instant};

/// Questions between two looks at the time.
const SELDOM: u32 = 256;

#[derive(Debug)]
pub(super) struct Clock {
    ends: Instant,
    asked: Cell<u32>,
    over: Cell<bool>,
}

impl Clock {
    pub(super) fn new(within: Duration) -> Clock {
        Clock {
            ends: Instant::now() + within,
            asked: Cell::new(0),
            over: Cell::new(within.is_zero()),
        }
    }

    pub(super) fn is_over(&self) -> bool {
        self.asked.set(self.asked.get().wrapping_add(1));
        self.asked.get().is_multiple_of(SELDOM) && self.is_over_now()
    }

    pub(super) fn is_over_now(&self) -> bool {
        self.over.set(self.over.get() || Instant::now() >= self.ends);
        self.over.get()
    }
}
