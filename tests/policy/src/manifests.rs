//! The manifests of k8s/ and infra/, and the gateway's template, as kustomize and compose read them.

use std::collections::BTreeMap;
use std::process::Command;
use std::sync::LazyLock;

use serde_json::Value;

use crate::{read, root};

/// The roles, each a process of its own.
pub const ROLES: [&str; 4] = ["auth", "codegen", "errors", "analytics"];

/// Settings with values that must not stand in a manifest.
pub const SECRETS: [&str; 11] = [
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

/// The folder of alerts and dashboards.
pub const MONITORING: &str = "k8s/components/monitoring";

/// What tests/policy/read_manifests.py prints. It runs once per process.
pub static READ: LazyLock<Value> = LazyLock::new(|| {
    let done = Command::new(root().join(".tools/python/bin/python"))
        .arg(root().join("tests/policy/read_manifests.py"))
        .output()
        .expect("`infra/tools/install test` installs what reads manifests");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    serde_json::from_slice(&done.stdout).unwrap()
});

/// The objects of each overlay.
pub fn overlays() -> impl Iterator<Item = (&'static str, &'static Vec<Value>)> {
    let overlays = READ["overlays"].as_object().unwrap();
    overlays.iter().map(|(name, objects)| (name.as_str(), objects.as_array().unwrap()))
}

/// The objects of a kind.
pub fn of_kind<'a>(objects: &'a [Value], kind: &str) -> impl Iterator<Item = &'a Value> {
    objects.iter().filter(move |object| object["kind"] == kind)
}

/// The object of a kind with this name.
///
/// # Panics
///
/// If there is none.
pub fn named<'a>(objects: &'a [Value], kind: &str, name: &str) -> &'a Value {
    let mut found = of_kind(objects, kind).filter(|object| object["metadata"]["name"] == name);
    found.next().unwrap_or_else(|| panic!("there is no {kind} {name}"))
}

/// The elements of an array; none of any other value.
pub fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// The text of a string; empty for any other value.
pub fn word(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// Whether an image has a tag that names a version, so that it never changes by itself.
pub fn is_pinned(image: &str) -> bool {
    let tag = image.rsplit('/').next().and_then(|name| name.split_once(':')).map(|(_, tag)| tag);
    // Images of this repository get their tag where they are built.
    let own = ["dev", "test", "0.1.0", ""];
    let is_own = image.starts_with("hapa:") || image.starts_with("hapa-model:");
    tag.is_some_and(|tag| {
        tag.contains(|c: char| c.is_ascii_digit()) || is_own && own.contains(&tag)
    })
}

/// The kinds of objects that run pods.
const WORKLOADS: [&str; 3] = ["Deployment", "StatefulSet", "Job"];

/// The objects that run pods.
pub fn workloads(objects: &[Value]) -> impl Iterator<Item = &Value> {
    WORKLOADS.iter().flat_map(|kind| of_kind(objects, kind))
}

/// The pod's specification of a workload.
pub fn pod(workload: &Value) -> &Value {
    &workload["spec"]["template"]["spec"]
}

/// The containers of a pod, each with whether it keeps running: init containers end, and have no probes.
pub fn containers(pod: &Value) -> impl Iterator<Item = (&Value, bool)> {
    let first = list(&pod["initContainers"]).iter().map(|container| (container, false));
    first.chain(list(&pod["containers"]).iter().map(|container| (container, true)))
}

/// The environment of a container: each name with its value, or `None` for a secret.
pub fn environment(objects: &[Value], container: &Value) -> BTreeMap<String, Option<String>> {
    let mut found = BTreeMap::new();
    for from in list(&container["envFrom"]) {
        let data = &named(objects, "ConfigMap", word(&from["configMapRef"]["name"]))["data"];
        for (name, value) in data.as_object().unwrap() {
            found.insert(name.clone(), Some(word(value).to_owned()));
        }
    }
    for entry in list(&container["env"]) {
        let from = &entry["valueFrom"]["configMapKeyRef"];
        let value = if from.is_object() {
            let map = named(objects, "ConfigMap", word(&from["name"]));
            Some(word(&map["data"][word(&from["key"])]).to_owned())
        } else {
            entry["value"].as_str().map(str::to_owned)
        };
        found.insert(word(&entry["name"]).to_owned(), value);
    }
    found
}

/// The services of a compose file.
pub fn services(file: &str) -> impl Iterator<Item = (&'static str, &'static Value)> {
    let services = READ["compose"][file]["services"].as_object().unwrap();
    services.iter().map(|(name, service)| (name.as_str(), service))
}

/// The metrics that alerts, dashboards and autoscalers use, each with its source.
pub fn listed() -> BTreeMap<String, String> {
    let list = read(format!("{MONITORING}/metrics.txt"));
    let rows =
        list.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.split_once(' '));
    rows.map(|(source, name)| (name.to_owned(), source.to_owned())).collect()
}
