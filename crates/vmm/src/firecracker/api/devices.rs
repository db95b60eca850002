//! Devices: disks, network interfaces, random numbers, sockets, the serial console.

use serde::{Deserialize, Serialize};

use super::call;

/// A token bucket: so many tokens at most, refilled over so much time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenBucket {
    /// Tokens (bytes or operations) that the bucket holds.
    pub size: u64,
    /// Tokens at the start, beside those and not refilled.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub one_time_burst: Option<u64>,
    /// Milliseconds in which the bucket is refilled.
    pub refill_time: u64,
}

/// Limits of a device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RateLimiter {
    /// Bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<TokenBucket>,
    /// Operations.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ops: Option<TokenBucket>,
}

/// Whether a guest's flush reaches the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum CacheType {
    /// It does not.
    Unsafe,
    /// It does.
    Writeback,
}

/// How the disk is read and written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum IoEngine {
    /// One request at a time; the VMM's other devices wait.
    Sync,
    /// io_uring (a preview, as Firecracker calls it).
    Async,
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drive {
    /// Name in the API: letters, digits and underscores.
    pub drive_id: String,
    /// The kernel's root is on it.
    pub is_root_device: bool,
    /// Partition of it that is the root.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub partuuid: Option<String>,
    /// Flushes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache_type: Option<CacheType>,
    /// The guest cannot write.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub is_read_only: Option<bool>,
    /// File or block device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path_on_host: Option<String>,
    /// Limits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
    /// Engine.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub io_engine: Option<IoEngine>,
    /// Socket of a vhost-user-block server, instead of a path.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket: Option<String>,
}
call!(Drive: PUT "/drives".drive_id);

/// Changes to a disk of a running machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PatchDrive {
    /// Its name.
    pub drive_id: String,
    /// Another file or block device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path_on_host: Option<String>,
    /// Other limits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
}
call!(PatchDrive: PATCH "/drives".drive_id);

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkInterface {
    /// Name in the API.
    pub iface_id: String,
    /// Tap.
    pub host_dev_name: String,
    /// The guest's address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guest_mac: Option<String>,
    /// Largest packet, told to the guest (since 1.16).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// Limits of what the guest receives.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rx_rate_limiter: Option<RateLimiter>,
    /// Limits of what it sends.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tx_rate_limiter: Option<RateLimiter>,
}
call!(NetworkInterface: PUT "/network-interfaces".iface_id);

/// Changes to a network interface of a running machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PatchNetworkInterface {
    /// Its name.
    pub iface_id: String,
    /// Other limits of what the guest receives.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rx_rate_limiter: Option<RateLimiter>,
    /// Other limits of what it sends.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tx_rate_limiter: Option<RateLimiter>,
}
call!(PatchNetworkInterface: PATCH "/network-interfaces".iface_id);

/// A source of random numbers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entropy {
    /// Limits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
}
call!(Entropy: PUT "/entropy");

/// Sockets between guest and host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vsock {
    /// The guest's number, 3 or more.
    pub guest_cid: u32,
    /// Where the VMM makes its socket; connections from the guest go to `{uds_path}_{port}`.
    pub uds_path: String,
}
call!(Vsock: PUT "/vsock");

/// Where the serial console goes instead of standard output (since 1.14).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Serial {
    /// File or named pipe.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial_out_path: Option<String>,
    /// Bytes over this limit are lost (since 1.16).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<TokenBucket>,
}
call!(Serial: PUT "/serial");
