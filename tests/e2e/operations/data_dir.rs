//! DATA_DIR: its lock, damaged files, and secrets that differ from the previous ones.

use std::fs;
use std::path::Path;

use hapa_engine_sim::Engine;
use hapa_proto::analytics::v1::UsageEvent;
use hapa_proto::auth::v1::key_service_client::KeyServiceClient;
use hapa_proto::system::v1::GetHealthRequest;
use hapa_proto::system::v1::system_service_client::SystemServiceClient;
use hapa_test_harness::{Identity, ServerProcess, Store, TOKEN, TestMesh, hapa, signal, within};
use prost::Message as _;
use serde_json::Value;
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{ConnectOptions as _, Connection as _, Executor as _};
use tokio::process::Command;
use tokio::time::{Duration, sleep};
use tonic::transport::Endpoint;

use crate::api::generate::question;

const POLL_INTERVAL: Duration = Duration::from_millis(50);
const PEPPER: &str = "--api-key-pepper=another-pepper-of-more-than-32-characters";
const OTHER_PEPPER: &str = "made with another API_KEY_PEPPER";

/// A command on this folder, with ports of its own.
fn command(role: &str, folder: &Path) -> Command {
    let mut command = hapa();
    command.args([role, "--port=0", "--metrics-port=0"]).env("DATA_DIR", folder);
    command.env("MESH_TOKEN", TOKEN).env("AI_MODEL_ENDPOINT", "http://127.0.0.1:1/v1");
    command
}

/// Runs a command that must refuse; its exit code and what it said.
async fn refused(mut command: Command) -> (Option<i32>, String) {
    let done = within("a refusal", command.kill_on_drop(true).output()).await.unwrap();
    (done.status.code(), String::from_utf8(done.stderr).unwrap())
}

#[tokio::test]
async fn a_second_process_on_a_folder_is_refused_with_the_holder_named() {
    let folder = tempfile::tempdir().unwrap();
    let all = ServerProcess::start(command("all", folder.path())).await;
    let holder = format!("hapa all (process {})", all.child.id().unwrap());
    for role in ["all", "auth", "errors"] {
        let (code, said) = refused(command(role, folder.path())).await;
        assert_eq!(code, Some(78), "{role}: {said}");
        assert!(said.contains("DATA_DIR") && said.contains(&holder), "{role}: {said}");
    }
    // A process that only reads the folder is not refused.
    let mut create = hapa();
    create.args(["key", "create", "--name=x", "--owner=x", "--all-scopes"]);
    create.env("DATA_DIR", folder.path()).env("MESH_TOKEN", TOKEN);
    create.env("HAPA_ADDRESS", format!("http://{}", all.mesh));
    let made = within("a key", create.output()).await.unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let mut doctor = hapa();
    let doctor = doctor.args(["doctor", "--json"]).env("DATA_DIR", folder.path());
    let told = within("the doctor", doctor.output()).await.unwrap();
    let told = String::from_utf8(told.stdout).unwrap();
    assert!(told.contains(&holder), "{told}");
}

#[tokio::test]
async fn roles_share_a_folder_and_neither_a_file_in_it_nor_the_folder_with_a_whole_mesh() {
    let folder = tempfile::tempdir().unwrap();
    let auth = ServerProcess::start(command("auth", folder.path())).await;
    let mut errors = command("errors", folder.path());
    errors.env("AUTH_ADDRESS", format!("http://{}", auth.mesh));
    let errors = ServerProcess::start(errors).await;
    let process = |serving: &ServerProcess| format!("(process {})", serving.child.id().unwrap());
    let (code, said) = refused(command("all", folder.path())).await;
    assert_eq!(code, Some(78), "{said}");
    let holders = format!("hapa auth {}, hapa errors {}", process(&auth), process(&errors));
    assert!(said.contains(&holders), "{said}");
    let (code, said) = refused(command("auth", folder.path())).await;
    assert_eq!(code, Some(78), "{said}");
    assert!(said.contains("auth.db is in use by hapa auth") && said.contains(&process(&auth)));
}

#[tokio::test]
async fn a_file_that_database_url_names_is_of_one_process() {
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let file = one.path().join("hapa.db");
    let on = |folder: &Path| {
        let mut command = command("all", folder);
        command.env("DATABASE_URL", format!("sqlite://{}?mode=rwc", file.display()));
        command
    };
    let first = ServerProcess::start(on(one.path())).await;
    let (code, said) = refused(on(two.path())).await;
    assert_eq!(code, Some(78), "{said}");
    let process = format!("hapa.db is in use by hapa all (process {})", first.child.id().unwrap());
    assert!(said.contains(&process), "{said}");
}

/// Runs a process that creates every store in the folder, and a key. The write-ahead logs are empty afterwards.
async fn filled(folder: &Path) -> String {
    let mut serving = ServerProcess::start(command("all", folder)).await;
    let endpoint = Endpoint::from_shared(format!("http://{}", serving.mesh)).unwrap();
    let mut keys = KeyServiceClient::new(Identity::Mesh.on(endpoint.connect_lazy()));
    let made = within("a key", keys.create_key(TestMesh::dev_key())).await.unwrap();
    signal(&serving.child, "-TERM").await;
    within("the process to end", serving.child.wait()).await.unwrap();
    for name in ["auth", "errors", "analytics"] {
        let options = SqliteConnectOptions::new().filename(folder.join(format!("{name}.db")));
        let mut connection = options.connect().await.unwrap();
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").await.unwrap();
        connection.close().await.unwrap();
    }
    made.into_inner().key_text
}

fn keep(folder: &Path) -> String {
    format!("--data-dir={}", folder.display())
}

/// Ways to damage a file.
type Damage = (&'static str, fn(&Path));

const DAMAGES: &[Damage] = &[
    ("zeros", |file| fs::write(file, vec![0; 40_960]).unwrap()),
    ("text", |file| fs::write(file, "no database at all".repeat(1_000)).unwrap()),
    ("short", |file| fs::write(file, b"SQLite format 3\0").unwrap()),
    ("truncated", |file| {
        let text = fs::read(file).unwrap();
        fs::write(file, &text[..text.len() / 2]).unwrap();
    }),
    ("header", |file| {
        let mut text = fs::read(file).unwrap();
        text[..16].fill(b'x');
        fs::write(file, text).unwrap();
    }),
    ("format", |file| {
        let mut text = fs::read(file).unwrap();
        text[18..20].fill(9);
        fs::write(file, text).unwrap();
    }),
    ("pages", |file| {
        let mut text = fs::read(file).unwrap();
        text[4_096..].fill(b'x');
        fs::write(file, text).unwrap();
    }),
    ("directory", |file| {
        fs::remove_file(file).unwrap();
        fs::create_dir(file).unwrap();
    }),
    ("gone", |file| {
        fs::remove_file(file).unwrap();
        fs::write(file.with_extension("db-wal"), vec![b'x'; 4_096]).unwrap();
    }),
    ("log", |file| fs::create_dir(file.with_extension("db-wal")).unwrap()),
];

/// What was set aside of a store, without what stood beside it.
fn set_aside(folder: &Path, name: &str) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|file| file.starts_with(&format!("{name}.damaged-"))).collect()
}

#[tokio::test]
async fn a_damaged_store_of_errors_or_analytics_is_set_aside_and_the_mesh_serves() {
    for (store, (name, damage)) in
        ["errors.db", "analytics.db"].iter().cycle().zip(DAMAGES.iter().chain(&DAMAGES[..1]))
    {
        let folder = tempfile::tempdir().unwrap();
        let key = filled(folder.path()).await;
        let file = folder.path().join(store);
        damage(&file);
        let before = fs::read(&file).ok();
        let mesh = TestMesh::start_with(&[&keep(folder.path())]).await;
        within("a call", mesh.client_with(&key).generate_code(question("q"))).await.unwrap();
        let aside = set_aside(folder.path(), store);
        assert!(!aside.is_empty(), "{name}: nothing was set aside");
        if let Some(before) = before {
            let kept = aside.iter().filter_map(|file| fs::read(folder.path().join(file)).ok());
            assert!(kept.into_iter().any(|kept| kept == before), "{name}: it was changed");
        }
        let (status, page) = mesh.page("/readyz").await;
        assert_eq!(status, 200, "{name}: {page}");
        let begin = aside[0].trim_end_matches("-wal").trim_end_matches("-shm");
        assert!(page.contains(begin), "{name}: {page}");
        let mut system = SystemServiceClient::new(mesh.channel_as(Identity::Anonymous));
        let health = within("health", system.get_health(GetHealthRequest {})).await.unwrap();
        let health = health.into_inner();
        assert_eq!(health.status, "degraded", "{name}: {health:?}");
        // Health recovers after the damaged files are moved away.
        for file in &aside {
            let (from, to) = (folder.path().join(file), folder.path().join(format!("x{file}")));
            fs::rename(from, to).unwrap();
        }
        within("health to come back", async {
            while mesh.page("/readyz").await.1 != "ready\n" {
                sleep(POLL_INTERVAL).await;
            }
        })
        .await;
    }
}

#[tokio::test]
async fn a_store_that_is_whole_is_left_where_it_is() {
    let whole: &[Damage] = &[
        ("a log of something else", |file| {
            fs::write(file.with_extension("db-wal"), "no log".repeat(1_000)).unwrap();
        }),
        ("empty", |file| fs::write(file, "").unwrap()),
        ("absent", |file| fs::remove_file(file).unwrap()),
    ];
    for (name, change) in whole {
        let folder = tempfile::tempdir().unwrap();
        filled(folder.path()).await;
        change(&folder.path().join("errors.db"));
        let mesh = TestMesh::start_with(&[&keep(folder.path())]).await;
        assert_eq!(mesh.page("/readyz").await, (200, "ready\n".to_owned()), "{name}");
        assert!(set_aside(folder.path(), "errors.db").is_empty(), "{name}");
    }
    // A store of a later version is not damaged, because a rollback of the binary is allowed.
    let folder = tempfile::tempdir().unwrap();
    filled(folder.path()).await;
    let file = folder.path().join("errors.db");
    let mut connection = SqliteConnectOptions::new().filename(&file).connect().await.unwrap();
    let later =
        "INSERT INTO migrations_errors (version, description, success, checksum, execution_time)
                 VALUES (9999, 'later', TRUE, x'00', 0)";
    connection.execute(later).await.unwrap();
    connection.close().await.unwrap();
    let mesh = TestMesh::start_with(&[&keep(folder.path())]).await;
    assert_eq!(mesh.page("/readyz").await, (200, "ready\n".to_owned()));
    assert!(set_aside(folder.path(), "errors.db").is_empty());
}

#[tokio::test]
async fn a_damaged_store_of_keys_is_left_as_it_is_and_named() {
    for (name, damage) in DAMAGES {
        let folder = tempfile::tempdir().unwrap();
        filled(folder.path()).await;
        let file = folder.path().join("auth.db");
        damage(&file);
        let before = fs::read(&file).ok();
        let (code, said) = refused(command("all", folder.path())).await;
        assert_eq!(code, Some(1), "{name}: {said}");
        let path = file.display().to_string();
        assert!(said.contains(&path) && said.contains("backup"), "{name}: {said}");
        assert!(set_aside(folder.path(), "auth.db").is_empty(), "{name}");
        assert_eq!(fs::read(&file).ok(), before, "{name}: it was changed");
    }
}

#[tokio::test]
async fn one_file_of_all_services_is_never_set_aside() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("hapa.db");
    fs::write(&file, vec![b'x'; 8_192]).unwrap();
    let mut errors = command("errors", folder.path());
    errors.env("AUTH_ADDRESS", "http://127.0.0.1:1");
    errors.env("DATABASE_URL", format!("sqlite://{}", file.display()));
    let (code, said) = refused(errors).await;
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("hapa.db") && said.contains("backup"), "{said}");
    assert_eq!(fs::read(&file).unwrap(), vec![b'x'; 8_192]);
}

#[tokio::test]
async fn another_pepper_is_said_until_the_one_before_is_back_or_given_up() {
    for store in Store::both().await {
        let folder = tempfile::tempdir().unwrap();
        let keep = keep(folder.path());
        let mut mesh = TestMesh::start_on(&store, &[&keep]).await;
        let key = mesh.key.clone();
        mesh.begin_shutdown();
        mesh.wait_until_stopped().await;
        // A different pepper: a configured one is treated like a generated one.
        let mut mesh = TestMesh::start_on(&store, &[&keep, PEPPER]).await;
        let page = mesh.page("/readyz").await;
        assert!(page.0 == 200 && page.1.contains(OTHER_PEPPER), "{page:?}");
        mesh.begin_shutdown();
        mesh.wait_until_stopped().await;
        // During a rotation both peppers are valid, and afterwards the new one only.
        let before = fs::read_to_string(folder.path().join("key-pepper")).unwrap();
        let also = format!("--api-key-pepper-previous={before}");
        let mut mesh = TestMesh::start_on(&store, &[&keep, PEPPER, &also]).await;
        assert_eq!(mesh.page("/readyz").await, (200, "ready\n".to_owned()));
        within("a call", mesh.client_with(&key).generate_code(question("q"))).await.unwrap();
        mesh.begin_shutdown();
        mesh.wait_until_stopped().await;
        let mut mesh = TestMesh::start_on(&store, &[&keep, PEPPER]).await;
        assert_eq!(mesh.page("/readyz").await, (200, "ready\n".to_owned()));
        within("a call", mesh.client_with(&key).generate_code(question("q"))).await.unwrap();
        mesh.begin_shutdown();
        mesh.wait_until_stopped().await;
        // The new pepper can be accepted while the process serves.
        let mesh = TestMesh::start_on(&store, &[&keep]).await;
        assert!(mesh.page("/readyz").await.1.contains(OTHER_PEPPER));
        let mut accept = hapa();
        accept.args(["migrate", "auth", "--accept-pepper"]).env("DATA_DIR", folder.path());
        let done = within("a migration", accept.env("DATABASE_URL", store.url()).output()).await;
        let done = done.unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        within("health to come back", async {
            loop {
                let page = mesh.page("/readyz").await.1;
                if page == "ready\n" {
                    break;
                }
                sleep(POLL_INTERVAL).await;
            }
        })
        .await;
    }
}

#[tokio::test]
async fn an_empty_store_of_keys_beside_events_of_earlier_calls_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("spool-1.db");
    let options = SqliteConnectOptions::new().filename(&file).create_if_missing(true);
    let mut spool = options.connect().await.unwrap();
    let table =
        "CREATE TABLE spool (id INTEGER PRIMARY KEY, rank INTEGER NOT NULL, at INTEGER NOT NULL,
                 body BLOB NOT NULL)";
    spool.execute(table).await.unwrap();
    // Events of calls between services do not prove that keys existed.
    let (own, caller) =
        (UsageEvent::default(), UsageEvent { owner: "ann".to_owned(), ..UsageEvent::default() });
    let insert = "INSERT INTO spool (rank, at, body) VALUES (0, 0, ?)";
    sqlx::query(insert).bind(own.encode_to_vec()).execute(&mut spool).await.unwrap();
    let words = "the auth store is empty";
    let quiet = ServerProcess::start(command("all", folder.path())).await;
    assert!(!quiet.has_said(words), "{:?}", quiet.said);
    drop(quiet);
    sqlx::query(insert).bind(caller.encode_to_vec()).execute(&mut spool).await.unwrap();
    spool.close().await.unwrap();
    let engine = Engine::start();
    let mut command = command("all", folder.path());
    command.env("AI_MODEL_ENDPOINT", engine.url());
    let serving = ServerProcess::start(command).await;
    assert!(serving.has_said(words), "{:?}", serving.said);
    let (status, page) = serving.page("/readyz").await;
    assert!(status == 200 && page.contains("spool-1.db"), "{page}");
    // After its first key, the store is no longer reported as empty.
    let endpoint = Endpoint::from_shared(format!("http://{}", serving.mesh)).unwrap();
    let mut keys = KeyServiceClient::new(Identity::Mesh.on(endpoint.connect_lazy()));
    within("a key", keys.create_key(TestMesh::dev_key())).await.unwrap();
    within("health to come back", async {
        while serving.page("/readyz").await.1 != "ready\n" {
            sleep(POLL_INTERVAL).await;
        }
    })
    .await;
}

#[tokio::test]
async fn the_doctor_finds_what_is_wrong_with_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    filled(folder.path()).await;
    fs::write(folder.path().join("analytics.db"), "no database").unwrap();
    fs::write(folder.path().join("errors.db.damaged-20260101T000000Z"), "").unwrap();
    let mut doctor = hapa();
    doctor.args(["doctor", "--json"]).env("DATA_DIR", folder.path());
    doctor.env("API_KEY_PEPPER", "another-pepper-of-more-than-32-characters");
    doctor.env("LOG_FILE", folder.path()).env("MAX_CONNECTIONS", "4294967295");
    doctor.env("MESH_TOKEN", "a".repeat(32)).env("ENVIRONMENT", "production");
    let told = within("the doctor", doctor.output()).await.unwrap();
    let report: Value = serde_json::from_slice(&told.stdout).unwrap();
    let rows = report["findings"].as_array().unwrap();
    for what in [
        "settings",
        "file of the store of errors",
        "file of the store of analytics",
        "pepper",
        "LOG_FILE",
    ] {
        let is_it = |row: &&Value| row["what"].as_str().unwrap().starts_with(what);
        let row = rows.iter().find(is_it).unwrap_or_else(|| panic!("nothing of {what}: {report}"));
        assert!(row["state"] == "wrong" && row["advice"] != "", "{row}");
    }
    let of_descriptors = |row: &&Value| row["what"] == "descriptors";
    let row = rows.iter().find(of_descriptors).expect("it looks at descriptors");
    assert!(row["state"] == "note" || row["found"].to_string().contains("no limit"), "{row}");
}
