#![forbid(unsafe_code)]
//! The gRPC API of a Cairn process: messages, client and server, generated from
//! `proto/cairn/v1/cairn.proto`.

/// Version 1 of the API.
#[allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::pedantic,
    clippy::allow_attributes_without_reason,
    clippy::use_self,
    clippy::needless_pass_by_value,
    reason = "generated from the proto, which documents it"
)]
pub mod v1 {
    tonic::include_proto!("cairn.v1");
}
