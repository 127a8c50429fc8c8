//! What every HAPA service stands on. No domain noun lives here beyond the principal: who calls.
//!
//! A service is a `mount` function that gives a [`Server`] its gRPC services, their [`Rpc`] rows
//! and its background tasks; the server does the rest, alike for all.

mod accept;
mod admission;
pub mod attempts;
pub mod balance;
mod causes;
pub mod check;
pub mod config;
mod context;
pub mod credential;
pub mod db;
mod deadline;
pub mod descriptors;
pub mod dial;
pub mod hangup;
pub mod health;
pub mod idempotency;
pub mod key_text;
mod layers;
pub mod limit;
pub mod lock;
mod network_limit;
mod observe;
pub mod page;
mod panics;
pub mod peer;
mod probes;
pub mod profile;
mod public_calls;
mod reader;
mod receive;
pub mod redis;
mod report;
mod request_body;
pub mod rpc;
pub mod scrub;
pub mod secret;
mod server;
mod shed;
pub mod spool;
pub mod sql;
pub mod status;
pub mod store;
pub mod tail;
pub mod telemetry;
pub mod times;
pub mod tls;
pub mod trace;

pub use check::Violations;
pub use config::Config;
pub use context::{Call, is_request_id};
pub use report::Report;
pub use rpc::{Access, Rpc};
pub use server::{Listeners, Server};
pub use spool::Spool;
pub use status::{ErrorCode, Fault};
pub use store::StoreSpec;
