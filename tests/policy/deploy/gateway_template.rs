//! The template of Envoy's configuration: which services it routes to.

use hapa_policy::manifests::{READ, list, word};
use hapa_policy::read as text;
use serde_json::Value;

const PUBLIC_SERVICES: [&str; 9] = [
    "hapa.codegen.v1.CodegenService",
    "hapa.codegen.v1.CacheService",
    "hapa.auth.v1.KeyService",
    "hapa.auth.v1.UserService",
    "hapa.auth.v1.SessionService",
    "hapa.auth.v1.AuditService",
    "hapa.analytics.v1.AnalyticsService",
    "hapa.errors.v1.ErrorTrackingService",
    "hapa.system.v1.SystemService",
];

fn named<'a>(items: &'a Value, name: &str) -> &'a Value {
    let mut found = list(items).iter().filter(|item| item["name"] == name);
    &found.next().unwrap_or_else(|| panic!("no {name}"))["typed_config"]
}

#[test]
fn the_gateway_routes_to_every_public_service_and_to_no_private_one() {
    let listener = &READ["gateway"]["static_resources"]["listeners"][0];
    let http = named(
        &listener["filter_chains"][0]["filters"],
        "envoy.filters.network.http_connection_manager",
    );
    let json = named(&http["http_filters"], "envoy.filters.http.grpc_json_transcoder");
    let json: Vec<_> = list(&json["services"]).iter().map(word).collect();
    let routes = list(&http["route_config"]["virtual_hosts"][0]["routes"]);
    let routes: Vec<_> = routes.iter().filter(|route| route["route"].is_object()).collect();
    let begin = |route: &Value| {
        let (prefix, path) = (&route["match"]["prefix"], &route["match"]["path"]);
        prefix.as_str().or(path.as_str()).unwrap().to_owned()
    };
    for public in PUBLIC_SERVICES {
        assert!(json.contains(&public), "{public} has no JSON");
        let folder = format!("/{public}/");
        let leads_there = |route: &&Value| {
            let begin = begin(route);
            begin.starts_with(&folder) || folder.starts_with(&begin)
        };
        assert!(routes.iter().any(leads_there), "{public} has no route");
    }
    assert!(!json.iter().any(|service| service.contains("AuthService")));
    assert!(!routes.iter().any(|route| begin(route).contains("AuthService")));
    // Of this service one RPC is internal, so that its routes name each public one.
    let mut analytics = routes.iter().filter(|route| begin(route).contains("analytics"));
    assert!(analytics.all(|route| route["match"]["path"].is_string()));
    assert!(!text("gateway/envoy.yaml").contains("/RecordEvents"));
}
