//! Sets HAPA_RUSTC to the compiler's version, for `hapa version`. Release builds also get HAPA_COMMIT: from the
//! environment, else from the git checkout.
#![expect(clippy::disallowed_methods, reason = "cargo configures build scripts by the environment")]

use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=HAPA_COMMIT");
    let rustc = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".to_owned());
    let rustc = output_of(&rustc, &["--version"]);
    println!("cargo::rustc-env=HAPA_RUSTC={}", rustc.as_deref().unwrap_or("unknown"));
    // Debug builds have no commit: each commit would relink the binary.
    let is_release = std::env::var("PROFILE").is_ok_and(|profile| profile == "release");
    let configured = std::env::var("HAPA_COMMIT").ok().filter(|commit| !commit.is_empty());
    if let Some(commit) = configured.or_else(|| is_release.then(head_commit).flatten()) {
        println!("cargo::rustc-env=HAPA_COMMIT={commit}");
    }
}

fn head_commit() -> Option<String> {
    // This file grows with every commit and checkout.
    let log = output_of("git", &["rev-parse", "--git-path", "logs/HEAD"])?;
    if Path::new(&log).exists() {
        println!("cargo::rerun-if-changed={log}");
    }
    output_of("git", &["rev-parse", "--short", "HEAD"])
}

/// The standard output of a command that succeeds.
fn output_of(command: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(command).args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_owned())
}
