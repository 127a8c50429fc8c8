//! Circles of imports: no more than three modules of a chassis crate import each other.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::LazyLock;

use hapa_policy::{crates, rust, sources};
use regex::Regex;

/// Modules of one circle.
const MAX_CIRCLE_SIZE: usize = 3;

/// A module's path in its crate, such as `tls::reload`; empty for lib.rs.
fn module(path: &Path, folder: &str) -> String {
    let path = path.strip_prefix(format!("{folder}/src")).unwrap().with_extension("");
    let parts: Vec<_> = path.iter().map(|part| part.to_str().unwrap()).collect();
    let parts = if parts == ["lib"] { &[][..] } else { &parts[..] };
    parts.join("::")
}

/// The paths that follow `crate::` in code, with lists in braces written out.
fn imports(code: &str) -> Vec<String> {
    static PATH: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"\bcrate::").unwrap());
    let mut found = Vec::new();
    for start in PATH.find_iter(code) {
        write_out("", &code[start.end()..], &mut found);
    }
    found
}

/// Writes out one path, and returns the rest after it.
fn write_out<'a>(prefix: &str, text: &'a str, found: &mut Vec<String>) -> &'a str {
    let text = text.trim_start();
    if let Some(mut rest) = text.strip_prefix('{') {
        loop {
            rest = rest.trim_start();
            if let Some(after) = rest.strip_prefix('}') {
                return after;
            }
            rest = write_out(prefix, rest, found).trim_start();
            match rest.strip_prefix(',') {
                Some(next) => rest = next,
                None if rest.starts_with('}') => {}
                None => return rest,
            }
        }
    }
    let end = text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len());
    let path = format!("{prefix}{}", &text[..end]);
    match text[end..].strip_prefix("::") {
        Some(next) if !next.starts_with('<') => write_out(&format!("{path}::"), next, found),
        _ => {
            found.push(path);
            &text[end..]
        }
    }
}

/// The modules that `lib.rs` names for an item that it exports.
fn exports(lib: &str) -> BTreeMap<String, String> {
    let exports = Regex::new(r"(?s)\bpub(?:\([^)]*\))? use (\w[^;]*);").unwrap();
    let mut found = BTreeMap::new();
    for export in exports.captures_iter(lib) {
        let mut paths = Vec::new();
        write_out("", &export[1], &mut paths);
        for path in paths {
            if let Some((module, item)) = path.rsplit_once("::") {
                found.insert(item.to_owned(), module.to_owned());
            }
        }
    }
    found
}

/// The imports between the modules of a crate.
fn graph(folder: &str) -> BTreeMap<String, BTreeSet<String>> {
    let all = sources(&format!("{folder}/src")).into_iter();
    let all = all.filter(|(path, _)| !rust::is_test(path));
    let code: BTreeMap<_, _> = all
        .map(|(path, text)| (module(&path, folder), rust::without_tests(&rust::code(&text))))
        .collect();
    let exported = exports(&code[""]);
    let target = |path: &str| {
        let path = match path.split("::").next().and_then(|item| exported.get(item)) {
            Some(module) => module.as_str(),
            None => path,
        };
        let parts: Vec<_> = path.split("::").collect();
        let begins = (1..=parts.len()).rev().map(|end| parts[..end].join("::"));
        begins.into_iter().find(|begin| code.contains_key(begin))
    };
    let edges = code.iter().filter(|(name, _)| !name.is_empty()).map(|(name, code)| {
        let targets = imports(code).into_iter().filter_map(|path| target(&path));
        (name.clone(), targets.filter(|target| target != name).collect())
    });
    edges.collect()
}

/// The modules that can be reached from one.
fn reachable(graph: &BTreeMap<String, BTreeSet<String>>, from: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut waiting = vec![from.to_owned()];
    while let Some(module) = waiting.pop() {
        for next in graph.get(&module).into_iter().flatten() {
            if found.insert(next.clone()) {
                waiting.push(next.clone());
            }
        }
    }
    found
}

#[test]
fn no_circle_of_imports_has_more_than_three_modules() {
    let chassis: Vec<_> =
        crates().into_iter().filter(|folder| folder.contains("/chassis/")).collect();
    assert_eq!(chassis.len(), 5, "the crates of the chassis");
    let mut wrong = Vec::new();
    for folder in chassis {
        let graph = graph(&folder);
        let reached: BTreeMap<_, _> =
            graph.keys().map(|module| (module.clone(), reachable(&graph, module))).collect();
        let circles: BTreeSet<Vec<String>> = graph
            .keys()
            .map(|module| {
                let mutual = reached[module]
                    .iter()
                    .filter(|other| reached.get(*other).is_some_and(|back| back.contains(module)));
                mutual.cloned().collect()
            })
            .collect();
        let large = circles.into_iter().filter(|circle| circle.len() > MAX_CIRCLE_SIZE);
        wrong.extend(large.map(|circle| format!("{folder}/src: {}", circle.join(", "))));
    }
    assert!(
        wrong.is_empty(),
        "more than {MAX_CIRCLE_SIZE} modules import each other in a circle:\n{}",
        wrong.join("\n")
    );
}

#[test]
fn imports_are_written_out() {
    let code = "use crate::{a::{b, c::D}, e};\nlet x = crate::f::g::<u8>();";
    assert_eq!(imports(code), ["a::b", "a::c::D", "e", "f::g"]);
}
