//! Keys, users, sessions, budgets, certificates and the audit log.

pub(crate) mod access_table;
mod audit;
mod bad_credentials;
mod budgets;
mod keys;
mod mtls;
mod no_echo;
mod passwords;
mod sessions;
mod tenants;
pub(crate) mod users;
