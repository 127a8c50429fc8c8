//! Authentication of callers: the principals that auth confirmed, and the changes that end them.

pub mod principal_cache;
