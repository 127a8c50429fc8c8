//! Tells `hapa version` which compiler made it.
#![expect(clippy::disallowed_methods, reason = "cargo speaks to build scripts by the environment")]

use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=HAPA_COMMIT");
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let said = Command::new(rustc).arg("--version").output().ok();
    let said = said.and_then(|said| String::from_utf8(said.stdout).ok());
    println!("cargo::rustc-env=HAPA_RUSTC={}", said.as_deref().map_or("not known", str::trim));
}
