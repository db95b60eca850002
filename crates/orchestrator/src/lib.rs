//! The node daemon: what a node runs, and the gRPC and HTTP services on its one port.
//!
//! A [`Node`] owns the sandboxes of this machine. Each has one owner task that creates it, watches
//! its end time, its VM and kill requests, and releases it; everything else only sends it
//! messages. Timeouts hold even when nobody calls any more. Template builds are tasks of the
//! same kind.

mod builds;
mod chunk_service;
#[cfg(test)]
mod chunk_service_tests;
mod edge;
mod egress;
mod garbage;
mod info;
mod metrics;
mod mounts;
mod node;
mod owner;
mod sandbox_service;
mod save;
mod server;
mod template_service;
mod volume_service;

pub use egress::NetworkParts;
pub use garbage::{collect, keep_layers};
pub use mounts::Exports;
pub use node::{Node, NodeConfig};
pub use server::serve;
