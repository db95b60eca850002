//! Compiles the .proto files in Rust (protox), so that a build needs no `protoc`.

use std::path::PathBuf;

use prost::Message;

const FILES: [&str; 7] = [
    "orchestrator.proto",
    "template-manager.proto",
    "info.proto",
    "chunks.proto",
    "garbage.proto",
    "proxy.proto",
    "volume.proto",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(FILES, ["proto"])?;
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    std::fs::write(out.join("nidus.descriptors"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure().bytes(".").compile_fds(descriptors)?;
    Ok(())
}
