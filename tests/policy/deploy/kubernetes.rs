//! Every workload of every overlay is bounded, restricted, probed, and ended with a sufficient grace period.

use std::collections::{BTreeMap, BTreeSet};

use hapa_policy::manifests::{
    SECRETS, containers, environment, is_pinned, list, named, of_kind, overlays, pod, word,
    workloads,
};
use hapa_policy::read as text;
use serde_json::Value;

#[test]
fn every_container_is_bounded_locked_up_and_watched() {
    for (overlay, objects) in overlays() {
        let namespace = of_kind(objects, "Namespace").next().unwrap();
        let labels = &namespace["metadata"]["labels"];
        assert_eq!(labels["pod-security.kubernetes.io/enforce"], "restricted");
        for workload in workloads(objects) {
            let (pod, name) = (pod(workload), word(&workload["metadata"]["name"]));
            let place = format!("{overlay}: {name}");
            let context = &pod["securityContext"];
            assert_eq!(context["runAsNonRoot"], true, "{place}");
            assert!(context["runAsUser"].as_u64().is_some_and(|user| user > 0), "{place}");
            assert_eq!(context["seccompProfile"]["type"], "RuntimeDefault", "{place}");
            assert_eq!(pod["automountServiceAccountToken"], false, "{place}");
            assert_eq!(pod["enableServiceLinks"], false, "{place}: AUTH_PORT is no setting");
            assert_eq!(word(&pod["serviceAccountName"]), name, "{place}");
            for (container, stays) in containers(pod) {
                let place = format!("{place}/{}", word(&container["name"]));
                assert!(is_pinned(word(&container["image"])), "{place}: {}", container["image"]);
                for bound in ["requests", "limits"] {
                    for what in ["cpu", "memory"] {
                        let set = &container["resources"][bound][what];
                        assert!(!set.is_null(), "{place} has no {bound} of {what}");
                    }
                }
                let context = &container["securityContext"];
                assert_eq!(context["readOnlyRootFilesystem"], true, "{place}");
                assert_eq!(context["allowPrivilegeEscalation"], false, "{place}");
                assert_eq!(context["capabilities"]["drop"], serde_json::json!(["ALL"]), "{place}");
                for probe in ["livenessProbe", "readinessProbe"].iter().filter(|_| stays) {
                    assert!(container[*probe].is_object(), "{place} has no {probe}");
                }
            }
            for volume in list(&pod["volumes"]).iter().filter(|v| v["emptyDir"].is_object()) {
                assert!(volume["emptyDir"]["sizeLimit"].is_string(), "{place}: {volume}");
            }
        }
    }
}

/// After the drain: saying so, background tasks, and the shippers' last word, as chassis/src/server.rs has it.
const REST: u64 = 1 + 2 + 2;

#[test]
fn a_pod_lives_on_until_its_calls_are_drained() {
    let seconds = |found: &BTreeMap<String, Option<String>>, name: &str| -> u64 {
        found
            .get(name)
            .and_then(Option::as_ref)
            .unwrap_or_else(|| panic!("{name}"))
            .parse()
            .unwrap()
    };
    for (overlay, objects) in overlays() {
        for workload in workloads(objects) {
            let pod = pod(workload);
            let (container, name) = (&pod["containers"][0], word(&workload["metadata"]["name"]));
            let found = environment(objects, container);
            let before = container["lifecycle"]["preStop"]["sleep"]["seconds"].as_u64();
            let drain = match name {
                "auth" | "codegen" | "errors" | "analytics" => {
                    let delay = seconds(&found, "DRAIN_DELAY_SECONDS");
                    // Envoy polls the health of a role every one or two seconds.
                    assert!(delay >= 4 && before.unwrap() > 0, "{overlay}: {name} goes too soon");
                    before.unwrap() + delay + seconds(&found, "DRAIN_TIMEOUT_SECONDS") + REST
                }
                "gateway" => seconds(&found, "DRAIN_SECONDS") + 10,
                _ => continue,
            };
            let grace = pod["terminationGracePeriodSeconds"].as_u64().unwrap();
            assert!(grace > drain, "{overlay}: {name} is killed after {grace} s of {drain} s");
        }
    }
}

#[test]
fn replicas_are_spread_and_scaled_and_kept() {
    for (overlay, objects) in overlays() {
        for name in ["auth", "codegen", "errors", "analytics", "gateway"] {
            let workload = workloads(objects).find(|w| w["metadata"]["name"] == name).unwrap();
            let keys: BTreeSet<_> = list(&pod(workload)["topologySpreadConstraints"])
                .iter()
                .map(|spread| word(&spread["topologyKey"]))
                .collect();
            let both = ["kubernetes.io/hostname", "topology.kubernetes.io/zone"];
            assert_eq!(keys, both.into(), "{overlay}: {name}");
        }
        for scaler in of_kind(objects, "HorizontalPodAutoscaler") {
            let target = &scaler["spec"]["scaleTargetRef"];
            let workload = named(objects, word(&target["kind"]), word(&target["name"]));
            let fixed = &workload["spec"]["replicas"];
            assert!(
                fixed.is_null(),
                "{overlay}: every apply would undo what {target} was scaled to"
            );
        }
        for budget in of_kind(objects, "PodDisruptionBudget") {
            let wanted = &budget["spec"]["selector"]["matchLabels"];
            let fits = |w: &&Value| w["spec"]["selector"]["matchLabels"] == *wanted;
            assert_eq!(workloads(objects).filter(fits).count(), 1, "{overlay}: {budget}");
        }
    }
}

#[test]
fn every_secret_is_a_reference_and_every_reference_is_documented() {
    let page = text("docs/deployment.md");
    let mut referenced = BTreeSet::new();
    for (overlay, objects) in overlays() {
        assert_eq!(of_kind(objects, "Secret").count(), 0, "{overlay} has a secret in it");
        for (container, _) in workloads(objects).flat_map(|workload| containers(pod(workload))) {
            for entry in list(&container["env"]) {
                let reference = &entry["valueFrom"]["secretKeyRef"];
                if reference.is_object() {
                    let row = format!(
                        "| `{}` | `{}` |",
                        word(&reference["name"]),
                        word(&reference["key"])
                    );
                    assert!(page.contains(&row), "docs/deployment.md has no row {row}");
                    referenced.insert(row);
                } else {
                    let name = word(&entry["name"]);
                    assert!(!SECRETS.contains(&name), "{overlay}: {name} is there to read");
                }
            }
        }
        for map in of_kind(objects, "ConfigMap") {
            let named = |name: &&str| !map["data"][name].is_null();
            assert!(!SECRETS.iter().any(named), "{overlay}: {}", map["metadata"]);
        }
    }
    let rows = page.lines().filter(|line| line.starts_with("| `hapa-")).count();
    assert_eq!(rows, referenced.len(), "docs/deployment.md tells of secrets that nobody wants");
}
