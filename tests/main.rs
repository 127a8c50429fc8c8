//! The stories: what the mesh does, seen from outside. One binary, so that the mesh is linked once.
#![expect(clippy::unwrap_used, reason = "a test that can't go on should say where")]
#![expect(clippy::disallowed_methods, reason = "a test's clients are not the server's tasks")]

mod admission;
mod audit;
mod budgets;
mod cache;
mod cli;
mod cli_auth;
mod cli_operate;
mod cli_reports;
mod complete;
mod data_folder;
mod deploy;
mod engine_words;
mod disk;
mod failures;
mod fleet;
mod gateway;
mod generate;
mod health;
mod hostile;
mod house;
<<<<<<< HEAD
mod idempotency;
=======
mod http_details;
>>>>>>> h2
mod incidents;
mod keys;
mod lifecycle;
mod limits;
mod logs;
mod memory;
mod mtls;
<<<<<<< HEAD
mod passwords;
mod quotes;
=======
mod neighbours;
>>>>>>> h2
mod readers;
mod refusals;
mod roles;
mod route;
mod run;
mod sessions;
mod spool;
mod spool_killed;
mod stores;
mod supply;
mod tasks;
mod tenants;
mod traces;
mod turns;
mod unreadable;
mod usage;
mod users;
mod validate;
mod vllm;
