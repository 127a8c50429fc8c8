//! The mesh from outside: what tests and benchmarks stand on.

pub mod engine;
