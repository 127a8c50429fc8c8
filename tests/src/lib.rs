//! The mesh from outside: what tests and benchmarks stand on.

pub mod engine;
mod fleet;
mod gateway;
mod people;
mod postgres;
mod provider;
mod redis;
mod tools;
mod world;

pub use fleet::{Audit, Fleet, Role, Sessions, Users};
pub use gateway::Gateway;
pub use people::{PASSWORD, Person, Who, Wire};
pub use postgres::{Database, Postgres, Store};
pub use provider::Provider;
pub use redis::RedisServer;
pub use tools::{Metrics, hapa, incident, within};
pub use world::{Client, Keys, World};
