//! The allowed connections in a cluster, derived from the policies: those of this table and no others. Each is
//! allowed on both ends.

use std::collections::BTreeSet;

use hapa_policy::manifests::{list, of_kind, overlays, word, workloads};
use serde_json::Value;

/// From, to, port.
type Way = (String, String, u64);

const LABEL: &str = "app.kubernetes.io/name";

/// The allowed connections within the mesh: from, to, port.
const WAYS: &[(&str, &[&str], u64)] = &[
    ("auth", &["errors", "analytics"], 50051),
    ("codegen", &["auth", "errors", "analytics"], 50051),
    ("errors", &["auth", "analytics"], 50051),
    ("analytics", &["auth", "errors"], 50051),
    ("gateway", &["auth", "codegen", "errors", "analytics"], 50051),
    ("auth", &["postgres"], 5432),
    ("errors", &["postgres"], 5432),
    ("analytics", &["postgres"], 5432),
    ("auth", &["redis"], 6379),
    ("codegen", &["redis"], 6379),
    ("errors", &["redis"], 6379),
    ("analytics", &["redis"], 6379),
    ("codegen", &["vllm"], 8000),
    ("codegen", &["model"], 8002),
    ("prometheus", &["auth", "codegen", "errors", "analytics"], 9464),
    ("prometheus", &["gateway"], 9902),
    ("prometheus", &["vllm"], 8000),
];

fn expected() -> BTreeSet<Way> {
    let ways = WAYS.iter().flat_map(|(from, all, port)| all.iter().map(move |to| (from, to, port)));
    ways.map(|(from, to, port)| ((*from).to_owned(), (*to).to_owned(), *port)).collect()
}

fn label(selector: &Value) -> &str {
    word(&selector["matchLabels"][LABEL])
}

/// The ways that policies open on one end: as the callee's (ingress) or the caller's (egress). A peer
/// that is no pod of ours is "*".
fn ways(objects: &[Value], ingress: bool) -> BTreeSet<Way> {
    let (rules, peers) = if ingress { ("ingress", "from") } else { ("egress", "to") };
    let mut found = BTreeSet::new();
    for policy in of_kind(objects, "NetworkPolicy") {
        let own = label(&policy["spec"]["podSelector"]).to_owned();
        for rule in list(&policy["spec"][rules]) {
            let others: Vec<_> = match list(&rule[peers]) {
                [] => vec!["*".to_owned()],
                peers => peers
                    .iter()
                    .map(|peer| match label(&peer["podSelector"]) {
                        "" => "*".to_owned(),
                        name => name.to_owned(),
                    })
                    .collect(),
            };
            assert!(!list(&rule["ports"]).is_empty(), "every port: {policy}");
            for port in list(&rule["ports"]) {
                let port = port["port"].as_u64().unwrap();
                found.extend(others.iter().cloned().map(|other| {
                    if ingress { (other, own.clone(), port) } else { (own.clone(), other, port) }
                }));
            }
        }
    }
    found
}

#[test]
fn only_listed_connections_are_allowed() {
    for (overlay, objects) in overlays() {
        let deny =
            of_kind(objects, "NetworkPolicy").find(|p| p["metadata"]["name"] == "default-deny");
        let expected_deny =
            serde_json::json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]});
        assert_eq!(deny.unwrap()["spec"], expected_deny, "{overlay}");
        let (mut into, mut out) = (ways(objects, true), ways(objects, false));
        let door = ("*".to_owned(), "gateway".to_owned(), 8000);
        assert!(into.remove(&door), "{overlay}: the door is closed");
        // Names for all; stores outside of the cluster; an identity provider's keys.
        out.retain(|(from, to, port)| {
            let outside = match from.as_str() {
                "" => *port == 53,
                "auth" => matches!(port, 443 | 5432 | 6379),
                "errors" | "analytics" => matches!(port, 5432 | 6379),
                "codegen" => *port == 6379,
                _ => false,
            };
            to != "*" || !outside
        });
        assert_eq!(into, expected(), "{overlay}: what callees let in");
        assert_eq!(out, expected(), "{overlay}: what callers are let out to");
    }
}

#[test]
fn every_workload_has_a_policy_of_its_own() {
    for (overlay, objects) in overlays() {
        for workload in workloads(objects) {
            let labels = &workload["spec"]["template"]["metadata"]["labels"];
            let own = |policy: &&Value| {
                label(&policy["spec"]["podSelector"]) == word(&labels[LABEL])
                    && list(&policy["spec"]["policyTypes"]).len() == 2
            };
            let policies = of_kind(objects, "NetworkPolicy").filter(own).count();
            assert_eq!(policies, 1, "{overlay}: {}", workload["metadata"]["name"]);
        }
    }
}
