//! The base of every other crate: calls and their statistics, errors with published codes, access rules, settings,
//! secrets, redaction, the circuit breaker, pagination and timestamps.

pub mod access;
pub mod call;
pub mod call_stats;
pub mod circuit_breaker;
pub mod config;
pub mod error_chain;
pub mod grpc_timeout;
pub mod health_check;
pub mod idempotency;
pub mod key_format;
pub mod pagination;
pub mod password_attempts;
pub mod principal_cache;
pub mod redaction;
pub mod rpc_error;
pub mod secret;
pub mod service;
pub mod sighup;
pub mod timestamps;
pub mod violations;
