//! When a request may use an engine: the fair queue of concurrency permits, and the reservation of tokens.

pub(crate) mod budget;
pub(crate) mod fair_queue;
