//! The simulator, as a raw TCP client sees it.
//!
//! Invariant: no test sleeps until something has happened. A test waits for bytes on the wire or for counts of
//! the engine, with a time limit.

mod answers;
mod client;
mod completion;
mod disconnects;
mod faults;
