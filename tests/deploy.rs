//! What a platform team is given: k8s/ and infra/ as kustomize and compose read them, checked against
//! their schemas and against what is said of them. Nothing here starts a container.

mod certificates;
mod commands;
mod compose;
mod door;
mod gateway_template;
mod kubernetes;
mod metrics;
mod network;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;

use serde_json::Value;

/// The roles, each a process of its own.
const ROLES: [&str; 4] = ["auth", "codegen", "errors", "analytics"];

/// What tests/deploy/read.py prints; rendered once.
static READ: LazyLock<Value> = LazyLock::new(|| {
    let done = Command::new(root().join(".tools/python/bin/python"))
        .arg(root().join("tests/deploy/read.py"))
        .output()
        .expect("`infra/tools/install test` installs what reads manifests");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    serde_json::from_slice(&done.stdout).unwrap()
});

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn text(path: &str) -> String {
    let path = root().join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The objects of each overlay.
fn overlays() -> impl Iterator<Item = (&'static str, &'static Vec<Value>)> {
    let overlays = READ["overlays"].as_object().unwrap();
    overlays.iter().map(|(name, objects)| (name.as_str(), objects.as_array().unwrap()))
}

fn of_kind<'a>(objects: &'a [Value], kind: &str) -> impl Iterator<Item = &'a Value> {
    objects.iter().filter(move |object| object["kind"] == kind)
}

fn named<'a>(objects: &'a [Value], kind: &str, name: &str) -> &'a Value {
    let mut found = of_kind(objects, kind).filter(|object| object["metadata"]["name"] == name);
    found.next().unwrap_or_else(|| panic!("there is no {kind} {name}"))
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn word(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// Settings whose values nobody may read in a manifest.
const SECRETS: [&str; 11] = [
    "MESH_TOKEN",
    "MESH_TOKEN_PREVIOUS",
    "API_KEY_PEPPER",
    "API_KEY_PEPPER_PREVIOUS",
    "SECRET_KEY",
    "SECRET_KEY_PREVIOUS",
    "DATABASE_URL",
    "REDIS_URL",
    "AI_MODEL_API_KEY",
    "POSTGRES_PASSWORD",
    "REDIS_PASSWORD",
];

/// A tag that names a version: no image moves by itself.
fn is_pinned(image: &str) -> bool {
    let tag = image.rsplit('/').next().and_then(|name| name.split_once(':')).map(|(_, tag)| tag);
    // What this repository builds is named by who builds it.
    let own = ["dev", "test", "0.1.0", ""];
    let is_own = image.starts_with("hapa:") || image.starts_with("hapa-model:");
    tag.is_some_and(|tag| {
        tag.contains(|c: char| c.is_ascii_digit()) || is_own && own.contains(&tag)
    })
}

#[test]
fn every_overlay_and_compose_file_fits_its_schema() {
    let wrong: Vec<_> = list(&READ["wrong"]).iter().map(word).collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let names: BTreeSet<_> = overlays().map(|(name, _)| name).collect();
    assert_eq!(names, BTreeSet::from(["dev", "everything", "prod"]));
    assert!(overlays().all(|(_, objects)| objects.len() > 30), "something was rendered");
}

#[test]
fn each_role_stands_in_compose_in_kubernetes_and_in_the_gateway() {
    let clusters = list(&READ["gateway"]["static_resources"]["clusters"]);
    for role in ROLES {
        let service = &READ["compose"]["compose.yaml"]["services"][role];
        assert_eq!(service["command"], serde_json::json!([role]), "compose does not run {role}");
        let leads_to_role = |cluster: &Value| cluster["load_assignment"]["cluster_name"] == role;
        assert!(clusters.iter().any(leads_to_role), "no way leads to {role}");
        for (overlay, objects) in overlays() {
            let kind = if role == "codegen" { "StatefulSet" } else { "Deployment" };
            let workload = named(objects, kind, role);
            let container = &workload["spec"]["template"]["spec"]["containers"][0];
            assert_eq!(
                container["args"],
                serde_json::json!([role]),
                "{overlay} does not run {role}"
            );
            assert_eq!(named(objects, "Service", role)["spec"]["clusterIP"], "None");
            named(objects, "ServiceAccount", role);
            named(objects, "PodDisruptionBudget", role);
        }
    }
}
