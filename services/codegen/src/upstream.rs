//! The engines: the client of one engine, and the pool that chooses one, retries before the first token and
//! watches their health. Knows no caller.

pub(crate) mod engine;
pub mod pool;
pub(crate) mod span;
