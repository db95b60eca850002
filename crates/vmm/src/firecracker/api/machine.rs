//! The machine as a whole: kernel, size, start, state, log.

use serde::{Deserialize, Serialize};

use super::{Balloon, Drive, Entropy, MmdsConfig, NetworkInterface, Vsock, call};

/// What is booted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootSource {
    /// ELF kernel.
    pub kernel_image_path: String,
    /// Initial ram disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initrd_path: Option<String>,
    /// Kernel command line.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub boot_args: Option<String>,
}
call!(BootSource: PUT "/boot-source");

/// Page size of the guest's memory on the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum HugePages {
    /// 4 KiB.
    None,
    /// 2 MiB, out of the host's pool of huge pages.
    #[serde(rename = "2M")]
    TwoMiB,
}

/// Size of the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineConfig {
    /// Virtual processors: 1, or an even number, at most 32.
    pub vcpu_count: u32,
    /// Memory in MiB.
    pub mem_size_mib: u32,
    /// Two of the processors share a core.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub smt: Option<bool>,
    /// Keep account of written pages, for `Diff` snapshots.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub track_dirty_pages: Option<bool>,
    /// Page size of the memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub huge_pages: Option<HugePages>,
    /// Named processor template (deprecated by Firecracker).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_template: Option<String>,
}
call!(MachineConfig: PUT "/machine-config");

/// Changes to the size, before the start.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct PatchMachineConfig {
    /// As in [`MachineConfig`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vcpu_count: Option<u32>,
    /// As in [`MachineConfig`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mem_size_mib: Option<u32>,
    /// As in [`MachineConfig`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub track_dirty_pages: Option<bool>,
    /// As in [`MachineConfig`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub huge_pages: Option<HugePages>,
}
call!(PatchMachineConfig: PATCH "/machine-config");

/// Asks for the size.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct GetMachineConfig;
call!(GetMachineConfig: GET "/machine-config" -> MachineConfig);

/// Something to be done at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Action {
    /// What.
    pub action_type: ActionType,
}
call!(Action: PUT "/actions");

/// Kinds of [`Action`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum ActionType {
    /// Boots.
    InstanceStart,
    /// Presses the keys, at which a guest with a keyboard driver shuts down.
    SendCtrlAltDel,
    /// Writes the metrics now.
    FlushMetrics,
}

/// Wanted state of a machine that was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Vm {
    /// The state.
    pub state: VmState,
}
call!(Vm: PATCH "/vm");

/// States of [`Vm`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum VmState {
    /// The processors stand still.
    Paused,
    /// They run.
    Resumed,
}

/// How much is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub enum Level {
    Off,
    Error,
    Warning,
    Info,
    Debug,
    Trace,
}

/// Where the log goes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Logger {
    /// File or named pipe.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log_path: Option<String>,
    /// Lowest level.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub level: Option<Level>,
    /// Lines say their level.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub show_level: Option<bool>,
    /// Lines say their place in the source.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub show_log_origin: Option<bool>,
    /// Only lines of this module.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub module: Option<String>,
}
call!(Logger: PUT "/logger");

/// Where the metrics go, as lines of JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metrics {
    /// File or named pipe.
    pub metrics_path: String,
}
call!(Metrics: PUT "/metrics");

/// Asks what this is.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct DescribeInstance;
call!(DescribeInstance: GET "/" -> InstanceInfo);

/// What this is.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct InstanceInfo {
    /// `Firecracker`.
    pub app_name: String,
    /// The `--id` that it was started with.
    pub id: String,
    /// State of the machine.
    pub state: InstanceState,
    /// Version of the program.
    pub vmm_version: String,
}

/// State in [`InstanceInfo`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum InstanceState {
    /// Neither booted nor loaded.
    #[serde(rename = "Not started")]
    NotStarted,
    /// The processors run.
    Running,
    /// They stand still.
    Paused,
}

/// Asks for the version.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct GetVersion;
call!(GetVersion: GET "/version" -> Version);

/// The version.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Version {
    /// Such as `1.16.1`.
    pub firecracker_version: String,
}

/// Asks for everything that is configured.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct GetFullConfig;
call!(GetFullConfig: GET "/vm/config" -> FullConfig);

/// Everything that is configured; also the form of a configuration file (`--config-file`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct FullConfig {
    /// Kernel.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub boot_source: Option<BootSource>,
    /// Size.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub machine_config: Option<MachineConfig>,
    /// Disks.
    pub drives: Vec<Drive>,
    /// Network interfaces.
    pub network_interfaces: Vec<NetworkInterface>,
    /// Random numbers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub entropy: Option<Entropy>,
    /// Sockets.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vsock: Option<Vsock>,
    /// Balloon.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub balloon: Option<Balloon>,
    /// Metadata service.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mmds_config: Option<MmdsConfig>,
    /// Log.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logger: Option<Logger>,
    /// Metrics.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metrics: Option<Metrics>,
}
