//! A VM with its slot and its disk: what is acquired together and released together.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use nidus_block::{DirtyBlocks, Overlay};
use nidus_network::{NetworkSlot, Pool};
use nidus_storage::BuildId;
use nidus_template::DiskServer;
use nidus_vmm::{Disk, Memory, MemoryDoor, Tap, Vm, VmConfig, Vmm};

use crate::{CreateError, KillError, OpenTemplate};

/// A VM that stands at its template's snapshot, or runs on from there.
pub struct Machine {
    vm: Box<dyn Vm>,
    disk: DiskServer,
    overlay: Arc<Overlay>,
    slot: NetworkSlot,
    template: Arc<OpenTemplate>,
    memory_door: MemoryDoor,
}

/// What machines are made with.
pub struct Parts<'a> {
    /// The VMM.
    pub vmm: &'a dyn Vmm,
    /// Slots.
    pub network: &'a Pool,
    /// Directory of overlay files.
    pub overlays: &'a Path,
    /// The VMM of slot N runs as user id `uid_base + N`.
    pub uid_base: u32,
}

impl Machine {
    /// Acquires slot, disk and VMM and loads the template's state; the guest stays stopped.
    pub async fn prepare(parts: &Parts<'_>, template: Arc<OpenTemplate>) -> Result<Self, CreateError> {
        let slot = parts.network.acquire().await?;
        match Self::with_slot(parts, &template, &slot).await {
            Ok((vm, disk, overlay)) => {
                let memory_door = parts.vmm.needs().memory;
                Ok(Self { vm, disk, overlay, slot, template, memory_door })
            }
            Err(e) => {
                parts.network.release(slot).await;
                Err(e)
            }
        }
    }

    async fn with_slot(
        parts: &Parts<'_>,
        template: &OpenTemplate,
        slot: &NetworkSlot,
    ) -> Result<(Box<dyn Vm>, DiskServer, Arc<Overlay>), CreateError> {
        let build = template.metadata.build_id;
        // Unique: a slot has one tenant at a time, and the random part tells tenants apart.
        let name = format!("{}-{}", slot.index(), BuildId::random());
        let overlay = Overlay::create(template.rootfs.clone(), parts.overlays.join(&name)).await?;
        let overlay = Arc::new(overlay);
        let (server, disk) = DiskServer::start(overlay.clone())?;
        let vm = async {
            let m = &template.metadata;
            let config = VmConfig {
                name: name.clone(),
                vcpus: m.vcpu,
                memory_mb: m.memory_mb,
                memory: Memory::Private(template.open_memfile()?),
                disk: Disk::Nbd(disk),
                tap: Tap::Open(slot.open_tap()?),
                netns: slot.netns()?,
                mac: nidus_network::GUEST_MAC.to_owned(),
                uid: parts.uid_base + slot.index(),
                limits: nidus_template::limits(m.vcpu, m.memory_mb),
                huge_pages: false,
                track_dirty: false,
                advance_clock: false,
            };
            let mut vm = parts.vmm.prepare(config).await?;
            if parts.vmm.needs().memory == MemoryDoor::Memfile {
                template.restore_memory(vm.pid()).await?;
            }
            vm.load(template.open_snapfile()?).await?;
            Ok(vm)
        };
        match vm.await {
            Ok(vm) => {
                tracing::debug!(%build, slot = slot.index(), pid = vm.pid(), "machine is ready to run");
                Ok((vm, server, overlay))
            }
            Err(e) => {
                server.shutdown().await;
                Err(e)
            }
        }
    }

    /// The VM.
    pub fn vm(&mut self) -> &mut dyn Vm {
        self.vm.as_mut()
    }

    /// Its exit.
    pub fn exit(&self) -> nidus_vmm::process::ExitWatch {
        self.vm.exit()
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

    /// The blocks that the guest wrote to its disk so far, and the file that has them at their
    /// offsets. Both stand still only while the VM is paused.
    pub fn disk_changes(&self) -> (DirtyBlocks, PathBuf) {
        (self.overlay.dirty(), self.overlay.cache_path().to_owned())
    }

    /// Where the VMM has its memory.
    pub fn memory_door(&self) -> MemoryDoor {
        self.memory_door
    }

    /// Releases everything in reverse order. The first error is returned, after all is done.
    pub async fn destroy(self, network: &Pool) -> Result<(), KillError> {
        let Self { vm, disk, overlay, slot, .. } = self;
        let killed = vm.kill().await;
        disk.shutdown().await;
        drop(overlay);
        network.release(slot).await;
        Ok(killed?)
    }
}
