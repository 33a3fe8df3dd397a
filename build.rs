//! Compiles `proto/` with protox, so that no protoc is needed: messages, both service halves, and the descriptor set
//! that reflection serves.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let files = [
        "sessionbroker/v1/admin.proto",
        "sessionbroker/v1/bulk.proto",
        "sessionbroker/v1/connect.proto",
        "sessionbroker/v1/error.proto",
        "sessionbroker/v1/notification.proto",
        "sessionbroker/v1/run.proto",
        "sessionbroker/v1/session.proto",
        "sessionbroker/v1/transaction.proto",
        "sessionbroker/v1/value.proto",
    ];
    let descriptors = protox::compile(files, ["proto"])?;
    let out_dir = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out_dir.join("descriptors.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        .build_transport(false)
        .codec_path("crate::grpc::codec::Codec")
        .bytes(".sessionbroker.v1")
        // In order, so that the same request encodes to the same bytes.
        .btree_map(".")
        .extern_path(".sessionbroker.v1.Row", "crate::grpc::row::Row")
        .compile_fds(descriptors)?;
    Ok(())
}
