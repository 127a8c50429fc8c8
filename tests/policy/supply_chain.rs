//! The supply chain: advisories with and without a network, lists of what is in the binary and the
//! image, and fuzz targets that have something to begin with.

use std::process::{Command, Output};

use hapa_policy::{read as text, root};
use serde_json::Value;

/// The lines of a target of the Makefile, with its head.
fn recipe(target: &str) -> String {
    let makefile = text("Makefile");
    let head = format!("\n{target}:");
    let recipe = makefile.split(&head).nth(1).unwrap_or_else(|| panic!("no target {target}"));
    recipe
        .lines()
        .enumerate()
        .take_while(|(at, line)| *at == 0 || line.starts_with('\t'))
        .map(|(_, line)| line)
        .collect::<Vec<_>>()
        .join("\n")
}

/// Checks the advisories of a database against packages as `cargo metadata` lists them.
fn check(database: &str, metadata: &Value) -> Output {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("metadata.json");
    std::fs::write(&file, metadata.to_string()).unwrap();
    let mut command = Command::new(root().join("infra/advisories"));
    command.arg("--metadata-path").arg(&file).env("ADVISORY_DB", database);
    command.output().unwrap()
}

/// A database with one advisory, about versions of h2 below 0.4.4.
fn database() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let advisory = "```toml\n[advisory]\nid = \"RUSTSEC-2024-9999\"\npackage = \"h2\"\ndate = \"2024-04-03\"\n\
                    [versions]\npatched = [\">= 0.4.4\"]\n```\n\n# An advisory of a test\n\nIt concerns nothing.\n";
    let crates = folder.path().join("crates/h2");
    std::fs::create_dir_all(&crates).unwrap();
    std::fs::write(crates.join("RUSTSEC-2024-9999.md"), advisory).unwrap();
    let identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"];
    for step in [
        &["init", "--quiet", "--initial-branch=main"][..],
        &["add", "--all"],
        &["commit", "--quiet", "-m", "x"],
    ] {
        let mut git = Command::new("git");
        git.arg("-C").arg(folder.path()).args(identity).args(step);
        assert!(git.status().unwrap().success(), "{step:?}");
    }
    folder
}

#[test]
fn a_crate_with_an_advisory_is_refused_and_a_database_that_is_away_is_said() {
    let mut command = Command::new(env!("CARGO"));
    command.args(["metadata", "--format-version=1", "--locked", "--offline"]);
    command.arg("--filter-platform=x86_64-unknown-linux-gnu").current_dir(root());
    let metadata = command.output().unwrap();
    let metadata = String::from_utf8(metadata.stdout).unwrap();
    let ours: Value = serde_json::from_str(&metadata).unwrap();
    let database = database();
    let url = format!("file://{}", database.path().display());
    let good = check(&url, &ours);
    assert!(good.status.success(), "{}", String::from_utf8_lossy(&good.stderr));

    // The same with an h2 that the advisory is about.
    let is_h2 = |package: &&Value| package["name"] == "h2";
    let version =
        ours["packages"].as_array().unwrap().iter().find(is_h2).unwrap()["version"].clone();
    let id = format!("#h2@{}", version.as_str().unwrap());
    let mut bad: Value = serde_json::from_str(&metadata.replace(&id, "#h2@0.4.1")).unwrap();
    for package in bad["packages"].as_array_mut().unwrap() {
        if package["name"] == "h2" {
            package["version"] = "0.4.1".into();
        }
        let needed = package["dependencies"].as_array_mut().unwrap().iter_mut();
        for needed in needed.filter(|needed| needed["name"] == "h2") {
            needed["req"] = "*".into();
        }
    }
    let refused = check(&url, &bad);
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && said.contains("RUSTSEC-2024-9999"), "{said}");

    let away = check("file:///nothing/here", &ours);
    let said = String::from_utf8_lossy(&away.stdout);
    assert!(away.status.success() && said.contains("NOT checked"), "{said}");
}

#[test]
fn make_test_checks_advisories_and_runs_every_fuzz_target_for_20_seconds() {
    assert!(recipe("test").contains("tests/fuzz/run 20"));
    assert!(recipe("test").lines().next().unwrap().contains("lint"));
    assert!(recipe("lint").contains("infra/advisories"));
    // Without cargo-fuzz's own word for it, a target is what the manifest names.
    let manifest: toml::Table = text("tests/fuzz/Cargo.toml").parse().unwrap();
    let targets = manifest["bin"].as_array().unwrap();
    assert_eq!(targets.len(), 3);
    for target in targets.iter().map(|target| target["name"].as_str().unwrap()) {
        let seeds = root().join("tests/fuzz/seeds").join(target);
        let sizes: Vec<_> = std::fs::read_dir(&seeds)
            .unwrap_or_else(|error| panic!("{}: {error}", seeds.display()))
            .map(|seed| seed.unwrap().metadata().unwrap().len())
            .collect();
        assert!(sizes.len() >= 10, "{target} has {} seeds", sizes.len());
        assert!(sizes.iter().all(|size| *size <= 64 * 1024), "{target}: {sizes:?}");
    }
    let ignored = text("tests/fuzz/.gitignore");
    assert!(!ignored.lines().any(|line| line.contains("seeds")));
}

#[test]
fn the_release_and_the_image_say_what_is_in_them() {
    let (file, installs) = (text("infra/Dockerfile"), text("infra/tools/install"));
    let builds = file.lines().filter(|line| line.contains("--release --locked --package hapa"));
    let builds: Vec<_> = builds.collect();
    assert_eq!(builds.len(), 2, "the dependencies, then the sources");
    assert!(builds.iter().all(|line| line.contains("cargo auditable build")), "{builds:?}");
    assert!(recipe("release").contains("cargo-auditable auditable build --release --locked"));
    for tool in ["cargo-auditable@", "cargo-cyclonedx@"] {
        let version = |text: &str| {
            let rest = text.split(tool).nth(1).unwrap_or_else(|| panic!("no {tool}"));
            rest.split([' ', ';', '\n']).next().unwrap().to_owned()
        };
        assert_eq!(version(&file), version(&installs), "{tool}");
    }
    assert!(recipe("sbom").contains("infra/sbom "));
    assert!(
        file.contains("infra/sbom ") && file.contains("$root/usr/local/share/sbom/hapa.cdx.json")
    );
    let passed = text(".dockerignore");
    assert!(passed.lines().any(|line| line == "!infra/sbom"), "the image's build needs it");
}

/// A file outside of the crates that a source includes, by its path from the root.
fn included(text: &str) -> impl Iterator<Item = &str> {
    let includes =
        text.split("include_str!(\"").skip(1).chain(text.split("include_bytes!(\"").skip(1));
    includes.filter_map(|rest| {
        let path = rest.split('"').next()?.trim_start_matches("../");
        (path.contains('/') && path.starts_with("gateway/")).then_some(path)
    })
}

#[test]
fn the_image_is_built_from_every_file_that_the_sources_include() {
    let (image, context) = (text("infra/Dockerfile"), text(".dockerignore"));
    let mut folders = vec![root().join("services")];
    let mut found = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|ending| ending == "rs") {
                found.extend(included(&std::fs::read_to_string(path).unwrap()).map(str::to_owned));
            }
        }
    }
    assert!(found.len() >= 2, "{found:?}");
    for file in found {
        assert!(image.contains(&file), "infra/Dockerfile does not copy {file}");
        assert!(context.lines().any(|line| line == format!("!{file}")), ".dockerignore: {file}");
    }
}
