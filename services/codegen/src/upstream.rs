//! The engines: the client of one engine, and the pool that chooses one, retries before the first token and
//! watches their health. Knows no caller.

pub(crate) mod engine;
pub mod pool;
#[cfg(test)]
mod scripted_server;
pub(crate) mod span;
