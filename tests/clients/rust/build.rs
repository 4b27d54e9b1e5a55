//! Generates the client from the protos, without `protoc`.

/// Where the contract is.
const PROTOS: &str = "../../../protos";

/// The public API. What these files import is generated as well.
const FILES: [&str; 7] = [
    "headrace/common/v1/error_reason.proto",
    "headrace/cost/v1/cost.proto",
    "headrace/embedding/v1/embedding.proto",
    "headrace/inference/v1/inference.proto",
    "headrace/jobs/v1/jobs.proto",
    "headrace/registry/v1/registry.proto",
    "headrace/router/v1/router.proto",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed={PROTOS}");
    tonic_prost_build::configure()
        .build_server(false)
        .include_file("protos.rs")
        .compile_fds(protox::compile(FILES, [PROTOS])?)?;
    Ok(())
}
