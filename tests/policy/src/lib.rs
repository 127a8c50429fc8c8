//! The repository as policy tests read it: its files and its manifests. No service is started.
#![expect(clippy::unwrap_used, reason = "a failing test must show the place")]

pub mod manifests;
pub mod rust;

use std::path::{Path, PathBuf};

/// The root of the repository.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap().to_owned()
}

/// The text of a file, by its path from the root.
pub fn read(path: impl AsRef<Path>) -> String {
    let path = root().join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The folders of the workspace's crates, sorted; the globs of its manifest are resolved.
pub fn crates() -> Vec<String> {
    let manifest: toml::Table = read("Cargo.toml").parse().unwrap();
    let members = manifest["workspace"]["members"].as_array().unwrap().iter();
    let members = members.flat_map(|member| match member.as_str().unwrap().strip_suffix("/*") {
        Some(folder) => {
            let entries = std::fs::read_dir(root().join(folder)).unwrap();
            let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
            names.map(|name| format!("{folder}/{name}")).collect()
        }
        None => vec![member.as_str().unwrap().to_owned()],
    });
    let mut members: Vec<_> = members.collect();
    members.sort();
    members
}

/// Folders that hold build results and installed packages.
const SKIPPED_FOLDERS: [&str; 4] = ["node_modules", "target", "dist", "gen"];

/// The files below a folder with one of these endings: paths from the root and texts, sorted by path.
pub fn files(folder: &str, endings: &[&str]) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    let mut folders = vec![if folder == "." { root() } else { root().join(folder) }];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            if path.is_dir() {
                let is_skipped = SKIPPED_FOLDERS.contains(&name) || name.starts_with('.');
                if !is_skipped {
                    folders.push(path);
                }
            } else if path.extension().is_some_and(|end| endings.iter().any(|one| end == *one)) {
                let text = std::fs::read_to_string(&path).unwrap();
                found.push((path.strip_prefix(root()).unwrap().to_owned(), text));
            }
        }
    }
    found.sort();
    found
}

/// The Rust sources below a folder.
pub fn sources(folder: &str) -> Vec<(PathBuf, String)> {
    files(folder, &["rs"])
}
