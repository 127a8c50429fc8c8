//! The compose files: every service is bounded and restricted, and no secret has a guessable default.

use std::collections::BTreeSet;

use hapa_policy::manifests::{READ, ROLES, SECRETS, is_pinned, list, services, word};
use hapa_policy::{crates, read as text};
use serde_json::Value;

/// Both files; what the second says of a service of the first is only a part.
fn whole() -> impl Iterator<Item = (&'static str, &'static Value)> {
    let second = services("compose.observability.yaml");
    services("compose.yaml").chain(second.filter(|(_, service)| service["image"].is_string()))
}

#[test]
fn every_service_is_bounded_and_locked_up() {
    assert!(whole().count() >= 15);
    for (name, service) in whole() {
        assert!(is_pinned(word(&service["image"])), "{name}: {}", service["image"]);
        assert_eq!(service["read_only"], true, "{name}");
        assert_eq!(service["cap_drop"], serde_json::json!(["ALL"]), "{name}");
        assert_eq!(
            service["security_opt"],
            serde_json::json!(["no-new-privileges:true"]),
            "{name}"
        );
        assert!(service["deploy"]["resources"]["limits"]["memory"].is_string(), "{name}");
        assert!(service["logging"]["options"]["max-size"].is_string(), "{name} fills the disk");
        let is_job = service["restart"] == "no";
        // These two have nothing in their images that could ask.
        let is_mute = matches!(name, "otel-collector" | "jaeger");
        assert!(is_job || is_mute || service["healthcheck"]["test"].is_array(), "{name}");
    }
}

#[test]
fn a_role_is_given_the_time_that_it_takes_to_drain() {
    let number = |value: &Value| word(value).trim_end_matches('s').parse::<u64>().unwrap();
    for role in ROLES {
        let (_, service) = services("compose.yaml").find(|(name, _)| *name == role).unwrap();
        let settings = &service["environment"];
        let drain =
            number(&settings["DRAIN_DELAY_SECONDS"]) + number(&settings["DRAIN_TIMEOUT_SECONDS"]);
        assert!(number(&service["stop_grace_period"]) > drain + 5, "{role}");
        assert_eq!(
            settings["ENVIRONMENT"], "production",
            "{role}: which refuses secrets that are not set"
        );
    }
}

#[test]
fn no_secret_has_a_default_and_the_example_has_none() {
    let example = text("infra/.env.example");
    let assigned = |name: &str| example.lines().any(|line| line == format!("{name}="));
    let mut required = BTreeSet::new();
    for (file, read) in READ["raw"].as_object().unwrap() {
        for (service, read) in read["services"].as_object().unwrap() {
            for (name, value) in read["environment"].as_object().into_iter().flatten() {
                if !SECRETS.contains(&name.as_str()) && !name.ends_with("PASSWORD") {
                    continue;
                }
                let value = word(value);
                // An engine may ask for no key, and most of the time no secret is being replaced.
                let is_second = name.ends_with("_PREVIOUS");
                let optional = name == "AI_MODEL_API_KEY" || is_second;
                let optional = optional && value == format!("${{{name}:-}}");
                let (_, rest) = value
                    .split_once("${")
                    .unwrap_or_else(|| panic!("{file}: {service}: {name} is {value}"));
                let (variable, _) = rest.split_once(':').unwrap();
                assert!(optional || rest.contains(":?"), "{file}: {service}: {name} has a default");
                if !optional {
                    required.insert(variable.to_owned());
                }
            }
        }
    }
    assert!(required.contains("MESH_TOKEN") && required.contains("API_KEY_PEPPER"));
    for variable in required {
        assert!(assigned(&variable), "infra/.env.example has no empty {variable}");
    }
    assert!(text(".gitignore").contains("/infra/.env\n"), "what is filled in stays here");
}

#[test]
fn the_image_contains_no_secret_and_runs_as_an_unprivileged_user() {
    let file = text("infra/Dockerfile");
    let users: Vec<_> = file.lines().filter(|line| line.starts_with("USER ")).collect();
    assert_eq!(users, ["USER 65532:65532"; 2], "of each image that is made");
    let stages: Vec<_> = file.lines().filter(|line| line.starts_with("FROM ")).collect();
    assert!(stages.last().unwrap().starts_with("FROM scratch"), "{stages:?}");
    for stage in &stages {
        let image = stage.split(' ').nth(1).unwrap();
        assert!(image == "scratch" || is_pinned(image), "{stage}");
    }
    let version = text("Cargo.toml").lines().find_map(|line| {
        line.strip_prefix("rust-version = \"").map(|rest| rest.trim_end_matches('"').to_owned())
    });
    assert!(stages[0].contains(&format!("rust:{}", version.unwrap())), "{}", stages[0]);
    // Every manifest of the workspace is there before the layer of dependencies is made.
    for member in crates() {
        let line = format!("COPY {member}/Cargo.toml {member}/");
        assert!(file.lines().any(|copied| copied == line), "{line}");
    }
    let ignored = text(".dockerignore");
    assert!(ignored.lines().any(|line| line == "*"), "what is not named stays outside");
    assert!(
        ignored
            .lines()
            .filter(|line| line.starts_with('!'))
            .all(|line| !line.contains("env") || line == "!gateway/envoy.yaml")
    );
    assert!(list(&READ["compose"]["compose.yaml"]["services"]["auth"]["tmpfs"]).len() == 1);
}
