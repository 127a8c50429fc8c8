//! A mesh or a cluster for one test, with stores, certificates, clients, and fakes of everything around it.

mod acking_sink;
mod certificates;
mod echoing_engine;
mod fake_analytics;
mod fake_idp;
mod gateway;
mod ha_cluster;
pub mod hostile_client;
mod identities;
mod incident_tracker;
mod postgres;
mod redis;
mod server_process;
mod test_cluster;
mod test_mesh;
mod tools;
mod trace_collector;

pub use acking_sink::AckingSink;
pub use certificates::{Certificates, MtlsCluster, dial};
pub use echoing_engine::{ECHO_CASES, ECHOING_HOST, ECHOING_MODEL, EchoedModels, EchoingEngine};
pub use fake_analytics::FakeAnalytics;
pub use fake_idp::FakeIdp;
pub use gateway::{Gateway, GatewayRequest};
pub use ha_cluster::HaCluster;
pub use identities::{Identity, LoggedInUser, PASSWORD};
pub use incident_tracker::{IncidentTracker, TestChannel};
pub use postgres::{Database, Postgres, Store};
pub use redis::RedisServer;
pub use server_process::ServerProcess;
pub use test_cluster::{AuditClient, RoleProcess, SessionClient, TestCluster, UserClient};
pub use test_mesh::{CodegenClient, KeyClient, TOKEN, TestMesh, reqwest_client};
pub use tools::{Metrics, files_with, hapa, incident, refusal, signal, within};
pub use trace_collector::{CollectedSpan, TraceCollector};
