//! Storage that services share: databases and their migrations, the change feed, Redis, and rate limits.

pub mod change_feed;
pub mod database;
pub mod file_lock;
pub mod open;
pub mod redis;
pub mod sql;
