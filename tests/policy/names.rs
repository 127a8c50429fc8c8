//! Names: no denied identifiers, no two types of one crate with one name, and constants that state what they are.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use hapa_policy::{rust, sources};
use regex::Regex;

/// Identifiers that no definition may have.
const DENIED: &[&str] = &[
    // types
    "Away",
    "Believing",
    "Bell",
    "Board",
    "Busy",
    "Callers",
    "Desk",
    "Door",
    "Era",
    "Fault",
    "Flight",
    "Flights",
    "Fleet",
    "Gathered",
    "Guest",
    "Held",
    "Keeper",
    "Known",
    "Late",
    "Life",
    "Line",
    "Looked",
    "Manner",
    "Nobody",
    "Ongoing",
    "Pairs",
    "Parrot",
    "Part",
    "Patience",
    "Place",
    "Presented",
    "Proof",
    "Proven",
    "Ride",
    "Said",
    "Seat",
    "Seated",
    "Seen",
    "Shown",
    "Sieve",
    "Spool",
    "Spot",
    "Stranger",
    "Tally",
    "Told",
    "Traced",
    "Troubles",
    "Truth",
    "Who",
    "Wire",
    "World",
    "Wrong",
    // functions and modules
    "believe",
    "believing",
    "fleet",
    "flight",
    "give_way",
    "hear",
    "heir",
    "ill",
    "join_or",
    "kept",
    "look",
    "looks",
    "moment",
    "sit_down",
    "spool",
    "stand_in_line",
    "suffer",
    "take_in",
    "take_turn",
    "tell",
    "tell_times",
    // constants
    "AHEAD",
    "BLIND",
    "ENOUGH",
    "FARTHEST",
    "LONGEST",
    "LOOK",
    "MOST",
    "PATIENCE",
    "REMEMBERED",
    "SIGN",
    "TOGETHER",
    "TRUSTED",
    "WAITING",
];

/// Beginnings of constants that are denied, whatever follows.
const DENIED_BEGINNINGS: &[&str] = &["LONGEST_", "MOST_"];

/// Definitions with denied names that are terms of their own: the folder and the name.
const EXCEPTIONS: &[(&str, &str)] = &[("tests/engine-sim", "Fault")];

/// The endings of a constant of time or size.
const ENDINGS: &[&str] = &[
    "AFTER",
    "AGE",
    "BYTES",
    "CAPACITY",
    "COUNT",
    "DELAY",
    "INTERVAL",
    "LEN",
    "LIMIT",
    "PERIOD",
    "SECONDS",
    "SIZE",
    "THRESHOLD",
    "TIMEOUT",
    "TTL",
];

/// Constants that are units themselves.
const UNITS: &[&str] = &["DAY", "HOUR", "MICROSECOND", "MILLISECOND", "MINUTE", "SECOND"];

/// The beginnings of a constant of time or size.
const BEGINNINGS: &[&str] = &["MAX_", "MIN_"];

static DEFINITION: LazyLock<Regex> = LazyLock::new(|| {
    let kinds = "struct|enum|trait|type|union|const fn|async fn|fn|mod|const|static";
    Regex::new(&format!(
        r"(?m)^([ \t]*)(?:pub(?:\([^)]*\))?\s+)?(?:unsafe\s+)?({kinds})\s+([A-Za-z_]\w*)"
    ))
    .unwrap()
});

/// A definition: its file, line, indentation, kind and name.
struct Definition {
    path: PathBuf,
    line: usize,
    indent: usize,
    kind: String,
    name: String,
}

impl Definition {
    fn place(&self) -> String {
        format!("{}:{}", self.path.display(), self.line)
    }

    fn is_type(&self) -> bool {
        // An indented `type` belongs to a trait or an implementation.
        matches!(self.kind.as_str(), "struct" | "enum" | "trait" | "union")
            || self.kind == "type" && self.indent == 0
    }
}

fn definitions(path: &Path, source: &str) -> Vec<Definition> {
    let code = rust::code(source);
    let code = if rust::is_test(path) { code } else { rust::without_tests(&code) };
    DEFINITION
        .captures_iter(&code)
        .map(|found| Definition {
            path: path.to_owned(),
            line: code[..found.get(2).unwrap().start()].matches('\n').count() + 1,
            indent: found[1].len(),
            kind: found[2].to_owned(),
            name: found[3].to_owned(),
        })
        .collect()
}

fn all_definitions() -> Vec<Definition> {
    let folders = ["proto/src", "services", "tests"];
    let all = folders.into_iter().flat_map(sources);
    let covered = all.filter(|(path, _)| !path.starts_with("tests/policy"));
    covered.flat_map(|(path, text)| definitions(&path, &text)).collect()
}

#[test]
fn no_definition_has_a_denied_name() {
    let is_denied = |found: &&Definition| {
        let (name, is_constant) =
            (found.name.as_str(), matches!(found.kind.as_str(), "const" | "static"));
        let begins = DENIED_BEGINNINGS.iter().any(|begin| is_constant && name.starts_with(begin));
        let is_exception = EXCEPTIONS
            .iter()
            .any(|(folder, denied)| name == *denied && found.path.starts_with(folder));
        (begins || DENIED.contains(&name)) && !is_exception
    };
    let all = all_definitions();
    let found = all.iter().filter(is_denied);
    let found: Vec<_> =
        found.map(|found| format!("{}: {} {}", found.place(), found.kind, found.name)).collect();
    assert!(
        found.is_empty(),
        "these names are denied; docs/glossary.md has the terms:\n{}\n{} in all",
        found.join("\n"),
        found.len()
    );
}

/// The folder of a crate.
fn crate_of(path: &Path) -> String {
    let path = path.to_str().unwrap();
    path.split_once("/src/").map_or(path, |(folder, _)| folder).to_owned()
}

#[test]
fn no_two_types_of_a_crate_have_one_name() {
    let mut places = BTreeMap::<(String, String), Vec<String>>::new();
    let all = all_definitions();
    for found in all.iter().filter(|found| found.is_type() && !rust::is_test(&found.path)) {
        let key = (crate_of(&found.path), found.name.clone());
        places.entry(key).or_default().push(found.place());
    }
    let twice = places.iter().filter(|(_, places)| places.len() > 1);
    let twice: Vec<_> =
        twice.map(|((_, name), places)| format!("{name}: {}", places.join(", "))).collect();
    assert!(
        twice.is_empty(),
        "two types of one crate have one name:\n{}\n{} in all",
        twice.join("\n"),
        twice.len()
    );
}

#[test]
fn a_constant_of_time_or_size_says_so() {
    let constant =
        Regex::new(r"(?m)^[ \t]*(?:pub(?:\([^)]*\))?\s+)?const\s+(\w+):\s*([\w:]+)\s*=\s*([^;]*);")
            .unwrap();
    let mut found = Vec::new();
    let files = ["services", "tests"].into_iter().flat_map(sources);
    for (path, text) in files {
        let code = rust::code(&text);
        let code = if rust::is_test(&path) { code } else { rust::without_tests(&code) };
        for constant in constant.captures_iter(&code) {
            let (name, kind, value) = (&constant[1], &constant[2], &constant[3]);
            let is_time = kind == "Duration" || kind.ends_with("::Duration");
            let is_integer = matches!(kind, "u16" | "u32" | "u64" | "usize" | "i32" | "i64");
            let is_size = is_integer
                && ["1024", "1_024", "KIB", "MIB", "<< 10", "<< 20"]
                    .iter()
                    .any(|unit| value.contains(unit));
            let says_so = UNITS.contains(&name)
                || ENDINGS.iter().any(|end| name == *end || name.ends_with(&format!("_{end}")))
                || BEGINNINGS.iter().any(|begin| name.starts_with(begin));
            if (is_time || is_size) && !says_so {
                let start = constant.get(1).unwrap().start();
                let line = code[..start].matches('\n').count() + 1;
                found.push(format!("{}:{line}: {name}: {kind}", path.display()));
            }
        }
    }
    assert!(
        found.is_empty(),
        "a constant of time or size begins with one of {BEGINNINGS:?} or ends with one of {ENDINGS:?}:\n{}\n{} in all",
        found.join("\n"),
        found.len()
    );
}
