//! The first commands of an operator: the version of the binary, and the state of its dependencies.

use hapa_test_harness::{Certificates, Postgres, RedisServer, TestMesh, hapa, within};
use serde_json::Value;

/// The exit code, and the JSON or text that was printed.
async fn run(arguments: &[&str], settings: &[(&str, &str)]) -> (Option<i32>, String) {
    let mut command = hapa();
    command.args(arguments).envs(settings.iter().copied());
    let done = within("a command", command.output()).await.unwrap();
    (done.status.code(), String::from_utf8(done.stdout).unwrap())
}

/// The state of what begins with `what`.
fn state<'a>(report: &'a Value, what: &str) -> &'a str {
    let mut rows = report["findings"].as_array().unwrap().iter();
    let row = rows.find(|row| row["what"].as_str().unwrap().starts_with(what));
    row.unwrap_or_else(|| panic!("nothing is said of {what}: {report}"))["state"].as_str().unwrap()
}

#[tokio::test]
async fn a_binary_says_what_it_is() {
    let (code, said) = run(&["version", "--json"], &[]).await;
    let about: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(code, Some(0));
    assert_eq!(about["version"], env!("CARGO_PKG_VERSION"));
    assert!(about["rustc"].as_str().unwrap().starts_with("rustc 1."), "{said}");
    assert_eq!(about["profile"], if cfg!(debug_assertions) { "debug" } else { "release" });
    let (code, said) = run(&["version"], &[]).await;
    assert!(code == Some(0) && said.contains(env!("CARGO_PKG_VERSION")), "{said}");
}

#[tokio::test]
async fn the_doctor_finds_a_whole_mesh_well() {
    let (mesh, redis) = (TestMesh::start().await, RedisServer::start().await);
    let (gateway, certificates) = (mesh.gateway(&[]).await, Certificates::make().await);
    let (folder, url) = (mesh.folder().display().to_string(), redis.url());
    let without_version = mesh.engine.url().trim_end_matches("/v1");
    let mut settings = vec![
        ("DATA_DIR", folder.as_str()),
        ("AI_MODEL_ENDPOINT", without_version),
        ("REDIS_URL", &url),
        ("GATEWAY_ADDRESS", &gateway.url),
    ];
    let own = certificates.settings("all");
    settings.extend(own.iter().map(|(name, value)| (*name, value.as_str())));
    let (code, said) = run(&["doctor", "--json"], &settings).await;
    let report: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(report["wrong"], 0, "{said}");
    for what in [
        "settings",
        "store of auth",
        "store of errors",
        "Redis",
        "engine",
        "certificates",
        "disk",
        "outbox",
    ] {
        assert_eq!(state(&report, what), "ok", "{what}: {said}");
    }
    for role in ["codegen", "auth", "analytics", "errors"] {
        assert_eq!(state(&report, &format!("gateway route to {role}")), "ok", "{said}");
    }
    assert_eq!(state(&report, "gateway refusals"), "ok", "{said}");
    assert!(said.contains(&format!("its base URL is {}", mesh.engine.url())), "{said}");
    let (_, shown) = run(&["doctor"], &settings).await;
    assert!(shown.contains("STATE") && !shown.contains("WRONG"), "{shown}");
}

#[tokio::test]
async fn the_doctor_names_all_that_is_wrong_and_ends_with_1() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().display().to_string();
    let settings = [
        ("DATA_DIR", folder.as_str()),
        ("AI_MODEL_ENDPOINT", "http://me:secret@127.0.0.1:1/v1"),
        ("DATABASE_URL", "postgres://me:secret@127.0.0.1:1/nothing"),
        ("REDIS_URL", "redis://127.0.0.1:1"),
        ("GATEWAY_ADDRESS", "http://127.0.0.1:1"),
        ("TLS_CERT_FILE", "/nowhere/tls.crt"),
        ("TLS_KEY_FILE", "/nowhere/tls.key"),
        ("TLS_CA_FILE", "/nowhere/ca.crt"),
    ];
    let (code, said) = run(&["doctor", "--json"], &settings).await;
    let report: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(code, Some(1), "{said}");
    for what in
        ["store of auth", "store of analytics", "Redis", "engine", "gateway", "certificates"]
    {
        assert_eq!(state(&report, what), "wrong", "{what}: {said}");
    }
    assert!(!said.contains("secret"), "{said}");
    let advised = report["findings"].as_array().unwrap().iter();
    let ill = advised.filter(|row| row["state"] == "wrong");
    assert!(ill.clone().count() >= 7 && ill.clone().all(|row| row["advice"] != ""), "{said}");
}

#[tokio::test]
async fn the_doctor_reads_the_clock_and_the_steps_of_a_database_and_changes_nothing() {
    let (database, folder) = (Postgres::database().await, tempfile::tempdir().unwrap());
    let world_like = folder.path().display().to_string();
    let settings = [("DATA_DIR", world_like.as_str()), ("DATABASE_URL", database.url())];
    let look = async || {
        let (_, said) = run(&["doctor", "--json"], &settings).await;
        serde_json::from_str::<Value>(&said).unwrap()
    };
    for _ in 0..2 {
        let before = look().await;
        assert_eq!(
            state(&before, "store of auth"),
            "note",
            "steps are to be taken, also after a look"
        );
        assert_eq!(state(&before, "clock of the store of auth"), "ok");
    }
    let (code, _) = run(&["migrate"], &settings).await;
    assert_eq!(code, Some(0));
    assert_eq!(state(&look().await, "store of auth"), "ok");
}
