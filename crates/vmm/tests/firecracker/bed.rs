//! What all tests share: a driver, a kernel, a snapshot of a guest that is up, and machines made
//! of them.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use libtest_mimic::Failed;
use nidus_vmm::cgroup::CgroupRoot;
use nidus_vmm::firecracker::{self, Firecracker, probe};
use nidus_vmm::guest::Kernel;
use nidus_vmm::{Boot, Disk, Limits, Memory, MemorySaved, SaveMemory, SnapshotFiles, Tap, Vm, VmConfig, Vmm};
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio::sync::oneshot;

use crate::host::{self, Loop};
use crate::net::{Namespace, TAP};
use crate::pages::PageServer;

pub const MEMORY_MB: u32 = 128;
const DISK_BYTES: u64 = 4 << 20;
/// A guest's kernel under KVM under emulation comes up in some seconds.
const PROBE_LIMIT: Duration = Duration::from_secs(60);
const ON_OTHER_HOSTS: Duration = Duration::from_secs(5);

pub type Test = Result<(), Failed>;

/// What all tests share; closed at the end.
pub struct Bed {
    pub runtime: Runtime,
    pub vmm: Firecracker,
    pub cgroups: CgroupRoot,
    pub cgroup: String,
    pub kernel: Kernel,
    pub about: String,
    pub dir: TempDir,
    pub template: OnceLock<Template>,
}

/// A snapshot of a guest that is up.
pub struct Template {
    pub state: PathBuf,
    pub memory: PathBuf,
    pub disk: PathBuf,
    pub ticks: u64,
}

/// A VM with what it uses, released in reverse order.
pub struct Machine {
    pub vm: Box<dyn Vm>,
    pub uid: u32,
    pub network: Namespace,
    pub _disk: Loop,
    pub pages: Option<PageServer>,
}

/// How a resumed guest's memory comes.
pub enum From {
    Served,
    Mapped,
}

impl Bed {
    pub fn new(place: &Path) -> Result<Self, String> {
        let runtime = Runtime::new().map_err(|e| e.to_string())?;
        let program = runtime.block_on(firecracker::find(place, None)).map_err(|e| e.to_string())?;
        let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
        let kernel = host::kernel(dir.path())?;
        let initrd = dir.path().join("initrd");
        kernel.write_initramfs(Path::new("/proc/self/exe"), &initrd).map_err(|e| e.to_string())?;
        let elf = kernel.elf().map_err(|e| e.to_string())?;
        let limit = if std::env::var_os("NIDUS_TESTBED").is_some() { PROBE_LIMIT } else { ON_OTHER_HOSTS };
        let verdict = runtime.block_on(probe::kvm(&program, &elf, &initrd, limit));
        if !verdict.works {
            return Err(verdict.reason);
        }
        let cgroup = format!("nidus-test-fc-{}", std::process::id());
        let cgroups = CgroupRoot::new(&cgroup).map_err(|e| e.to_string())?;
        let about = format!("{}; kernel {}", verdict.reason, kernel.version);
        let vmm = Firecracker::new(program, cgroups.clone());
        Ok(Self { runtime, vmm, cgroups, cgroup, kernel, about, dir, template: OnceLock::new() })
    }

    pub fn about(&self) -> &str {
        &self.about
    }

    pub fn close(&self) {
        self.cgroups.remove();
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn config(&self, name: &str, uid: u32, network: &Namespace, disk: &Loop, memory: Memory) -> VmConfig {
        VmConfig {
            name: name.into(),
            vcpus: 1,
            memory_mb: MEMORY_MB,
            memory,
            disk: Disk::Device(disk.path.clone()),
            tap: Tap::Name(TAP.into()),
            netns: network.open(),
            mac: "02:fc:00:00:00:05".into(),
            uid,
            limits: Limits { memory_bytes: 512 << 20, cpu_millis: 2000 },
            huge_pages: false,
            track_dirty: false,
            advance_clock: false,
        }
    }

    pub fn boot_source(&self) -> Boot {
        let arguments = self.vmm.needs().kernel_arguments;
        Boot {
            kernel: self.kernel.elf().unwrap(),
            initrd: self.file("initrd"),
            cmdline: format!("console=ttyS0 quiet random.trust_cpu=on {arguments}"),
        }
    }

    /// A cold boot; what `change` does to its configuration comes first.
    pub fn boot(
        &self,
        name: &str,
        disk: &Path,
        change: impl FnOnce(&mut VmConfig),
    ) -> Result<Machine, Failed> {
        let uid = host::new_uid();
        let network = Namespace::new(uid)?;
        let disk = Loop::new(&file(disk)?)?;
        let mut config = self.config(name, uid, &network, &disk, Memory::Own);
        change(&mut config);
        let vm = self.runtime.block_on(self.vmm.boot(config, &self.boot_source()))?;
        Ok(Machine { vm, uid, network, _disk: disk, pages: None })
    }

    /// A prepared VM, loaded from files but not resumed.
    pub fn load(
        &self,
        name: &str,
        from: From,
        files: (&Path, &Path, &Path),
        change: impl FnOnce(&mut VmConfig),
    ) -> Result<Machine, Failed> {
        let (state, memory, disk) = files;
        let uid = host::new_uid();
        let network = Namespace::new(uid)?;
        let disk = Loop::new(&file(disk)?)?;
        let memory = File::open(memory)?;
        let (sender, receiver) = oneshot::channel();
        let served = matches!(from, From::Served);
        let source = match from {
            From::Served => Memory::Served(sender),
            From::Mapped => {
                drop(sender);
                Memory::Private(memory.try_clone()?)
            }
        };
        let mut config = self.config(name, uid, &network, &disk, source);
        change(&mut config);
        let server = async move {
            match receiver.await {
                Ok(stream) => Some(PageServer::start(stream, memory)),
                Err(_) => None,
            }
        };
        let (vm, pages) = self.runtime.block_on(async {
            let mut vm = self.vmm.prepare(config).await?;
            let (loaded, pages) = tokio::join!(vm.load(File::open(state)?), server);
            loaded?;
            Ok::<_, Failed>((vm, pages))
        })?;
        let pages = pages.transpose()?;
        assert_eq!(pages.is_some(), served);
        Ok(Machine { vm, uid, network, _disk: disk, pages })
    }

    pub fn clone_of_template(&self, name: &str, from: From) -> Result<Machine, Failed> {
        let t = self.template()?;
        let disk = self.file(&format!("{name}.disk"));
        fs::copy(&t.disk, &disk)?;
        self.load(name, from, (&t.state, &t.memory, &disk), |c| c.track_dirty = true)
    }

    pub fn template(&self) -> Result<&Template, Failed> {
        if let Some(t) = self.template.get() {
            return Ok(t);
        }
        let disk = new_disk(&self.file("template.disk"))?;
        let mut machine = self.boot("template", &disk, |_| ())?;
        machine.ask("ticks")?;
        let ticks = machine.number("ticks")?;
        let (state, memory) = (self.file("template.state"), self.file("template.memory"));
        let saved = machine.save(&self.runtime, &state, SaveMemory::Full(create(&memory)?))?;
        assert_eq!(saved, MemorySaved::Full);
        machine.kill(&self.runtime)?;
        Ok(self.template.get_or_init(|| Template { state, memory, disk, ticks }))
    }
}

impl Machine {
    pub fn ask(&self, question: &str) -> Result<String, Failed> {
        let status = || self.vm.exit().status().unwrap_or_else(|| "it runs".into());
        self.network
            .ask(question)
            .map_err(|e| format!("'{question}': {e}; {}; console: {}", status(), self.vm.console()).into())
    }

    pub fn number(&self, question: &str) -> Result<u64, Failed> {
        Ok(self.ask(question)?.parse()?)
    }

    pub fn resume(&mut self, runtime: &Runtime) -> Test {
        Ok(runtime.block_on(self.vm.resume())?)
    }

    pub fn save(
        &mut self,
        runtime: &Runtime,
        state: &Path,
        memory: SaveMemory,
    ) -> Result<MemorySaved, Failed> {
        let state = create(state)?;
        runtime.block_on(async {
            self.vm.pause().await?;
            Ok(self.vm.snapshot(SnapshotFiles { state, memory }).await?)
        })
    }

    /// Kills it; returns how many pages it was served.
    pub fn kill(self, runtime: &Runtime) -> Result<u64, Failed> {
        let Self { vm, pages, .. } = self;
        runtime.block_on(vm.kill())?;
        Ok(pages.map_or(Ok(0), PageServer::stop)?)
    }
}

pub fn file(path: &Path) -> io::Result<File> {
    File::options().read(true).write(true).open(path)
}

pub fn create(path: &Path) -> io::Result<File> {
    File::options().read(true).write(true).create(true).truncate(true).open(path)
}

pub fn new_disk(path: &Path) -> io::Result<PathBuf> {
    create(path)?.set_len(DISK_BYTES)?;
    Ok(path.to_owned())
}
