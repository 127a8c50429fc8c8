//! Compiles `hapa/**/*.proto` into Rust and into ONE descriptor set, which reflection serves and
//! Envoy reads. The set is written as bytes: the struct form loses the google.api.http options.
use std::error::Error;
use std::path::{Path, PathBuf};
use std::{env, fs};

use prost::Message;

fn main() -> Result<(), Box<dyn Error>> {
    let protos = protos_below(Path::new("hapa"))?;
    let mut compiler = protox::Compiler::new(["."])?;
    compiler.include_imports(true).include_source_info(true);
    compiler.open_files(&protos)?;
    // Error details travel as Any: readers of the set must know their types.
    compiler.open_file("google/rpc/error_details.proto")?;

    let bytes = compiler.encode_file_descriptor_set();
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);
    fs::write(out.join("hapa.binpb"), &bytes)?;

    let set = prost_types::FileDescriptorSet::decode(bytes.as_slice())?;
    // Names let a program find a message in the descriptor set.
    let mut config = tonic_prost_build::Config::new();
    config.enable_type_names();
    tonic_prost_build::configure().compile_fds_with_config(set, config)?;

    println!("cargo:rerun-if-changed=hapa");
    println!("cargo:rerun-if-changed=google");
    Ok(())
}

fn protos_below(folder: &Path) -> Result<Vec<PathBuf>, Box<dyn Error>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(protos_below(&path)?);
        } else if path.extension().is_some_and(|ending| ending == "proto") {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}
