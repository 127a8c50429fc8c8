//! The mesh from outside: what tests and benchmarks stand on.

mod certificates;
mod collector;
pub mod engine;
mod fleet;
mod gateway;
mod keeper;
mod pairs;
mod parrot;
mod people;
mod postgres;
mod provider;
mod receiver;
mod redis;
mod seen;
mod serving;
pub mod stranger;
mod tools;
mod world;

pub use certificates::{Certificates, Certified, dial};
pub use collector::{Collected, Collector};
pub use fleet::{Audit, Fleet, Role, Sessions, Users};
pub use gateway::{Ask, Gateway};
pub use keeper::Keeper;
pub use pairs::Pairs;
pub use parrot::{PARROT_HOST, PARROT_MODEL, PARROT_WAYS, Parrot, ParrotModels};
pub use people::{PASSWORD, Person, Who};
pub use postgres::{Database, Postgres, Store};
pub use provider::Provider;
pub use receiver::Receiver;
pub use redis::RedisServer;
pub use seen::{Seen, Wire};
pub use serving::Serving;
pub use tools::{Metrics, hapa, incident, refusal, signal, within};
pub use world::{Client, Keys, TOKEN, World};
