//! End-to-end tests: a running mesh, called from outside. One binary, so that the mesh is linked once.
#![expect(clippy::unwrap_used, reason = "a failing test must show the place")]
#![expect(clippy::disallowed_methods, reason = "tasks of a test's clients need no tracker")]

mod api;
mod auth;
mod browser;
mod cli;
mod cluster;
mod engines;
mod gateway;
mod operations;
mod reports;
mod vllm;
