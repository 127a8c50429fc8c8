//! What a platform team is given: k8s/ and infra/ as kustomize and compose read them, checked against
//! their schemas and against what is said of them. Nothing here starts a container.

mod certificates;
mod compose;
mod gateway_template;
mod kubernetes;
mod metrics;
mod network;

use std::collections::BTreeSet;

use hapa_policy::manifests::{READ, ROLES, list, named, overlays, word};
use serde_json::Value;

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
