//! The gRPC surface. The only place that says tonic or prost; it knows no driver.

/// The generated protocol.
#[allow(
    missing_docs,
    unreachable_pub,
    unused_qualifications,
    clippy::all,
    clippy::pedantic,
    reason = "generated from proto/, documented there"
)]
pub mod pb {
    tonic::include_proto!("sessionbroker.v1");

    pub use super::row::Row;
}

/// `proto/` compiled, for reflection.
pub(crate) const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

pub mod admin;
pub mod auth;
pub mod bulk;
pub mod client;
pub(crate) mod codec;
mod convert;
mod framing;
mod interact;
mod method;
pub mod notifications;
pub mod row;
pub mod service;
mod status;

pub mod gate;
pub mod transport;
