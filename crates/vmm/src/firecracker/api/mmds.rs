//! The metadata service that Firecracker offers to its guest.

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::call;

/// Protocol of the service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum MmdsVersion {
    /// Plain requests.
    V1,
    /// Requests with a token.
    V2,
}

/// Where and how it is offered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MmdsConfig {
    /// Protocol; V1 if not set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<MmdsVersion>,
    /// Interfaces, by their name in the API.
    pub network_interfaces: Vec<String>,
    /// Link-local address; 169.254.169.254 if not set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ipv4_address: Option<Ipv4Addr>,
    /// Answers as EC2's service does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub imds_compat: Option<bool>,
}
call!(MmdsConfig: PUT "/mmds/config");

/// Replaces the contents, an object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PutMmds(pub Value);
call!(PutMmds: PUT "/mmds");

/// Merges into the contents (RFC 7396).
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PatchMmds(pub Value);
call!(PatchMmds: PATCH "/mmds");

/// Asks for the contents.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct GetMmds;
call!(GetMmds: GET "/mmds" -> Value);
