//! Snapshots.

use serde::{Deserialize, Serialize};

use super::call;

/// What of the memory is saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum SnapshotType {
    /// All.
    Full,
    /// What was written since the last snapshot or the load.
    Diff,
}

/// Saves a paused machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CreateSnapshot {
    /// State of processors and devices.
    pub snapshot_path: String,
    /// Memory.
    pub mem_file_path: String,
    /// Full if not set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub snapshot_type: Option<SnapshotType>,
}
call!(CreateSnapshot: PUT "/snapshot/create");

/// How memory comes to a loaded machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum BackendType {
    /// A private mapping of the file.
    File,
    /// From whoever listens at the socket, page by page.
    Uffd,
}

/// Where memory comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MemoryBackend {
    /// How.
    pub backend_type: BackendType,
    /// File or socket.
    pub backend_path: String,
}

/// Another tap for an interface of the snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NetworkOverride {
    /// The interface.
    pub iface_id: String,
    /// Its tap.
    pub host_dev_name: String,
}

/// Another socket for the snapshot's vsock device (since 1.16).
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct VsockOverride {
    /// Its path.
    pub uds_path: String,
}

/// Loads a snapshot into a process that has done nothing yet. If it fails, the process ends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LoadSnapshot {
    /// State.
    pub snapshot_path: String,
    /// Memory.
    pub mem_backend: MemoryBackend,
    /// Keep account of written pages from now on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub track_dirty_pages: Option<bool>,
    /// Lets it run at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resume_vm: Option<bool>,
    /// Other taps.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub network_overrides: Vec<NetworkOverride>,
    /// Another vsock.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vsock_override: Option<VsockOverride>,
    /// Moves the guest's clock on by the time since the snapshot (x86_64, since 1.16). The load fails
    /// when the snapshot does not know its time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clock_realtime: Option<bool>,
}
call!(LoadSnapshot: PUT "/snapshot/load");
