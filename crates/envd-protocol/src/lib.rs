//! What envd, the daemon in the guest, speaks: its protobuf messages with their JSON mapping, the
//! [Connect protocol](https://connectrpc.com/docs/protocol/) they travel in, the body of
//! `POST /init`, and the host's clients.
//!
//! Server and clients share this crate, so that they cannot disagree about the wire.

pub mod client;
pub mod connect;
mod init;

pub use client::{Client, EnvdClient, EnvdError, Event, EventStream, Exit, Output, StartCommand};
pub use init::{InitRequest, VolumeMount};

/// Answer of `GET /metrics`: the guest's own figures. Sizes in bytes, the processors' use in percent of all of
/// them. What is missing is 0.
#[derive(Debug, Clone, Default, PartialEq, serde::Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct GuestMetrics {
    pub cpu_count: u64,
    pub cpu_used_pct: f64,
    pub mem_total: u64,
    pub mem_used: u64,
    pub mem_cache: u64,
    pub disk_used: u64,
    pub disk_total: u64,
}

/// TCP port that envd serves in the guest.
pub const ENVD_PORT: u16 = 49983;

/// What the API tells SDKs as `envdVersion`: they switch features on by it, so it is the version
/// of E2B's envd whose behaviour ours has, not the version of this crate.
pub const ENVD_VERSION: &str = "0.6.4";

/// Header that carries the access token set by `POST /init`.
pub const ACCESS_TOKEN_HEADER: &str = "x-access-token";

/// Header of a stream's request: seconds between keepalive events.
pub const KEEPALIVE_HEADER: &str = "keepalive-ping-interval";

/// Messages of `process.Process`.
#[allow(missing_docs, clippy::all, clippy::pedantic, clippy::unwrap_used)]
pub mod process {
    include!(concat!(env!("OUT_DIR"), "/process.rs"));
    include!(concat!(env!("OUT_DIR"), "/process.serde.rs"));
}

/// Messages of `filesystem.Filesystem`.
#[allow(missing_docs, clippy::all, clippy::pedantic, clippy::unwrap_used)]
pub mod filesystem {
    include!(concat!(env!("OUT_DIR"), "/filesystem.rs"));
    include!(concat!(env!("OUT_DIR"), "/filesystem.serde.rs"));
}
