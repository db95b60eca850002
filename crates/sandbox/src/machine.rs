//! A VM with its slot and its disk: what is acquired together and released together.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nidus_block::{BlockError, Frozen, Overlay};
use nidus_network::{EgressRules, NetworkSlot, Pool};
use nidus_storage::BuildId;
use nidus_template::{DiskError, RootDisk, VmHost};
use nidus_vmm::{Boot, Disk, Memory, MemoryDoor, Vm, VmConfig, VmmError};
use tokio::sync::oneshot;

use crate::served::{self, MemoryError, ServedMemory, Serving};
use crate::{CreateError, KillError, OpenTemplate};

/// A VM that stands at its template's snapshot, runs on from there, or was booted.
pub struct Machine {
    vm: Box<dyn Vm>,
    memory: Option<ServedMemory>,
    disk: RootDisk,
    overlay: Arc<Overlay>,
    slot: NetworkSlot,
    template: Arc<OpenTemplate>,
    memory_door: MemoryDoor,
}

/// How long the end of a VMM's process is waited for when a connection of it was lost.
const EXIT_NOTICE: Duration = Duration::from_millis(200);

/// What machines are made with.
pub struct Parts<'a> {
    /// VMM, slots and disks.
    pub host: &'a VmHost,
    /// Directory of overlay files.
    pub overlays: &'a Path,
}

impl Machine {
    /// Acquires slot, disk and VMM and loads the template's state; the guest stays stopped.
    pub async fn prepare(parts: &Parts<'_>, template: Arc<OpenTemplate>) -> Result<Self, CreateError> {
        Self::make(parts, template, None).await
    }

    /// Acquires slot, disk and VMM and boots the template's disk; the guest runs.
    pub async fn boot(
        parts: &Parts<'_>,
        template: Arc<OpenTemplate>,
        boot: &Boot,
        rules: &EgressRules,
    ) -> Result<Self, CreateError> {
        Self::make(parts, template, Some((boot, rules))).await
    }

    async fn make(
        parts: &Parts<'_>,
        template: Arc<OpenTemplate>,
        boot: Option<(&Boot, &EgressRules)>,
    ) -> Result<Self, CreateError> {
        let network = &parts.host.network;
        let slot = network.acquire().await?;
        match Self::with_slot(parts, &template, &slot, boot).await {
            Ok((vm, memory, disk, overlay)) => {
                let memory_door = parts.host.vmm.needs().memory;
                Ok(Self { vm, memory, disk, overlay, slot, template, memory_door })
            }
            Err(e) => {
                network.release(slot).await;
                Err(e)
            }
        }
    }

    async fn with_slot(
        parts: &Parts<'_>,
        template: &Arc<OpenTemplate>,
        slot: &NetworkSlot,
        boot: Option<(&Boot, &EgressRules)>,
    ) -> Result<(Box<dyn Vm>, Option<ServedMemory>, RootDisk, Arc<Overlay>), CreateError> {
        if let Some((_, rules)) = boot {
            // Its programs start before anybody asks for anything.
            slot.set_egress(rules).await?;
        }
        // Unique: a slot has one tenant at a time, and the random part tells tenants apart.
        let name = format!("{}-{}", slot.index(), BuildId::random());
        let overlay = Overlay::create(template.rootfs.clone(), parts.overlays.join(&name)).await?;
        let overlay = Arc::new(overlay);
        let (root, disk) = parts.host.attach(overlay.clone()).await?;
        match Self::with_disk(parts, template, slot, name, disk, boot.map(|(boot, _)| boot)).await {
            Ok((vm, memory)) => Ok((vm, memory, root, overlay)),
            Err(e) => {
                if let Err(also) = root.release().await {
                    tracing::warn!("while the disk of a failed machine was released: {also}");
                }
                Err(e)
            }
        }
    }

    async fn with_disk(
        parts: &Parts<'_>,
        template: &Arc<OpenTemplate>,
        slot: &NetworkSlot,
        name: String,
        disk: Disk,
        boot: Option<&Boot>,
    ) -> Result<(Box<dyn Vm>, Option<ServedMemory>), CreateError> {
        let (host, m) = (parts.host, &template.metadata);
        let (memory, mut serving) = match host.vmm.needs().memory {
            MemoryDoor::Memfile => (Memory::Private(template.open_memfile().await?), None),
            MemoryDoor::Own if boot.is_some() => (Memory::Own, None),
            MemoryDoor::Own => {
                let source = template.page_source();
                let (sender, connection) = oneshot::channel();
                (Memory::Served(sender), Some(served::serve(connection, source)))
            }
        };
        let config = VmConfig {
            name,
            vcpus: m.vcpu,
            memory_mb: m.memory_mb,
            memory,
            disk,
            tap: host.tap(slot)?,
            netns: slot.netns()?,
            mac: nidus_network::GUEST_MAC.to_owned(),
            uid: host.uid(slot),
            limits: nidus_template::limits(m.vcpu, m.memory_mb),
            huge_pages: m.huge_pages,
            track_dirty: false,
            advance_clock: false,
        };
        if let Some(boot) = boot {
            let vm = host.vmm.boot(config, boot).await?;
            tracing::debug!(build = %m.build_id, slot = slot.index(), pid = vm.pid(), "machine boots");
            return Ok((vm, None));
        }
        let snapfile = template.open_snapfile().await?;
        let mut vm = host.vmm.prepare(config).await?;
        let unserved = async {
            match &mut serving {
                Some(serving) => serving.failed().await,
                None => std::future::pending().await,
            }
        };
        let loaded = tokio::select! {
            biased;
            loaded = vm.load(snapfile) => loaded.map_err(Some),
            () = unserved => Err(None),
        };
        if let Err(e) = loaded {
            return Err(not_loaded(vm, serving, e, template).await);
        }
        let memory = match serving {
            None => None,
            Some(serving) => match serving.finish().await {
                Ok(memory) => Some(memory),
                Err(e) => {
                    // The VM first: nobody may answer its faults with zeros.
                    vm.kill().await?;
                    return Err(e.into());
                }
            },
        };
        if let Some(memory) = &memory {
            memory.prefetch(template.recording());
        }
        tracing::debug!(build = %m.build_id, slot = slot.index(), pid = vm.pid(), "machine is ready to run");
        Ok((vm, memory))
    }

    /// The VM.
    pub fn vm(&mut self) -> &mut dyn Vm {
        self.vm.as_mut()
    }

    /// Its process's exit.
    pub fn exit(&self) -> nidus_vmm::process::ExitWatch {
        self.vm.exit()
    }

    /// Resolves when it can run no longer, with the reason: its process ended, its memory cannot be
    /// served, its disk is lost.
    pub fn failed(&self) -> impl Future<Output = String> + Send + 'static {
        let (mut exit, lost) = (self.vm.exit(), self.disk.lost());
        let (memory, template) = (self.memory.clone(), self.template.clone());
        async move {
            let ended = |status| match memory_failure(&template, memory.as_ref()) {
                Some(cause) => format!("the VM ended by itself ({status}); {cause}"),
                None => format!("the VM ended by itself ({status})"),
            };
            let failed = async {
                match &memory {
                    Some(memory) => memory.failed().await,
                    None => std::future::pending().await,
                }
            };
            let reason = tokio::select! {
                biased;
                status = exit.wait() => return ended(status),
                reason = failed => reason,
                () = lost.cancelled() => "the connection of its root disk was lost".to_owned(),
            };
            // A VMM that ends closes its connections first, and then its end says more.
            match tokio::time::timeout(EXIT_NOTICE, exit.wait()).await {
                Ok(status) => ended(status),
                Err(_) => reason,
            }
        }
    }

    /// Lets the guest run on.
    pub async fn resume(&mut self) -> Result<(), CreateError> {
        let done = self.vm.resume().await;
        done.map_err(|e| caused(e, memory_failure(&self.template, self.memory.as_ref())))
    }

    /// Its slot.
    pub fn slot(&self) -> &NetworkSlot {
        &self.slot
    }

    /// Its template.
    pub fn template(&self) -> &Arc<OpenTemplate> {
        &self.template
    }

    /// How many bytes the guest wrote to its disk so far.
    pub fn disk_written(&self) -> u64 {
        self.overlay.dirty().count() * nidus_block::BLOCK_SIZE
    }

    /// Remembers what its guest needed first, for the machines that are made after it.
    pub fn record(&self) {
        if let Some(memory) = &self.memory {
            self.template.record(|| memory.recording());
        }
    }

    /// Makes everything that the guest wrote reach the overlay. To be called while it is paused.
    pub async fn flush_disk(&self) -> Result<(), DiskError> {
        self.disk.flush().await
    }

    /// What the guest wrote to its disk so far. To be called while it is paused and its disk flushed.
    pub async fn freeze_disk(&self) -> Result<Frozen, BlockError> {
        self.overlay.freeze().await
    }

    /// Gives back what was frozen.
    pub async fn merge_disk(&self, frozen: Frozen) -> Result<(), BlockError> {
        self.overlay.merge(frozen).await
    }

    /// Where the VMM has its memory.
    pub fn memory_door(&self) -> MemoryDoor {
        self.memory_door
    }

    /// Releases everything in reverse order. The first error is returned, after all is done.
    pub async fn destroy(self, network: &Pool) -> Result<(), KillError> {
        let Self { vm, memory, disk, overlay, slot, .. } = self;
        let killed = vm.kill().await;
        if let Some(memory) = memory {
            memory.stop().await;
        }
        let released = disk.release().await;
        drop(overlay);
        network.release(slot).await;
        killed?;
        Ok(released?)
    }
}

/// Why a VM's memory could not be read, if that is so.
fn memory_failure(template: &OpenTemplate, memory: Option<&ServedMemory>) -> Option<String> {
    template.memfile_failure().map(str::to_owned).or_else(|| memory.and_then(ServedMemory::failure))
}

/// What a VMM said, with the page of its memory that could not be read, if there was one.
fn caused(e: VmmError, cause: Option<String>) -> CreateError {
    match cause {
        Some(cause) => CreateError::Ended(format!("{e}; {cause}")),
        None => e.into(),
    }
}

/// Ends a VM that could not load its state, then the server of its memory, which waits for its VMM
/// until then; of the two errors, the one that comes first in the chain of causes. Without an error of the VMM,
/// it was its memory.
async fn not_loaded(
    vm: Box<dyn Vm>,
    serving: Option<Serving>,
    e: Option<VmmError>,
    template: &OpenTemplate,
) -> CreateError {
    if let Err(also) = vm.kill().await {
        tracing::warn!("while a VM that did not load was killed: {also}");
    }
    let memory = match serving {
        None => None,
        Some(serving) => match serving.finish().await {
            Ok(memory) => Some(memory),
            Err(MemoryError::NotAsked) => None,
            Err(cause) => {
                tracing::debug!("the VMM's view of it: {e:?}");
                return cause.into();
            }
        },
    };
    let cause = memory_failure(template, memory.as_ref());
    if let Some(memory) = memory {
        memory.stop().await;
    }
    match e {
        Some(e) => caused(e, cause),
        None => CreateError::Ended(cause.unwrap_or_else(|| "its memory could not be served".to_owned())),
    }
}
