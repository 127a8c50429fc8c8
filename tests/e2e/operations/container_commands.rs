//! Commands of containers besides the roles: migrations, probes, and the gateway's configuration.

use std::process::Output;

use hapa_policy::root;
use hapa_test_harness::{Gateway, TestMesh, hapa, within};
use tokio::process::Command;

async fn run(command: &mut Command) -> Output {
    within("the command", command.output()).await.unwrap()
}

fn told(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).unwrap()
}

#[tokio::test]
async fn migrate_makes_the_stores_that_are_named_and_can_be_asked_again() {
    let folder = tempfile::tempdir().unwrap();
    let migrate = async |roles: &[&str]| {
        run(hapa().arg("migrate").args(roles).env("DATA_DIR", folder.path())).await
    };
    let output = migrate(&["errors"]).await;
    assert!(output.status.success());
    assert_eq!(told(&output), "errors: up to date\n");
    assert!(folder.path().join("errors.db").exists() && !folder.path().join("auth.db").exists());
    for _ in 0..2 {
        let output = migrate(&[]).await;
        assert_eq!(told(&output), "auth: up to date\nerrors: up to date\nanalytics: up to date\n");
    }
    assert!(!migrate(&["codegen"]).await.status.success(), "codegen keeps no store");
}

#[tokio::test]
async fn migrate_says_which_store_it_could_not_open() {
    let mut command = hapa();
    command.args(["migrate", "auth"]).env("DATABASE_URL", "mysql://u:secret@nowhere/d");
    let output = run(&mut command).await;
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(78), "{words}");
    assert!(words.contains("DATABASE_URL") && !words.contains("secret"), "{words}");
}

#[tokio::test]
async fn probe_says_by_its_exit_code_whether_a_service_can_work() {
    let mesh = TestMesh::start().await;
    let mesh = format!("http://{}", mesh.address);
    let probe = async |address: &str, service: &str| {
        let mut command = hapa();
        command.args(["probe", "--service", service]).env("HAPA_ADDRESS", address);
        run(&mut command).await.status.code()
    };
    assert_eq!(probe(&mesh, "").await, Some(0), "without a credential");
    assert_eq!(probe(&mesh, "hapa.auth.v1.KeyService").await, Some(0));
    assert_ne!(probe(&mesh, "hapa.moon.v1.MoonService").await, Some(0));
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    assert_ne!(probe(&format!("http://{nobody}"), "").await, Some(0), "nobody is there");
}

#[tokio::test]
async fn envoy_takes_the_configuration_with_and_without_what_is_only_for_deployments() {
    let deployed = [
        ("GATEWAY_HOST", "0.0.0.0"),
        ("GATEWAY_PORT", "8000"),
        ("GATEWAY_METRICS_PORT", "9902"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://otel-collector:4317"),
        ("CODEGEN_ADDRESS", "http://codegen:50051"),
        ("AUTH_ADDRESS", "http://auth:50051"),
        ("ANALYTICS_ADDRESS", "http://analytics:50051"),
        ("ERRORS_ADDRESS", "http://errors:50051"),
        ("CORS_ORIGINS", ""),
    ];
    for (settings, is_deployed) in [(&[][..], false), (&deployed[..], true)] {
        let folder = tempfile::tempdir().unwrap();
        let config = Gateway::write(folder.path(), settings).await.unwrap();
        let text = std::fs::read_to_string(&config).unwrap();
        for word in ["name: watch", "cluster_name: traces", "address: \"errors\""] {
            assert_eq!(text.contains(word), is_deployed, "{word} with {settings:?}");
        }
        let mut envoy = Command::new(root().join(".tools/bin/envoy"));
        envoy
            .args(["--mode", "validate", "--log-level", "error", "-c"])
            .arg(&config)
            .kill_on_drop(true);
        let output = run(&mut envoy).await;
        let words = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{words}");
    }
}
