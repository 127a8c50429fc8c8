//! Compiles `hapa/**/*.proto` into Rust code and into one descriptor set, which server reflection and
//! Envoy use. The set is written as encoded by protox, because re-encoding the prost struct loses the
//! `google.api.http` options.
use std::path::{Path, PathBuf};
use std::{env, error::Error, fs};

use prost::Message;

fn main() -> Result<(), Box<dyn Error>> {
    let protos = find_protos(Path::new("hapa"))?;
    let mut compiler = protox::Compiler::new(["."])?;
    compiler.include_imports(true).include_source_info(true);
    compiler.open_files(&protos)?;
    // Error details are sent as `Any`, so readers of the set need their types.
    compiler.open_file("google/rpc/error_details.proto")?;

    let bytes = compiler.encode_file_descriptor_set();
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo did not set OUT_DIR")?);
    fs::write(out.join("hapa.binpb"), &bytes)?;

    let set = prost_types::FileDescriptorSet::decode(bytes.as_slice())?;
    // Programs find a message in the descriptor set by its type name.
    let mut config = tonic_prost_build::Config::new();
    config.enable_type_names();
    tonic_prost_build::configure().compile_fds_with_config(set, config)?;

    println!("cargo:rerun-if-changed=hapa");
    println!("cargo:rerun-if-changed=google");
    Ok(())
}

fn find_protos(directory: &Path) -> Result<Vec<PathBuf>, Box<dyn Error>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(find_protos(&path)?);
        } else if path.extension().is_some_and(|extension| extension == "proto") {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}
