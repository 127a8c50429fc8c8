//! Rules of the repository: dependencies, files, sizes, and published tables.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use hapa_core::rpc_error::{ErrorCode, Retry, code_name, http_status};
use hapa_policy::{read, root, sources};
use hapa_telemetry::metrics_list::{METRICS, MetricKind, MetricSpec};

const LONGEST_FILE: usize = 600;

const SERVICE: &[&str] =
    &["hapa-proto", "hapa-core", "hapa-store", "hapa-telemetry", "hapa-transport"];

const ALL: &[&str] = &[
    "hapa-proto",
    "hapa-core",
    "hapa-store",
    "hapa-telemetry",
    "hapa-transport",
    "hapa-server",
    "hapa-auth",
    "hapa-codegen",
    "hapa-errors",
    "hapa-analytics",
];

#[test]
fn arrows_point_one_way() {
    let allowed: BTreeMap<&str, &[&str]> = BTreeMap::from([
        ("proto", &[][..]),
        ("services/chassis/core", &["hapa-proto"][..]),
        ("services/chassis/store", &["hapa-proto", "hapa-core"][..]),
        ("services/chassis/telemetry", &["hapa-proto", "hapa-core"][..]),
        ("services/chassis/transport", &["hapa-proto", "hapa-core", "hapa-telemetry"][..]),
        ("services/chassis/server", SERVICE),
        ("services/auth", SERVICE),
        ("services/codegen", SERVICE),
        ("services/errors", SERVICE),
        ("services/analytics", SERVICE),
        ("services/hapa", ALL),
    ]);
    for parent in ["services", "services/chassis"] {
        for folder in std::fs::read_dir(root().join(parent)).unwrap() {
            let name = format!("{parent}/{}", folder.unwrap().file_name().to_str().unwrap());
            let is_listed = name == "services/chassis" || allowed.contains_key(name.as_str());
            assert!(is_listed, "{name} has no arrows in this table");
        }
    }
    for (folder, allowed) in allowed {
        let manifest: toml::Table = read(format!("{folder}/Cargo.toml")).parse().unwrap();
        let sections = ["dependencies", "dev-dependencies", "build-dependencies"];
        let tables = sections.iter().filter_map(|section| manifest.get(*section)?.as_table());
        for name in tables.flat_map(toml::Table::keys).filter(|name| name.starts_with("hapa")) {
            assert!(allowed.contains(&name.as_str()), "{folder} must not know {name}");
        }
    }
}

#[test]
fn sql_stays_in_stores_and_the_chassis_store() {
    let words = ["sqlx::query", "SELECT ", "INSERT INTO", "PRAGMA "];
    for (path, text) in sources("services") {
        let is_store = path.ends_with("store.rs")
            || path.components().any(|part| part.as_os_str() == "store")
            || path.ends_with("chassis/store/src/database.rs");
        assert!(
            is_store || !words.iter().any(|word| text.contains(word)),
            "{} has SQL",
            path.display()
        );
    }
}

/// Only there can a value become part of SQL text: everywhere else text is `&'static str` or a
/// `SqlText`, which is made of nothing else.
#[test]
fn assembled_sql_is_asserted_to_be_safe_in_one_listed_place() {
    let listed = ["services/chassis/store/src/sql.rs", "tests/harness/src/postgres.rs"];
    let words = ["AssertSqlSafe", "QueryBuilder"];
    let asserting: Vec<_> = ["services", "tests", "proto"]
        .into_iter()
        .flat_map(sources)
        .filter(|(path, _)| !path.ends_with("policy/repository.rs"))
        .filter(|(_, text)| words.iter().any(|word| text.contains(word)))
        .map(|(path, _)| path.to_str().unwrap().to_owned())
        .collect();
    assert_eq!(asserting, listed);
}

#[test]
fn files_are_short_and_say_what_they_are() {
    for folder in ["proto", "services", "tests"] {
        for (path, text) in sources(folder) {
            assert!(text.lines().count() <= LONGEST_FILE, "{} is too long", path.display());
            assert!(text.starts_with("//!"), "{} does not say what it is", path.display());
        }
    }
}

#[test]
fn every_error_code_is_documented_as_the_code_says_it() {
    let rows: Vec<_> = ErrorCode::ALL
        .iter()
        .map(|code| {
            let entry = code.entry();
            let none = || "–".to_owned();
            let grpc = entry.grpc.map_or_else(none, |grpc| code_name(grpc).to_owned());
            let http = entry.grpc.map_or_else(none, |grpc| http_status(grpc).to_string());
            let retry = match entry.retry {
                Retry::No => "no",
                Retry::Yes => "yes",
                Retry::AfterDelay => "after `RetryInfo`",
            };
            let (name, reason, meaning, advice) =
                (entry.name, entry.reason, entry.meaning, entry.advice);
            format!("| {name} | {meaning} | `{reason}` | {grpc} | {http} | {retry} | {advice} |")
        })
        .collect();
    let page = read("docs/errors.md");
    let documented: Vec<_> = page.lines().filter(|line| line.starts_with("| E")).collect();
    assert_eq!(documented, rows, "docs/errors.md should hold:\n{}\n", rows.join("\n"));
}

#[test]
fn every_metric_is_described_and_documented_as_the_code_says_it() {
    let rows: Vec<_> = METRICS
        .iter()
        .map(|MetricSpec { name, kind, unit, labels, help, .. }| {
            let kind = match kind {
                MetricKind::Counter => "counter",
                MetricKind::Gauge => "gauge",
                MetricKind::Histogram(_) => "histogram",
            };
            let unit = unit.map_or("–", |unit| unit.as_str());
            let labels: Vec<_> = labels.iter().map(|label| format!("`{label}`")).collect();
            format!("| `{name}` | {kind} | {unit} | {} | {help} |", labels.join(" "))
        })
        .collect();
    let page = read("docs/metrics.md");
    let documented: Vec<_> = page.lines().filter(|line| line.starts_with("| `")).collect();
    assert_eq!(documented, rows, "docs/metrics.md should hold:\n{}\n", rows.join("\n"));
    let counted: BTreeSet<_> =
        sources("services").iter().flat_map(|(path, text)| counted_in(path, text)).collect();
    let known: BTreeSet<_> = METRICS.iter().map(|known| known.name.to_owned()).collect();
    assert_eq!(counted, known, "services/chassis/telemetry/src/metrics_list.rs lists every metric");
}

/// The names of the metrics that a source counts in.
fn counted_in(path: &Path, text: &str) -> Vec<String> {
    let calls = ["metrics::counter!(", "metrics::gauge!(", "metrics::histogram!("];
    let calls = calls.iter().flat_map(|call| text.split(call).skip(1));
    let named = calls.filter(|rest| !rest.starts_with("*name")).map(|rest| {
        let rest = rest.trim_start();
        if let Some(name) = rest.strip_prefix('"') {
            return name.split('"').next().unwrap().to_owned();
        }
        let constant = rest.split([',', ')']).next().unwrap();
        let begin = format!("const {constant}: &str = \"");
        let value = text.split(begin.as_str()).nth(1);
        let value = value.unwrap_or_else(|| panic!("{}: what is {constant}", path.display()));
        value.split('"').next().unwrap().to_owned()
    });
    named.collect()
}

#[test]
fn every_setting_is_documented() {
    let readme = read("docs/settings.md");
    for (path, text) in sources("services") {
        for part in text.split("env = \"").skip(1) {
            let name = part.split('"').next().unwrap();
            assert!(
                readme.contains(&format!("`{name}`")),
                "{name} of {} is not documented",
                path.display()
            );
        }
    }
}
