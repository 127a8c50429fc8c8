//! The simulator, as a raw TCP client sees it.
//!
//! Kept true: nothing here sleeps to let something happen; what a test waits for is a byte on the
//! wire or a count of the engine, each with a bound.

mod answers;
mod client;
mod completion;
mod disconnects;
mod faults;
