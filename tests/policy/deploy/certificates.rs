//! Certificates of the mesh in Kubernetes: each role has its own, at the paths of its settings, and it proves
//! no other role.

use hapa_policy::manifests::{ROLES, list, named, overlays, word};
use serde_json::{Value, json};

fn mounts(workload: &Value) -> bool {
    let container = &workload["spec"]["template"]["spec"]["containers"][0];
    let mount = json!({"name": "tls", "mountPath": "/tls", "readOnly": true});
    list(&container["volumeMounts"]).contains(&mount)
}

fn secret(workload: &Value) -> Option<&Value> {
    let volumes = list(&workload["spec"]["template"]["spec"]["volumes"]);
    volumes.iter().find(|volume| volume["name"] == "tls").map(|volume| &volume["secret"])
}

#[test]
fn each_role_has_a_certificate_that_proves_it_alone_where_its_settings_say() {
    for (overlay, objects) in overlays().filter(|(overlay, _)| *overlay != "dev") {
        for role in ROLES.into_iter().chain(["gateway"]) {
            let place = format!("{overlay}: {role}");
            let spec = &named(objects, "Certificate", &format!("hapa-{role}"))["spec"];
            let names: Vec<_> = list(&spec["dnsNames"]).iter().map(word).collect();
            let bare: Vec<_> = names.iter().filter(|name| !name.contains('.')).collect();
            assert_eq!(bare, [&role], "{place} proves what it is not");
            assert_eq!(
                spec["uris"],
                json!([format!("spiffe://hapa/ns/hapa/sa/{role}")]),
                "{place}"
            );
            for usage in ["server auth", "client auth"] {
                assert!(list(&spec["usages"]).contains(&usage.into()), "{place}: {usage}");
            }
            let hours = |field: &str| -> u64 {
                word(&spec[field]).trim_end_matches('h').parse().expect("hours")
            };
            // Ending is complained of when a tenth is left: a renewal must have come long before.
            assert!(hours("renewBefore") > hours("duration") / 5, "{place}");
            let issuer = word(&spec["issuerRef"]["name"]);
            assert!(named(objects, "Issuer", issuer)["spec"]["ca"].is_object(), "{place}");
            let kind = if role == "codegen" { "StatefulSet" } else { "Deployment" };
            let workload = named(objects, kind, role);
            assert!(mounts(workload), "{place} does not see its certificate");
            let mounted = secret(workload).unwrap_or_else(|| panic!("{place} has no volume"));
            assert_eq!(mounted["secretName"], spec["secretName"], "{place}");
            assert_eq!(mounted["defaultMode"], 0o440, "{place}: others may read its key");
        }
        assert!(objects.iter().all(|object| !object.to_string().contains("http://auth")));
    }
}

#[test]
fn a_cluster_for_trying_needs_no_certificates() {
    let (_, objects) = overlays().find(|(overlay, _)| *overlay == "dev").unwrap();
    assert!(objects.iter().all(|object| object["kind"] != "Certificate"));
    assert!(ROLES.iter().all(|role| {
        let kind = if *role == "codegen" { "StatefulSet" } else { "Deployment" };
        secret(named(objects, kind, role)).is_none()
    }));
}
