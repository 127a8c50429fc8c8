//! A whole deployed mesh: each role twice, each a process of its own, on one PostgreSQL and one Redis behind a
//! real Envoy. Dropping it stops everything.

use std::net::TcpListener;

use hapa_engine_sim::Engine;
use hapa_proto::auth::v1::{CreateKeyRequest, CreateKeyResponse};
use tokio::time::sleep;

use crate::gateway::Gateway;
use crate::postgres::{Database, Postgres};
use crate::redis::RedisServer;
use crate::test_cluster::{RoleProcess, quiet_port};
use crate::test_mesh::TOKEN;
use crate::tools::{POLL_INTERVAL, within};

/// Two processes of each role behind a gateway.
#[derive(Debug)]
pub struct HaCluster {
    /// The engine behind code generation.
    pub engine: Engine,
    /// The gateway, with the addresses of both replicas of each role.
    pub gateway: Gateway,
    /// The replicas of auth.
    pub auth: [RoleProcess; 2],
    /// The replicas of codegen.
    pub codegen: [RoleProcess; 2],
    /// The replicas of errors.
    pub errors: [RoleProcess; 2],
    /// The replicas of analytics.
    pub analytics: [RoleProcess; 2],
    /// The stores.
    _kept: (RedisServer, Database),
}

/// The ports of one role's replicas, reserved until the processes start.
struct Ports([(u16, TcpListener); 2]);

impl Ports {
    fn take() -> Ports {
        let one = || loop {
            let port = quiet_port();
            if let Ok(listener) = TcpListener::bind(("127.0.0.1", port)) {
                return (port, listener);
            }
        };
        Ports([one(), one()])
    }

    fn addresses(&self) -> String {
        let [one, other] = self.0.each_ref().map(|(port, _)| format!("http://127.0.0.1:{port}"));
        format!("{one},{other}")
    }

    async fn start(self, role: &str, settings: &[(&'static str, String)]) -> [RoleProcess; 2] {
        let [(one, taken), (other, also_taken)] = self.0;
        drop((taken, also_taken));
        let start = async |port| {
            within("a process of the mesh", async {
                loop {
                    if let Some(role) = RoleProcess::on(port, role, settings, &[]).await {
                        return role;
                    }
                    sleep(POLL_INTERVAL).await;
                }
            })
            .await
        };
        tokio::join!(start(one), start(other)).into()
    }
}

impl HaCluster {
    /// Starts it with these settings besides the usual ones, and waits until all processes are connected.
    pub async fn start_with(own: &[(&'static str, &str)]) -> HaCluster {
        let engine = Engine::start();
        let (redis, database) = tokio::join!(RedisServer::start(), Postgres::database());
        let roles = ["AUTH_ADDRESS", "CODEGEN_ADDRESS", "ERRORS_ADDRESS", "ANALYTICS_ADDRESS"];
        let [auth, codegen, errors, analytics] = std::array::from_fn(|_| Ports::take());
        let places = [&auth, &codegen, &errors, &analytics].map(Ports::addresses);
        let settings = [
            ("MESH_TOKEN", TOKEN),
            ("API_KEY_PEPPER", "the-pepper-of-a-test-which-is-long-too"),
            ("SECRET_KEY", "the-secret-of-a-test-which-is-long-as-well"),
            ("DATABASE_URL", database.url()),
            ("REDIS_URL", &redis.url()),
            ("AI_MODEL_ENDPOINT", engine.url()),
            ("CACHE_TTL", "0"),
            // Streams at a hold of a test may wait long on a slow machine.
            ("TOKEN_GAP_TIMEOUT_SECONDS", "300"),
            ("LOG_LEVEL", "warn,hapa_server::server=info"),
        ];
        let places = roles.into_iter().zip(places.each_ref().map(String::as_str));
        let settings: Vec<_> = settings.into_iter().chain(own.iter().copied()).collect();
        let of = |role: &str| -> Vec<_> {
            // A process gets no address of its own role, and calls itself.
            let others = places.clone().filter(|(name, _)| !name.starts_with(role));
            let all = settings.iter().copied().chain(others);
            all.map(|(name, value)| (name, value.to_owned())).collect()
        };
        let all = [of("AUTH"), of("CODEGEN"), of("ERRORS"), of("ANALYTICS")];
        let (auth, codegen, errors, analytics) = tokio::join!(
            auth.start("auth", &all[0]),
            codegen.start("codegen", &all[1]),
            errors.start("errors", &all[2]),
            analytics.start("analytics", &all[3]),
        );
        for role in [&auth, &codegen, &errors, &analytics].into_iter().flatten() {
            role.is_whole().await;
        }
        let gateway = Gateway::with(&places.collect::<Vec<_>>()).await;
        let kept = (redis, database);
        HaCluster { engine, gateway, auth, codegen, errors, analytics, _kept: kept }
    }

    /// Creates a key.
    pub async fn create_key(&self, request: CreateKeyRequest) -> CreateKeyResponse {
        let made = within("a key", async { self.auth[0].keys().create_key(request).await }).await;
        made.expect("a key can be made").into_inner()
    }
}
