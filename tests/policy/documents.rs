//! The map in ARCHITECTURE.md, the paths in the glossary and the Korean README agree with the tree and with README.md.

use std::collections::BTreeSet;

use hapa_policy::{crates, files, read, root};

/// Top-level folders that git ignores.
const IGNORED: [&str; 3] = ["data", "node_modules", "target"];

/// The first column of the table below "## Map".
fn mapped() -> BTreeSet<String> {
    let page = read("ARCHITECTURE.md");
    let map = page.split("\n## Map\n").nth(1).expect("ARCHITECTURE.md has a section \"## Map\"");
    let map = map.split("\n## ").next().unwrap();
    let rows = map.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next());
    rows.map(|folder| folder.trim_end_matches('/').to_owned()).collect()
}

#[test]
fn the_map_names_every_folder_and_every_crate_and_nothing_else() {
    let mapped = mapped();
    for folder in &mapped {
        assert!(root().join(folder).is_dir(), "ARCHITECTURE.md maps {folder}, which is no folder");
    }
    let is_mapped = |folder: &str| mapped.iter().any(|found| found == folder);
    let has_mapped_parts =
        |folder: &str| mapped.iter().any(|found| found.starts_with(&format!("{folder}/")));
    for entry in std::fs::read_dir(root()).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        if entry.path().is_dir() && !name.starts_with('.') && !IGNORED.contains(&name.as_str()) {
            let is_known = is_mapped(&name) || has_mapped_parts(&name);
            assert!(is_known, "the map in ARCHITECTURE.md does not name {name}/");
        }
    }
    for folder in crates() {
        assert!(is_mapped(&folder), "the map in ARCHITECTURE.md does not name the crate {folder}/");
    }
}

/// The terms of docs/glossary.md, each with a path of its last column.
fn glossary_paths() -> Vec<(String, String)> {
    let page = read("docs/glossary.md");
    let rows = page.lines().filter_map(|line| line.strip_prefix("| ")?.strip_suffix(" |"));
    let paths = rows.flat_map(|row| {
        let cells: Vec<_> = row.split(" | ").collect();
        let (term, place) = (cells[0], cells[cells.len() - 1]);
        let names = place.split('`').skip(1).step_by(2);
        let paths = names.filter(|name| name.contains(['/', '.']));
        paths.map(|path| (term.to_owned(), path.to_owned())).collect::<Vec<_>>()
    });
    paths.collect()
}

#[test]
fn every_path_in_the_glossary_exists() {
    let sources = files("services", &["rs", "sql"]);
    // A path without its folder, such as "lib.rs of each service", exists in any of them.
    let is_below_services = |path: &str| {
        let mut places = sources.iter().flat_map(|(found, _)| found.ancestors());
        places.any(|place| place.ends_with(path))
    };
    let paths = glossary_paths();
    assert!(paths.len() > 40, "docs/glossary.md names paths: {paths:?}");
    for (term, path) in paths {
        let exists = root().join(&path).exists() || is_below_services(&path);
        assert!(
            exists,
            "docs/glossary.md: \"{term}\" is said to be in {path}, which does not exist"
        );
    }
}

/// The lines of the code blocks without comments and empty lines.
fn commands(page: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut is_code = false;
    for line in read(page).lines().map(str::trim) {
        if line.starts_with("```") {
            is_code = !is_code;
        } else if is_code && !line.is_empty() && !line.starts_with('#') {
            found.push(line.split(" # ").next().unwrap().trim_end().to_owned());
        }
    }
    found
}

#[test]
fn the_korean_readme_has_the_same_commands_in_the_same_order() {
    let (english, korean) = (commands("README.md"), commands("README.ko.md"));
    assert!(english.len() > 10, "README.md has commands");
    for (number, (english, korean)) in english.iter().zip(&korean).enumerate() {
        assert_eq!(
            english,
            korean,
            "command {} of README.ko.md differs from README.md",
            number + 1
        );
    }
    assert_eq!(english.len(), korean.len(), "README.ko.md must have as many commands as README.md");
}
