//! A store that cannot be written for a while: reads and generations continue, and changes fail with a
//! published code. Health reports it. All of it ends when the store accepts writes again.

use hapa_engine_sim::Engine;
use hapa_proto::auth::v1::{CreateKeyRequest, CreateKeyResponse, ListKeysRequest, TokenBudget};
use hapa_proto::system::v1::system_service_client::SystemServiceClient;
use hapa_proto::system::v1::{GetHealthRequest, GetHealthResponse};
use hapa_test_harness::{
    CodegenClient, KeyClient, Postgres, RoleProcess, Store, TOKEN, TestMesh, incident, within,
};
use tonic::{Code, Status};

use crate::api::generate::question;

const AUTH_WRITES: &str = "the store of auth can't be written; reads go on";

async fn make_key(keys: &mut KeyClient) -> Result<CreateKeyResponse, Status> {
    let made = within("a key", keys.create_key(TestMesh::dev_key())).await;
    made.map(tonic::Response::into_inner)
}

async fn generate(client: &mut CodegenClient) -> Result<(), Status> {
    within("an answer", client.generate_code(question("q"))).await.map(drop)
}

/// Asks for the health until it is as wanted.
async fn becomes(address: &str, is_wanted: impl Fn(&GetHealthResponse) -> bool) {
    let mut client =
        within("the port", SystemServiceClient::connect(address.to_owned())).await.unwrap();
    within("the health", async {
        loop {
            let health = client.get_health(GetHealthRequest {}).await.unwrap().into_inner();
            if is_wanted(&health) {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    })
    .await;
}

fn is_degraded(health: &GetHealthResponse) -> bool {
    let services = health.services.as_ref().unwrap();
    health.status == "degraded"
        && services.database == "connected"
        && health.problems.iter().any(|problem| problem == AUTH_WRITES)
}

fn is_healthy(health: &GetHealthResponse) -> bool {
    health.status == "healthy"
}

#[track_caller]
fn assert_unavailable(status: &Status) {
    assert_eq!((incident(status).0.as_str(), status.code()), ("E5003", Code::Unavailable));
}

#[tokio::test]
async fn a_full_disk_fails_what_changes_something_and_all_heals_when_there_is_room() {
    let engine = Engine::start();
    let settings = [
        ("MESH_TOKEN", TOKEN.to_owned()),
        ("AI_MODEL_ENDPOINT", engine.url().to_owned()),
        ("CACHE_TTL", "0".to_owned()),
        ("LOG_LEVEL", "warn,hapa_server::server=info".to_owned()),
    ];
    let mesh = RoleProcess::start_on_small_disk("all", &settings).await;
    let (mut keys, address) = (mesh.keys(), format!("http://{}", mesh.mesh()));
    let free = make_key(&mut keys).await.unwrap();
    let token_budget = Some(TokenBudget { per_day: 1_000_000, per_month: 0 });
    let budgeted = CreateKeyRequest { token_budget, ..TestMesh::dev_key() };
    let budgeted = within("a key", keys.create_key(budgeted)).await.unwrap().into_inner();
    let (mut free, mut budgeted) = (mesh.client(&free.key_text), mesh.client(&budgeted.key_text));
    generate(&mut budgeted).await.unwrap();

    mesh.fill_disk().await;
    // Repeated, because a failure must not affect later calls.
    for _ in 0..3 {
        assert_unavailable(&make_key(&mut keys).await.unwrap_err());
        assert_unavailable(&generate(&mut budgeted).await.unwrap_err());
        generate(&mut free).await.unwrap();
        let listed = within("the keys", keys.list_keys(ListKeysRequest::default())).await.unwrap();
        assert_eq!(listed.into_inner().keys.len(), 2);
    }
    becomes(&address, is_degraded).await;
    let ready = mesh.page("/readyz").await;
    assert!(ready.starts_with("ready\n") && ready.contains(AUTH_WRITES), "{ready}");
    within("the spool to say so", async { while !mesh.page("/readyz").await.contains("E5010") {} })
        .await;

    mesh.free_disk().await;
    make_key(&mut keys).await.unwrap();
    generate(&mut budgeted).await.unwrap();
    generate(&mut free).await.unwrap();
    becomes(&address, is_healthy).await;
    within("/readyz", async { while mesh.page("/readyz").await != "ready\n" {} }).await;
}

/// Sets whether new database sessions are read-only.
async fn set_read_only(server: &Postgres, store: &Store, is_read_only: bool) {
    let url = store.url();
    let name = url.split('?').next().unwrap().rsplit('/').next().unwrap();
    let set = format!("ALTER DATABASE {name} SET default_transaction_read_only = {is_read_only}");
    server.execute(&set).await;
    if is_read_only {
        // As a failover does.
        let end = format!(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"
        );
        server.execute(&end).await;
    }
}

#[tokio::test]
async fn a_read_only_server_is_read_and_its_connections_are_replaced() {
    let server = Postgres::own().await;
    let store = Store::Postgres(server.another().await);
    let mesh = TestMesh::start_on(&store, &[]).await;
    let (mut keys, address) = (mesh.keys(), format!("http://{}", mesh.address));
    let mut client = mesh.client();
    generate(&mut client).await.unwrap();
    set_read_only(&server, &store, true).await;
    within("writes to fail", async {
        loop {
            if let Err(status) = make_key(&mut keys).await {
                assert_unavailable(&status);
                return;
            }
        }
    })
    .await;
    becomes(&address, is_degraded).await;
    assert_unavailable(&make_key(&mut keys).await.unwrap_err());
    generate(&mut client).await.unwrap();
    within("the keys", keys.list_keys(ListKeysRequest::default())).await.unwrap();
    assert!(mesh.page("/readyz").await.1.starts_with("ready\n"));
    // The sessions that are open stay read-only, as those to a demoted primary do.
    set_read_only(&server, &store, false).await;
    becomes(&address, is_healthy).await;
    make_key(&mut keys).await.unwrap();
    mesh.finish().await;
}

#[tokio::test]
async fn a_server_with_a_full_disk_fails_only_writes_and_recovers() {
    const FULL: &str = "CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN RAISE EXCEPTION 'could not extend file' USING ERRCODE = '53100'; END $$";
    let store = Store::Postgres(Postgres::database().await);
    let mesh = TestMesh::start_on(&store, &[]).await;
    let (mut keys, address) = (mesh.keys(), format!("http://{}", mesh.address));
    let mut client = mesh.client();
    generate(&mut client).await.unwrap();
    store.execute(FULL).await;
    let tables = ["audit", "write_check_auth"];
    for table in tables {
        store
            .execute(&format!(
                "CREATE TRIGGER full_disk BEFORE INSERT OR UPDATE ON {table}
                 FOR EACH ROW EXECUTE FUNCTION full_disk()"
            ))
            .await;
    }
    for _ in 0..3 {
        assert_unavailable(&make_key(&mut keys).await.unwrap_err());
        generate(&mut client).await.unwrap();
    }
    becomes(&address, is_degraded).await;
    for table in tables {
        store.execute(&format!("DROP TRIGGER full_disk ON {table}")).await;
    }
    make_key(&mut keys).await.unwrap();
    becomes(&address, is_healthy).await;
    mesh.finish().await;
}
