//! Starting a Firecracker: jail, process, API; and for a cold boot, the machine.

use std::ffi::OsString;
use std::fs::File;
use std::path::Path;
use std::time::Duration;

use tokio::net::UnixStream;

use super::api::{
    Action, ActionType, ApiError, BootSource, CacheType, Call, Client, DescribeInstance, Drive, Entropy,
    HugePages, MachineConfig, NetworkInterface,
};
use super::vm::{FirecrackerVm, LoadOptions};
use super::{Firecracker, place};
use crate::console::{CONSOLE_MOST, Tail};
use crate::jail::Jail;
use crate::mount::Access;
use crate::process::{Process, Spawn, socket_pair};
use crate::running::{Running, StepError};
use crate::{Boot, Disk, Memory, Result, Tap, VmConfig, VmmError};

/// Limit for Firecracker's own steps. They take milliseconds; on a heavily loaded or emulated host,
/// seconds.
pub(super) const STEP_LIMIT: Duration = Duration::from_secs(60);
const CONSOLE_LIMIT: usize = 64 * 1024;
/// Size of the jail's tmpfs; a state is well below 1 MiB.
const JAIL_BYTES: u64 = 64 << 20;
/// Firecracker's jailer has the same.
const MAX_FILES: u64 = 2048;
/// The API socket has no event that tells when it listens.
const API_PAUSE: Duration = Duration::from_millis(2);
/// Names in the API.
const DRIVE: &str = "root";
pub(super) const INTERFACE: &str = "eth0";

pub(super) fn unsupported(vm: &str, what: impl Into<String>) -> VmmError {
    VmmError::Unsupported { vm: vm.to_owned(), driver: "Firecracker", what: what.into() }
}

impl From<ApiError> for StepError {
    fn from(e: ApiError) -> Self {
        match e {
            ApiError::Lost { .. } => Self::Lost(e.to_string()),
            _ => Self::Refused(e.to_string()),
        }
    }
}

impl Firecracker {
    pub(super) async fn start_boot(&self, config: VmConfig, boot: &Boot) -> Result<FirecrackerVm> {
        if !matches!(config.memory, Memory::Own) {
            return Err(unsupported(&config.name, format!("boot a guest in {}", config.memory.name())));
        }
        let mut jail = self.jail(&config)?;
        jail.bind(place::KERNEL, &open(&boot.kernel)?, Access::Read)?;
        jail.bind(place::INITRD, &open(&boot.initrd)?, Access::Read)?;
        jail.place(place::MEMORY)?;
        let requests = self.machine(&config, boot)?;
        let console = Tail::new(CONSOLE_LIMIT);
        let (ours, theirs) = socket_pair()?;
        let serial = UnixStream::from_std(ours).map_err(|e| VmmError::io("use the console", e))?;
        tokio::spawn(console.clone().keep(serial, CONSOLE_MOST));
        let vm = self.start(config, jail, Some((console, theirs))).await?;
        requests.send(&vm).await?;
        Ok(vm)
    }

    pub(super) async fn start_prepare(&self, config: VmConfig) -> Result<FirecrackerVm> {
        let mut jail = self.jail(&config)?;
        match &config.memory {
            Memory::Private(file) if !config.huge_pages => jail.bind(place::MEMORY, file, Access::Read)?,
            Memory::Private(_) => {
                return Err(unsupported(
                    &config.name,
                    "map a memory file in huge pages: they must be served",
                ));
            }
            Memory::Served(_) => jail.place(place::MEMORY)?,
            other => return Err(unsupported(&config.name, format!("resume a guest in {}", other.name()))),
        }
        self.start(config, jail, None).await
    }

    /// The jail with what every VM has in it.
    fn jail(&self, config: &VmConfig) -> Result<Jail> {
        let Disk::Device(disk) = &config.disk else {
            return Err(unsupported(&config.name, "speak NBD: it needs a block device"));
        };
        let mut jail = Jail::new(config.uid, JAIL_BYTES)?;
        jail.dir(c"dev")?;
        jail.dir(c"dev/net")?;
        jail.own_dir(place::RUN)?;
        jail.device(c"dev/kvm", Path::new("/dev/kvm"))?;
        jail.device(c"dev/net/tun", Path::new("/dev/net/tun"))?;
        jail.device(c"dev/urandom", Path::new("/dev/urandom"))?;
        jail.optional_device(c"dev/userfaultfd", Path::new("/dev/userfaultfd"))?;
        jail.device(place::DISK, disk)?;
        jail.bind(place::PROGRAM, &open(&self.program.path)?, Access::Run)?;
        Ok(jail)
    }

    fn machine(&self, config: &VmConfig, boot: &Boot) -> Result<Machine> {
        let Tap::Name(tap) = &config.tap else {
            return Err(unsupported(&config.name, "take an open tap: it needs a name"));
        };
        Ok(Machine {
            size: MachineConfig {
                vcpu_count: config.vcpus,
                mem_size_mib: config.memory_mb,
                smt: None,
                track_dirty_pages: Some(config.track_dirty),
                huge_pages: config.huge_pages.then_some(HugePages::TwoMiB),
                cpu_template: None,
            },
            kernel: BootSource {
                kernel_image_path: place::path(place::KERNEL),
                initrd_path: Some(place::path(place::INITRD)),
                boot_args: Some(boot.cmdline.clone()),
            },
            disk: Drive {
                drive_id: DRIVE.into(),
                // The command line is ours alone; with `true`, Firecracker would add a root= to it.
                is_root_device: false,
                partuuid: None,
                cache_type: Some(CacheType::Writeback),
                is_read_only: Some(false),
                path_on_host: Some(place::path(place::DISK)),
                rate_limiter: None,
                io_engine: Some(self.io_engine),
                socket: None,
            },
            network: NetworkInterface {
                iface_id: INTERFACE.into(),
                host_dev_name: tap.clone(),
                guest_mac: Some(config.mac.clone()),
                mtu: None,
                rx_rate_limiter: None,
                tx_rate_limiter: None,
            },
        })
    }

    /// Starts the process and waits for its API.
    async fn start(
        &self,
        config: VmConfig,
        mut jail: Jail,
        console: Option<(Tail, std::os::fd::OwnedFd)>,
    ) -> Result<FirecrackerVm> {
        let VmConfig { name, memory_mb, memory, tap, netns, uid, limits, .. } = config;
        let VmConfig { huge_pages, track_dirty, advance_clock, .. } = config;
        let Tap::Name(tap) = tap else {
            return Err(unsupported(&name, "take an open tap: it needs a name"));
        };
        if huge_pages {
            enough_huge_pages(&name, memory_mb)?;
        }
        let log = jail.pipe(place::LOG)?;
        let (console, stdout) = console.unzip();
        let cgroup = self.cgroups.create(&name, limits)?;
        let spawn = Spawn {
            program: place::path(place::PROGRAM).into(),
            args: arguments(&name),
            keep: Vec::new(),
            netns,
            uid,
            cgroup_procs: cgroup.procs_files(),
            jail: Some(jail.entry()?),
            stdout,
            log: Some(log),
            max_files: MAX_FILES,
        };
        let process = Process::spawn(&name, spawn).await?;
        let mounts = File::open(format!("/proc/{}/ns/mnt", process.pid()));
        let running = Running::new(name, process, cgroup);
        let api = running.step("starting Firecracker", STEP_LIMIT, api_up(&jail, &running)).await?;
        // It was alive all the time, so it was its namespace that was opened.
        let mounts = mounts.map_err(|e| VmmError::io("open a VMM's mount namespace", e))?;
        jail.take_back(place::RUN)?;
        let clock_known = since(&self.program.version, (1, 16));
        let options = LoadOptions { tap, track_dirty, advance_clock: advance_clock && clock_known };
        Ok(FirecrackerVm::new(running, jail, mounts, api, console, memory, memory_mb, uid, options))
    }
}

/// Says what is missing: Firecracker itself starts without, and then cannot write to the memory that it has.
fn enough_huge_pages(vm: &str, memory_mb: u32) -> Result<()> {
    let file = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";
    let free = std::fs::read_to_string(file).map_err(|e| VmmError::io(format!("read {file}"), e))?;
    let free: u64 = free.trim().parse().unwrap_or(0);
    let needed = u64::from(memory_mb.div_ceil(2));
    if free < needed {
        let what = format!(
            "give a guest {needed} huge pages of 2 MiB: the host has {free} free, raise vm.nr_hugepages"
        );
        return Err(unsupported(vm, what));
    }
    Ok(())
}

/// Whether a version is at least the given one.
fn since(version: &str, least: (u32, u32)) -> bool {
    let mut parts = version.split(['.', '-']).map_while(|p| p.parse::<u32>().ok());
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0)) >= least
}

fn arguments(name: &str) -> Vec<OsString> {
    // Firecracker takes letters, digits and '-', at most 64.
    let id: String = name.chars().filter(|c| c.is_ascii_alphanumeric() || *c == '-').take(64).collect();
    let id = if id.is_empty() { "vm".to_owned() } else { id };
    let (api, log) = (place::path(place::API), place::path(place::LOG));
    ["--id", &id, "--api-sock", &api, "--log-path", &log, "--level", "Warning", "--show-level"]
        .map(OsString::from)
        .into()
}

fn open(path: &Path) -> Result<File> {
    File::open(path).map_err(|e| VmmError::io(format!("open {}", path.display()), e))
}

async fn api_up(jail: &Jail, running: &Running) -> Result<Client, StepError> {
    loop {
        if let Ok(socket) = jail.socket(place::API) {
            let client = Client::of_socket(socket);
            match client.send(&DescribeInstance).await {
                Ok(_) => return Ok(client),
                // Not listening yet.
                Err(ApiError::Lost { .. }) => {}
                Err(e) => return Err(e.into()),
            }
        }
        if running.process.exit().status().is_some() {
            return Err(StepError::Lost("the process ended".into()));
        }
        tokio::time::sleep(API_PAUSE).await;
    }
}

/// What a cold boot asks for.
struct Machine {
    size: MachineConfig,
    kernel: BootSource,
    disk: Drive,
    network: NetworkInterface,
}

impl Machine {
    async fn send(&self, vm: &FirecrackerVm) -> Result<()> {
        let action = "booting the guest";
        vm.call(action, &self.size).await?;
        vm.call(action, &self.kernel).await?;
        vm.call(action, &self.disk).await?;
        vm.call(action, &self.network).await?;
        vm.call(action, &Entropy::default()).await?;
        vm.call(action, &Action { action_type: ActionType::InstanceStart }).await
    }
}

impl FirecrackerVm {
    pub(super) async fn call<C: Call>(&self, action: &'static str, call: &C) -> Result<C::Answer> {
        self.running.step(action, STEP_LIMIT, self.api.send(call)).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_becomes_an_id_that_firecracker_takes() {
        let id = |name: &str| arguments(name)[1].to_string_lossy().into_owned();
        assert_eq!(id("12-ab_c/d"), "12-abcd");
        assert_eq!(id("___"), "vm");
        assert_eq!(id(&"x".repeat(100)).len(), 64);
    }

    #[test]
    fn versions_compare() {
        assert!(since("1.16.1", (1, 16)) && since("2.0.0-dev", (1, 16)));
        assert!(!since("1.15.9", (1, 16)) && !since("x", (1, 16)));
    }
}
