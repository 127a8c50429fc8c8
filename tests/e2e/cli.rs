//! The command line, as an operator and a user type it.

mod auth;
mod client;
mod operate;
mod reports;
