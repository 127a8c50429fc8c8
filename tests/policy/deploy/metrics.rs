//! Alerts and dashboards use existing metrics, and every alert has advice.

use std::collections::BTreeSet;
use std::process::Command;

use hapa_core::rpc_error::ErrorCode;
use hapa_policy::manifests::{MONITORING, list, listed, of_kind, overlays, word};
use hapa_policy::{read as text, root};
use serde_json::Value;

/// Words of PromQL that stand between metrics.
const WORDS: &[&str] = &["and", "or", "unless", "bool", "offset", "group_left", "group_right"];

/// The names of metrics in a PromQL expression: what is no word, no number, no function and no label.
pub(crate) fn metrics_in(expression: &str) -> BTreeSet<String> {
    let bare = without_selectors(expression);
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
    let is_function =
        |after: &str| ["(", "by ", "by(", "without "].iter().any(|next| after.starts_with(next));
    let (mut found, mut rest, mut labels) = (BTreeSet::new(), bare.as_str(), false);
    while let Some(start) = rest.find(|c: char| is_part(c) || c == ')') {
        rest = &rest[start..];
        if let Some(after) = rest.strip_prefix(')') {
            (labels, rest) = (false, after);
            continue;
        }
        let (name, after) = rest.split_at(rest.find(|c| !is_part(c)).unwrap_or(rest.len()));
        let is_number = name.starts_with(|c: char| c.is_ascii_digit());
        if matches!(name, "by" | "without" | "on" | "ignoring") {
            labels = true;
        } else if !(labels || is_number || WORDS.contains(&name) || is_function(after.trim_start()))
        {
            found.insert(name.to_owned());
        }
        rest = after;
    }
    found
}

/// Without what stands in braces, brackets and quotes.
fn without_selectors(expression: &str) -> String {
    let mut bare = String::with_capacity(expression.len());
    let (mut depth, mut quoted) = (0_usize, None);
    for c in expression.chars() {
        if let Some(quote) = quoted {
            quoted = Some(quote).filter(|quote| *quote != c);
            continue;
        }
        match c {
            '"' | '\'' => quoted = Some(c),
            '{' | '[' => depth += 1,
            '}' | ']' => depth = depth.saturating_sub(1),
            c if depth == 0 => bare.push(c),
            _ => {}
        }
    }
    bare
}

/// Every metric that rules, dashboards and autoscalers rely on.
pub(crate) fn used() -> BTreeSet<String> {
    let rules = text(format!("{MONITORING}/rules.yml"));
    let mut found: BTreeSet<_> =
        rules_of(&rules).flat_map(|rule| metrics_in(word(&rule["expr"]))).collect();
    for board in dashboards() {
        let targets = list(&board["panels"]).iter().flat_map(|panel| list(&panel["targets"]));
        found.extend(targets.flat_map(|target| metrics_in(word(&target["expr"]))));
    }
    for scaler in overlays().flat_map(|(_, objects)| of_kind(objects, "HorizontalPodAutoscaler")) {
        let metrics =
            list(&scaler["spec"]["metrics"]).iter().filter(|metric| metric["type"] == "Pods");
        found.extend(metrics.map(|metric| word(&metric["pods"]["metric"]["name"]).to_owned()));
    }
    found
}

fn rules_of(rules: &str) -> impl Iterator<Item = Value> {
    let read: Value = yaml(rules);
    let groups = list(&read["groups"]).to_vec();
    groups.into_iter().flat_map(|group| list(&group["rules"]).to_vec())
}

fn yaml(text: &str) -> Value {
    let program = "import json, sys, yaml; json.dump(yaml.safe_load(sys.argv[1]), sys.stdout)";
    let python = root().join(".tools/python/bin/python");
    let done = Command::new(python).args(["-c", program, text]).output().unwrap();
    serde_json::from_slice(&done.stdout).unwrap()
}

fn dashboards() -> Vec<Value> {
    let folder = std::fs::read_dir(root().join(MONITORING).join("dashboards")).unwrap();
    let files = folder.map(|entry| std::fs::read_to_string(entry.unwrap().path()).unwrap());
    files.map(|text| serde_json::from_str(&text).unwrap()).collect()
}

#[test]
fn an_expression_is_read_for_its_metrics_alone() {
    let expression = r#"sum by (rpc, code) (rate(a_total{code=~"b_total|c", rpc="x"}[5m])) / on (rpc) vllm:d > 0.05 or vector(0)"#;
    assert_eq!(metrics_in(expression), ["a_total", "vllm:d"].map(str::to_owned).into());
    let expression = "histogram_quantile(0.95, sum by (le) (rate(e_bucket[$__rate_interval]))) > 0.8 * 2048 and f == 0";
    assert_eq!(metrics_in(expression), ["e_bucket", "f"].map(str::to_owned).into());
}

#[test]
fn the_list_of_metrics_is_what_alerts_and_dashboards_use() {
    let listed: BTreeSet<_> = listed().into_keys().collect();
    assert_eq!(listed, used());
}

#[test]
fn every_metric_of_the_mesh_is_in_its_sources() {
    let mut sources = String::new();
    let mut folders = vec![root().join("services")];
    while let Some(folder) = folders.pop() {
        for path in std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|ending| ending == "rs") {
                sources += &std::fs::read_to_string(path).unwrap();
            }
        }
    }
    let mut checked = 0;
    for (metric, source) in listed() {
        match source.as_str() {
            "hapa" => {
                let base =
                    ["_bucket", "_sum", "_count"].iter().find_map(|end| metric.strip_suffix(end));
                let literal = format!("\"{}\"", base.unwrap_or(&metric));
                assert!(sources.contains(&literal), "nobody tells {metric}");
                checked += 1;
            }
            "envoy" => assert!(metric.starts_with("envoy_"), "{metric}"),
            "vllm" => assert!(metric.starts_with("vllm:"), "{metric}"),
            "prometheus" => assert_eq!(metric, "up"),
            other => panic!("{other}: who is that"),
        }
    }
    assert!(checked > 10);
}

#[test]
fn every_alert_and_every_code_has_its_place_in_the_runbook() {
    let page = text("docs/runbook.md");
    let headings: BTreeSet<_> = page.lines().filter_map(|line| line.strip_prefix("### ")).collect();
    let mut expected: BTreeSet<String> = BTreeSet::new();
    for rule in rules_of(&text(format!("{MONITORING}/rules.yml"))) {
        let alert = word(&rule["alert"]).to_owned();
        let url = format!("docs/runbook.md#{}", alert.to_lowercase());
        assert_eq!(word(&rule["annotations"]["runbook_url"]), url);
        assert!(matches!(word(&rule["labels"]["severity"]), "critical" | "warning"), "{alert}");
        assert!(!word(&rule["annotations"]["summary"]).is_empty(), "{alert}");
        expected.insert(alert);
    }
    expected.extend(ErrorCode::ALL.iter().map(|code| code.entry().name.to_owned()));
    let expected: BTreeSet<_> = expected.iter().map(String::as_str).collect();
    assert_eq!(headings, expected);
}

fn promtool(arguments: &[&str]) {
    let folder = root().join(MONITORING);
    let done = Command::new("promtool").args(arguments).current_dir(folder).output();
    let done = done.expect("`infra/tools/install test` installs promtool");
    let words = [done.stdout, done.stderr].concat();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&words));
}

/// As rules, because promtool reads those.
#[test]
fn every_expression_of_a_dashboard_is_one_of_promql() {
    let mut rules = Vec::new();
    for board in dashboards() {
        for target in list(&board["panels"]).iter().flat_map(|panel| list(&panel["targets"])) {
            let filled = [("$__rate_interval", "5m"), ("$__range", "1h"), ("$role", ".*")]
                .iter()
                .fold(word(&target["expr"]).to_owned(), |text, (name, value)| {
                    text.replace(name, value)
                });
            assert!(!filled.contains('$'), "{filled}");
            let record = format!("panel:{}", rules.len());
            rules.push(serde_json::json!({"record": record, "expr": filled}));
        }
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    let rules = serde_json::json!({"groups": [{"name": "panels", "rules": rules}]});
    std::fs::write(file.path(), rules.to_string()).unwrap();
    promtool(&["check", "rules", file.path().to_str().unwrap()]);
}

#[test]
fn alerts_come_when_they_should() {
    promtool(&["check", "rules", "rules.yml"]);
    promtool(&["test", "rules", "rules.test.yml"]);
    promtool(&["check", "config", "--syntax-only", "prometheus.yml"]);
}

#[test]
fn a_dashboard_asks_the_source_that_its_viewer_chose() {
    let boards = dashboards();
    assert_eq!(boards.len(), 2);
    for board in boards {
        let panels = list(&board["panels"]).iter().filter(|panel| panel["type"] != "row");
        let panels: Vec<_> = panels.collect();
        assert!(panels.len() > 10, "{}", board["title"]);
        for panel in panels {
            assert_eq!(panel["datasource"]["uid"], "${datasource}", "{}", panel["title"]);
            assert!(!list(&panel["targets"]).is_empty(), "{}", panel["title"]);
        }
    }
}
