//! Saving: what a sandbox is becomes a build that stores what it changed.
//!
//! For a pause the guest stands still from the first step to the last. For a checkpoint it stands
//! still only until what it wrote is taken: its memory copied, its disk frozen. What is slow,
//! comparing with the build that it was resumed from and writing the difference, is done while it
//! runs on. Whatever fails, what was written is removed and the guest runs on: either a whole build
//! is published or nothing has happened.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::Utc;
use nidus_block::{BlockError, Diff, DiffWriter, Frozen, MappedDevice};
use nidus_memory::pagemap::written_ranges;
use nidus_memory::{Memfile, ProcessMemory};
use nidus_storage::{Artifact, BuildId, StagedBuild};
use nidus_template::{Context, Start, TemplateMetadata};
use nidus_vmm::{MemoryDoor, MemorySaved, SaveMemory, SnapshotFiles};
use tempfile::NamedTempFile;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::SaveError;
use crate::factory::Sandbox;
use crate::machine::Machine;
use crate::pages::{PIECE, base_memfile};

/// Memory that all checkpoints of a node together may copy, in MiB. A guest that has written more than
/// what is left stands still until it is stored.
pub(crate) const COPY_LIMIT_MB: usize = 1024;

/// The build that is to be made.
#[derive(Debug, Clone)]
pub struct SaveSpec {
    /// Its id.
    pub build_id: BuildId,
    /// Template that it is recorded under.
    pub template_id: String,
    /// Whether it gets the disk alone.
    pub filesystem_only: bool,
    /// What holds for its programs and what was started, if that is not as in the build that it came from.
    pub programs: Option<(Context, Start)>,
}

/// A published build of a sandbox.
#[derive(Debug, Clone)]
pub struct Saved {
    /// What the build is.
    pub metadata: TemplateMetadata,
    /// How long the guest stood still; for a pause, until all of it was stored.
    pub stop_time: Duration,
    /// How long comparing and writing took.
    pub store_time: Duration,
    /// Bytes of memory that the build stores itself.
    pub memory_bytes: u64,
    /// Bytes of disk that it stores itself.
    pub disk_bytes: u64,
    /// Builds that its memory is read from, and the one that it began with; none without memory.
    pub memory_builds: Option<Lineage>,
    /// Builds that its disk is read from, and the one that it began with.
    pub disk_builds: Lineage,
}

/// Where the parts of a device lie.
#[derive(Debug, Clone)]
pub struct Lineage {
    /// The first build.
    pub base: BuildId,
    /// Each build that stores a part, with the bytes that are read from it.
    pub builds: Vec<(BuildId, u64)>,
}

impl Lineage {
    fn of(header: &nidus_block::header::Header) -> Self {
        let mut builds: Vec<(BuildId, u64)> = Vec::new();
        for m in header.mappings().iter().filter(|m| !m.build.is_nil()) {
            match builds.iter_mut().find(|(b, _)| *b == m.build) {
                Some((_, bytes)) => *bytes += m.len,
                None => builds.push((m.build, m.len)),
            }
        }
        Self { base: header.base(), builds }
    }
}

/// What a stopped guest was, and where it is to be stored.
pub(crate) struct Taken {
    /// When the guest was told to stop.
    pub stopped: Instant,
    parent: Arc<TemplateMetadata>,
    /// None if the disk alone is stored.
    memory: Option<TakenMemory>,
    disk_parent: Arc<MappedDevice>,
    pub disk: Arc<Frozen>,
    rootfs: (File, PathBuf),
}

struct TakenMemory {
    parent: Arc<MappedDevice>,
    written: Written,
    file: (File, PathBuf),
}

/// Where the memory that was written is.
enum Written {
    /// In the private mapping that a process has of a memory file.
    By(u32, PathBuf),
    /// Copied.
    Copied(Copied),
    /// In a file, each range at its own offset.
    To(NamedTempFile, Vec<Range<u64>>),
}

/// Ranges of memory, one after another.
struct Copied {
    ranges: Vec<Range<u64>>,
    bytes: Vec<u8>,
    _share: OwnedSemaphorePermit,
}

impl Taken {
    /// Whether the guest may write to its memory again before this is stored.
    pub fn lets_guest_run(&self) -> bool {
        !matches!(&self.memory, Some(TakenMemory { written: Written::By(..), .. }))
    }
}

/// Stops the guest and takes what it is, or its disk alone. With `copies`, its memory is copied from
/// where it is if that much of it is left; without, it stays there.
pub(crate) async fn take(
    sandbox: &mut Sandbox,
    spec: &SaveSpec,
    staged: &StagedBuild,
    copies: Option<Arc<Semaphore>>,
) -> Result<Taken, SaveError> {
    let machine = sandbox.machine();
    let template = machine.template().clone();
    let rootfs = new_artifact(staged, Artifact::Rootfs)?;
    let room = match copies {
        Some(left) if !spec.filesystem_only => room(machine, left).await?,
        _ => None,
    };
    let stopped = Instant::now();
    machine.vm().pause().await?;
    let memory = if spec.filesystem_only { None } else { Some(take_memory(machine, staged, room).await?) };
    let memory_took = stopped.elapsed();
    machine.flush_disk().await?;
    // Last: of all that was done, this alone outlives an error.
    let disk = Arc::new(machine.freeze_disk().await?);
    tracing::debug!(?memory_took, disk_took = ?(stopped.elapsed() - memory_took), "took what a guest is");
    Ok(Taken {
        stopped,
        parent: Arc::new(template.metadata.clone()),
        memory,
        disk_parent: template.disk.clone(),
        disk,
        rootfs,
    })
}

/// Saves the state of a stopped guest, and takes its memory.
async fn take_memory(
    machine: &mut Machine,
    staged: &StagedBuild,
    room: Option<Room>,
) -> Result<TakenMemory, SaveError> {
    let template = machine.template().clone();
    let (state, _) = new_artifact(staged, Artifact::Snapfile)?;
    let file = new_artifact(staged, Artifact::Memfile)?;
    let served = machine.memory_door() == MemoryDoor::Own;
    // The driver writes what changed to a file of its own, from where it is compared.
    let diff = if served { Some(scratch(staged.dir())?) } else { None };
    let memory = match &diff {
        Some(file) => {
            SaveMemory::Diff(file.as_file().try_clone().map_err(|e| SaveError::io("pass a file on", e))?)
        }
        None => SaveMemory::Stay,
    };
    let saved = machine.vm().snapshot(SnapshotFiles { state, memory }).await?;
    let written = match (saved, diff) {
        (MemorySaved::InMapping, _) => {
            let path = template.memfile_path().ok_or(SaveError::Where("in a mapping of no file"))?;
            match room {
                Some(room) => copy(room).await?,
                None => Written::By(machine.vm().pid(), path.to_owned()),
            }
        }
        (MemorySaved::Diff(ranges), Some(file)) => Written::To(file, ranges),
        (MemorySaved::InMemfile, _) => return Err(SaveError::Where("in the template's file")),
        _ => return Err(SaveError::Where("as a whole")),
    };
    Ok(TakenMemory { parent: template.memory.clone(), written, file })
}

/// Memory for a copy of what a guest has written, with its share of what all may copy.
struct Room {
    /// The process that has the memory, and the file that it maps.
    pid: u32,
    memfile: Memfile,
    bytes: Vec<u8>,
    share: OwnedSemaphorePermit,
    left: Arc<Semaphore>,
}

impl Room {
    /// Makes it hold `len` bytes; whether there is so much.
    fn resize(&mut self, len: u64) -> bool {
        let Ok(len) = usize::try_from(len) else { return false };
        let needed = len.div_ceil(1 << 20).saturating_sub(self.share.num_permits());
        if needed > 0 {
            let more = u32::try_from(needed).ok();
            let Some(more) = more.and_then(|n| self.left.clone().try_acquire_many_owned(n).ok()) else {
                return false;
            };
            self.share.merge(more);
        }
        // Written to, so that the kernel has given its pages: that takes as long as the copying itself.
        self.bytes.resize(len, 1);
        true
    }
}

/// Room for as much as a guest that still runs has written so far, so that it stands still only for the
/// copying. None where its VMM saves the memory itself.
async fn room(machine: &mut Machine, left: Arc<Semaphore>) -> Result<Option<Room>, SaveError> {
    let template = machine.template().clone();
    let (Some(path), pid) = (template.memfile_path().map(Path::to_owned), machine.vm().pid()) else {
        return Ok(None);
    };
    let work = move || {
        let memfile = base_memfile(&path, &template.memory)?;
        let share = left.clone().try_acquire_many_owned(0);
        let share = share.map_err(|e| SaveError::io("reserve memory", std::io::Error::other(e)))?;
        let written: u64 = written_ranges(pid, &memfile)?.iter().map(|r| r.end - r.start).sum();
        let mut room = Room { pid, memfile, bytes: Vec::new(), share, left };
        // If there is not so much, that is seen when it is needed.
        room.resize(written);
        Ok(Some(room))
    };
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|e| Err(SaveError::io("make room for a copy", std::io::Error::other(e))))
}

/// Copies what a stopped process has written, or leaves it where it is if that is too much.
async fn copy(mut room: Room) -> Result<Written, SaveError> {
    let work = move || {
        let pid = room.pid;
        let ranges = written_ranges(pid, &room.memfile)?;
        let total: u64 = ranges.iter().map(|r| r.end - r.start).sum();
        if !room.resize(total) {
            tracing::info!(
                pid,
                bytes = total,
                "too much memory to be copied: the guest waits until it is stored"
            );
            return Ok(Written::By(pid, room.memfile.path().to_owned()));
        }
        let process = ProcessMemory::open(pid, &room.memfile)?;
        let Room { mut bytes, share, .. } = room;
        let mut rest = bytes.as_mut_slice();
        for range in &ranges {
            let (part, after) = rest.split_at_mut((range.end - range.start) as usize);
            process.read_at(range.start, part)?;
            rest = after;
        }
        Ok(Written::Copied(Copied { ranges, bytes, _share: share }))
    };
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|e| Err(SaveError::io("copy a memory", std::io::Error::other(e))))
}

/// Stores what differs from the build that the sandbox was resumed from, and publishes the build.
/// What was staged goes with an error.
pub(crate) async fn publish(
    sandbox: &Sandbox,
    spec: &SaveSpec,
    staged: StagedBuild,
    taken: Taken,
) -> Result<Saved, SaveError> {
    let began = Instant::now();
    let (parent, build) = (taken.parent.clone(), spec.build_id);
    let done = tokio::task::spawn_blocking(move || taken.store(build)).await;
    let (memory, disk) =
        done.unwrap_or_else(|e| Err(SaveError::io("store a sandbox", std::io::Error::other(e))))?;
    let mut metadata = TemplateMetadata {
        version: TemplateMetadata::VERSION,
        template_id: spec.template_id.clone(),
        build_id: build,
        parent: Some(parent.build_id),
        kernel_version: sandbox.kernel_version().to_owned(),
        base: Some(disk.header.base()),
        guest: Some(sandbox.guest_state()),
        filesystem_only: memory.is_none(),
        created_at: Utc::now(),
        ..TemplateMetadata::clone(&parent)
    };
    if let Some((context, start)) = &spec.programs {
        (metadata.context, metadata.start) = (context.clone(), start.clone());
    }
    let memory_builds = memory.as_ref().map(|m| Lineage::of(&m.header));
    let disk_builds = Lineage::of(&disk.header);
    let lineages = memory_builds.iter().chain([&disk_builds]);
    let below: Vec<BuildId> =
        lineages.flat_map(|l| l.builds.iter().map(|(b, _)| *b).chain([l.base])).collect();
    // From here until the build is there, so that it is among those that are asked for.
    let removals = sandbox.removals();
    let _no_removal = removals.read().await;
    for needed in below.into_iter().filter(|b| *b != build) {
        // What is in use is not removed, but files can be lost in other ways.
        if !sandbox.store().exists(needed).await? {
            return Err(SaveError::ParentGone(needed));
        }
    }
    let text =
        serde_json::to_vec_pretty(&metadata).map_err(|e| SaveError::io("write metadata.json", e.into()))?;
    if let Some(memory) = &memory {
        staged.write(Artifact::MemfileHeader, memory.header.to_bytes()).await?;
    }
    staged.write(Artifact::RootfsHeader, disk.header.to_bytes()).await?;
    staged.write(Artifact::Metadata, text).await?;
    staged.commit().await?;
    sandbox.compact_later(build);
    Ok(Saved {
        metadata,
        stop_time: Duration::ZERO,
        store_time: began.elapsed(),
        memory_bytes: memory.map_or(0, |m| m.stored),
        disk_bytes: disk.stored,
        memory_builds,
        disk_builds,
    })
}

fn new_artifact(staged: &StagedBuild, artifact: Artifact) -> Result<(File, PathBuf), SaveError> {
    let path = staged.path(artifact);
    Ok((new_file(path.clone())?, path))
}

fn new_file(path: PathBuf) -> Result<File, SaveError> {
    File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .map_err(|e| BlockError::io("create", &path, e).into())
}

/// A file with a name, without which it could not be shown to a VMM in its jail.
fn scratch(dir: &Path) -> Result<NamedTempFile, SaveError> {
    NamedTempFile::new_in(dir).map_err(|e| BlockError::io("make a file in", dir, e).into())
}

impl Taken {
    /// Blocks.
    fn store(self, build: BuildId) -> Result<(Option<Diff>, Diff), SaveError> {
        let memory = self.memory.map(|m| m.store(build)).transpose()?;
        let mut disk = DiffWriter::new(&self.disk_parent, build, &self.rootfs.0, &self.rootfs.1);
        push(self.disk.ranges(), |at, buf: &mut [u8]| Ok(self.disk.read_blocking(at, buf)?), &mut disk)?;
        Ok((memory, disk.finish()?))
    }
}

impl TakenMemory {
    /// Blocks.
    fn store(self, build: BuildId) -> Result<Diff, SaveError> {
        let mut memory = DiffWriter::new(&self.parent, build, &self.file.0, &self.file.1);
        match &self.written {
            Written::By(pid, path) => {
                let memfile = base_memfile(path, &self.parent)?;
                let process = ProcessMemory::open(*pid, &memfile)?;
                let read = |at, buf: &mut [u8]| Ok(process.read_at(at, buf)?);
                push(written_ranges(*pid, &memfile)?, read, &mut memory)?;
            }
            Written::Copied(copied) => {
                let mut rest = copied.bytes.as_slice();
                for range in &copied.ranges {
                    let (part, after) = rest.split_at((range.end - range.start) as usize);
                    for (n, piece) in part.chunks(PIECE as usize).enumerate() {
                        memory.push(range.start + n as u64 * PIECE, piece)?;
                    }
                    rest = after;
                }
            }
            Written::To(file, ranges) => {
                let read = |at, buf: &mut [u8]| {
                    file.as_file()
                        .read_exact_at(buf, at)
                        .map_err(|e| SaveError::io("read what the VMM saved", e))
                };
                push(ranges.iter().cloned(), read, &mut memory)?;
            }
        }
        Ok(memory.finish()?)
    }
}

fn push(
    ranges: impl IntoIterator<Item = Range<u64>>,
    read: impl Fn(u64, &mut [u8]) -> Result<(), SaveError>,
    to: &mut DiffWriter<'_>,
) -> Result<(), SaveError> {
    let mut piece = vec![0; PIECE as usize];
    for range in ranges {
        let mut at = range.start;
        while at < range.end {
            let part = &mut piece[..(range.end - at).min(PIECE) as usize];
            read(at, part)?;
            to.push(at, part)?;
            at += part.len() as u64;
        }
    }
    Ok(())
}

impl Sandbox {
    /// Lets a stopped guest run on, whatever came of the saving.
    pub(crate) async fn resume_after<T>(&mut self, result: Result<T, SaveError>) -> Result<T, SaveError> {
        match self.machine().vm().resume().await {
            Ok(()) => result,
            Err(also) => Err(SaveError::NotResumed { cause: result.err().map(Box::new), also }),
        }
    }

    /// Makes one layer of what was frozen of a disk that is written on.
    pub(crate) async fn settle(&mut self, frozen: Arc<Frozen>) {
        // Whoever stored it has done so, or failed.
        let Some(frozen) = Arc::into_inner(frozen) else { return };
        if let Err(e) = self.machine().merge_disk(frozen).await {
            tracing::warn!(sandbox = self.id(), "its disk keeps one more layer: {e}");
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use nidus_block::header::Header;
    use nidus_block::{BlockDevice, Overlay};
    use nidus_storage::LocalStore;

    use super::*;

    const PAGE: u64 = 4096;

    async fn base(store: &LocalStore, bytes: &[u8]) -> Arc<MappedDevice> {
        let build = BuildId::random();
        let staged = store.stage(build).await.unwrap();
        staged.write(Artifact::Metadata, "{}").await.unwrap();
        staged.write(Artifact::Memfile, bytes).await.unwrap();
        staged.commit().await.unwrap();
        let header = Header::identity(build, bytes.len() as u64, PAGE).unwrap();
        let store = store.clone();
        let open = move |build| store.open_artifact(build, Artifact::Memfile);
        Arc::new(MappedDevice::open(header, open).await.unwrap())
    }

    /// Memory that was copied and memory in a file are stored alike: what differs, and no more; and the
    /// disk as it was frozen, alone if it is to be.
    #[tokio::test]
    async fn what_was_taken_is_stored() {
        let dir = tempfile::TempDir::new().unwrap();
        let memory: Vec<u8> = (0..16u8).flat_map(|n| vec![n; PAGE as usize]).collect();
        let store = LocalStore::open(dir.path().join("storage")).unwrap();
        let memory_parent = base(&store, &memory).await;
        let disk_parent = base(&store, &vec![5; 8 * PAGE as usize]).await;
        let overlay = Overlay::create(disk_parent.clone(), dir.path().join("overlay")).await.unwrap();
        overlay.write_at(PAGE, Bytes::from(vec![6; PAGE as usize])).await.unwrap();
        // Page 2 changes, 3 becomes zeros, 9 was written with what it had.
        let ranges = vec![2 * PAGE..4 * PAGE, 9 * PAGE..10 * PAGE];
        let page = |byte: u8| vec![byte; PAGE as usize];
        let bytes = [page(77), page(0), page(9)].concat();
        let metadata = r#"{"version":1,"template_id":"t","build_id":"00000000-0000-0000-0000-000000000001",
            "kernel_version":"k","vmm":{"driver":"d","version":"v","accel":"a"},"vcpu":1,"memory_mb":1,
            "disk_mb":1,"envd_version":"e","created_at":"2026-01-01T00:00:00Z"}"#;
        let metadata = Arc::new(TemplateMetadata::parse(BuildId::random(), metadata.as_bytes()).unwrap());
        let file = scratch(dir.path()).unwrap();
        let to = file.as_file();
        to.write_all_at(&bytes[..2 * PAGE as usize], 2 * PAGE).unwrap();
        to.write_all_at(&bytes[2 * PAGE as usize..], 9 * PAGE).unwrap();
        let share = Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap();
        let copied = Copied { ranges: ranges.clone(), bytes: bytes.clone(), _share: share };
        for memory in [Some(Written::To(file, ranges)), Some(Written::Copied(copied)), None] {
            let build = BuildId::random();
            let new = |what: &str| {
                let path = dir.path().join(format!("{build}.{what}"));
                (new_file(path.clone()).unwrap(), path)
            };
            let taken = Taken {
                stopped: Instant::now(),
                parent: metadata.clone(),
                memory: memory.map(|written| TakenMemory {
                    parent: memory_parent.clone(),
                    written,
                    file: new("memfile"),
                }),
                disk_parent: disk_parent.clone(),
                disk: Arc::new(overlay.freeze().await.unwrap()),
                rootfs: new("rootfs"),
            };
            overlay.write_at(PAGE, Bytes::from(page(8))).await.unwrap();
            let (memory, disk) = taken.store(build).unwrap();
            let read = |what: &str| std::fs::read(dir.path().join(format!("{build}.{what}"))).unwrap();
            if let Some(memory) = memory {
                assert!(read("memfile") == page(77));
                let zeroed = memory.header.mappings().iter().find(|m| m.build.is_nil()).unwrap();
                assert_eq!((zeroed.offset, zeroed.len), (3 * PAGE, PAGE));
                let bytes = Lineage::of(&memory.header).builds.iter().map(|(_, n)| n).sum::<u64>();
                assert_eq!((memory.stored, bytes), (PAGE, 15 * PAGE));
            } else {
                assert!(!dir.path().join(format!("{build}.memfile")).exists());
            }
            assert_eq!(disk.stored, PAGE);
            // What was written after it was frozen is not in it.
            assert!(read("rootfs") == page(6));
            overlay.write_at(PAGE, Bytes::from(page(6))).await.unwrap();
        }
    }
}
