//! The gRPC server that runs services: accept loop, middleware, authentication, outbox, health, probes and drain.

mod accept;
pub mod auth;
mod client_address;
pub mod config;
pub mod file_descriptors;
pub mod health;
mod middleware;
mod network_limit;
pub mod outbox;
mod probes;
pub mod rate_limit;
mod rewind_io;
mod server;
mod server_span;
mod slow_reader;
mod workers;

pub use config::Config;
pub use server::{Listeners, Server};
