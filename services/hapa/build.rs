//! Tells `hapa version` which compiler made it, and a release build of which commit it is, unless
//! HAPA_COMMIT says so.
#![expect(clippy::disallowed_methods, reason = "cargo speaks to build scripts by the environment")]

use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=HAPA_COMMIT");
    let rustc = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".to_owned());
    let rustc = said(&rustc, &["--version"]);
    println!("cargo::rustc-env=HAPA_RUSTC={}", rustc.as_deref().unwrap_or("not known"));
    // While developing, a commit is no reason to link anew.
    let is_release = std::env::var("PROFILE").is_ok_and(|profile| profile == "release");
    let told = std::env::var("HAPA_COMMIT").ok().filter(|commit| !commit.is_empty());
    if let Some(commit) = told.or_else(|| is_release.then(checked_out).flatten()) {
        println!("cargo::rustc-env=HAPA_COMMIT={commit}");
    }
}

fn checked_out() -> Option<String> {
    // Grows with every commit and checkout.
    let log = said("git", &["rev-parse", "--git-path", "logs/HEAD"])?;
    if Path::new(&log).exists() {
        println!("cargo::rerun-if-changed={log}");
    }
    said("git", &["rev-parse", "--short", "HEAD"])
}

/// The words of a command that does well.
fn said(command: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(command).args(arguments).output().ok()?;
    let words = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| words.trim().to_owned())
}
