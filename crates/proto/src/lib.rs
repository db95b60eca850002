//! Generated gRPC types of the node daemon, clients and servers.
//!
//! The sources are `proto/*.proto`: our own files, with the names, numbers and types that E2B's
//! clients and daemons use on the wire; `GarbageService` is ours alone. The node daemon's files carry no package, so all of their
//! types share [`node`], and a gRPC path reads `/SandboxService/Create`. The proxy's service has the
//! same name as the node's but lives in package `proxy`, hence in [`proxy`].
//!
//! [`node::sandbox_service_client::SandboxServiceClient`] and
//! [`node::sandbox_service_server::SandboxServiceServer`] are the pair that most callers want.

/// Services of the node daemon: `SandboxService`, `TemplateService`, `InfoService`, `ChunkService`,
/// `VolumeService`, `GarbageService`.
pub mod node {
    #![allow(missing_docs, clippy::all, clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    include!(concat!(env!("OUT_DIR"), "/_.rs"));
}

/// `proxy.SandboxService`: how a proxy asks for a paused sandbox to be resumed.
pub mod proxy {
    #![allow(missing_docs, clippy::all, clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    include!(concat!(env!("OUT_DIR"), "/proxy.rs"));
}

/// The encoded `google.protobuf.FileDescriptorSet` of all of the above, for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/nidus.descriptors"));
