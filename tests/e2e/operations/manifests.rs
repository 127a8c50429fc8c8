//! What manifests configure exists in the binary: settings, and the metrics that alerts and dashboards use.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use hapa_engine_sim::Fault;
use hapa_policy::manifests::{
    containers, environment, list, listed, overlays, pod, services, word, workloads,
};
use hapa_proto::codegen::v1::GenerateCodeRequest;
use hapa_test_harness::{FakeAnalytics, MtlsCluster, TestCluster, TestMesh, hapa, within};

/// Exported only if certificates are configured.
const CERTIFIED: &[&str] = &["hapa_certificate_expiry_seconds"];

/// Checks that the binary has these settings when it is called with these arguments.
async fn has_settings(arguments: &[&str], names: impl Iterator<Item = &String>) {
    let output = within("hapa --help", hapa().args(arguments).arg("--help").output()).await;
    let help = String::from_utf8(output.unwrap().stdout).unwrap();
    let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
    for name in names {
        let is_known =
            help.contains(&format!("[env: {name}=")) || help.contains(&format!("[env: {name}]"));
        assert!(is_known, "hapa {} has no setting {name}", arguments.join(" "));
    }
}

/// Runs the binary's checks with the environment of each pod.
#[tokio::test]
async fn every_setting_of_kubernetes_exists_in_the_binary_and_is_valid() {
    let (mut checked, folder) = (0, tempfile::tempdir().unwrap());
    for (overlay, objects) in overlays() {
        for (container, _) in workloads(objects).flat_map(|workload| containers(pod(workload))) {
            if !word(&container["image"]).starts_with("hapa:") {
                continue;
            }
            let found = environment(objects, container);
            let arguments: Vec<_> = list(&container["args"]).iter().map(word).collect();
            has_settings(&arguments, found.keys()).await;
            // A secret of its kind, so that what depends on it can be checked.
            let filled = found.into_iter().map(|(name, value)| {
                let secret = match name.as_str() {
                    "DATABASE_URL" => "postgres://u:p@nowhere/d",
                    "REDIS_URL" => "redis://nowhere",
                    _ => "3f9c0d4b7a1e6f2830c5d9b1a7e4f6c2",
                };
                (name, value.unwrap_or_else(|| secret.to_owned()))
            });
            let mut command = hapa();
            match arguments[0] {
                "gateway" => command.args(["gateway", "--out"]).arg(folder.path()),
                "migrate" => continue,
                role => command.args(["config", "--role", role]),
            };
            let output = within("the command", command.envs(filled).output()).await.unwrap();
            let words = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{overlay}: {arguments:?}: {words}");
            checked += 1;
        }
    }
    assert_eq!(checked, 3 * 5, "each role and the gateway, in each overlay");
}

#[tokio::test]
async fn every_setting_of_compose_exists_in_the_binary() {
    let mut checked = 0;
    for (_, service) in services("compose.yaml") {
        if word(&service["image"]).starts_with("hapa:") {
            let arguments: Vec<_> = list(&service["command"]).iter().map(word).collect();
            has_settings(&arguments, service["environment"].as_object().unwrap().keys()).await;
            checked += 1;
        }
    }
    assert_eq!(checked, 6, "four roles, migrate and gateway-config");
}

/// The metrics of deployed processes, after successful, failed and cached calls.
#[tokio::test]
async fn a_running_mesh_exports_every_metric_that_alerts_and_dashboards_use() {
    let analytics = FakeAnalytics::start().await;
    let address = format!("http://{}", analytics.address);
    let settings = [
        ("ERRORS_ADDRESS", address.as_str()),
        ("ANALYTICS_ADDRESS", address.as_str()),
        ("CACHE_TTL", "600"),
    ];
    let cluster = TestCluster::start_with(&settings).await;
    let key = cluster.create_key(TestMesh::dev_key()).await.key_text;
    let question =
        |text: &str| GenerateCodeRequest { user_question: text.to_owned(), ..Default::default() };
    let replica = &cluster.replicas[0];
    for text in ["known", "known"] {
        replica.client(&key).generate_code(question(text)).await.unwrap();
    }
    cluster.engine.once(Fault::status(500));
    replica.client(&key).generate_code(question("fails")).await.unwrap_err();
    let told = |page: &str| {
        let lines = page.lines().filter(|line| !line.starts_with('#'));
        let names = lines.filter_map(|line| line.split(['{', ' ']).next().map(str::to_owned));
        names.collect::<BTreeSet<_>>()
    };
    let wanted = listed().into_iter().filter(|(_, source)| source == "hapa");
    let mut wanted: BTreeSet<_> = wanted.map(|(metric, _)| metric).collect();
    // Only processes with certificates export their expiry.
    let certified = MtlsCluster::start(&[]).await;
    let ending = told(&certified.page("auth", "/metrics").await);
    for metric in CERTIFIED {
        assert!(wanted.remove(*metric) && ending.contains(*metric), "nobody tells {metric}");
    }
    certified.finish().await;
    // What is delivered is counted a moment after the calls.
    let until = Instant::now() + Duration::from_secs(30);
    loop {
        let seen = told(replica.metrics().await.text());
        let missing: Vec<_> = wanted.difference(&seen).collect();
        if missing.is_empty() {
            break;
        }
        assert!(Instant::now() < until, "nobody tells {missing:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
