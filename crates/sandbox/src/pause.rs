//! Pause: a running sandbox becomes a build that stores what it changed.
//!
//! The VM stands still from the first step to the last. If one of them fails, what was written is
//! removed and the guest runs on: a pause either publishes a whole build or has not happened.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::Utc;
use nidus_block::header::HeaderError;
use nidus_block::{BlockError, DiffWriter, DirtyBlocks, MappedDevice, ReadDevice};
use nidus_memory::pagemap::written_ranges;
use nidus_memory::{MemfileError, PagemapError, PatchError, ProcessMemory};
use nidus_storage::{Artifact, BuildId, StagedBuild, StorageError};
use nidus_template::{DiskError, TemplateMetadata};
use nidus_vmm::{MemoryDoor, MemorySaved, SaveMemory, SnapshotFiles, VmmError};

use tempfile::NamedTempFile;

use crate::factory::Sandbox;
use crate::pages::{PIECE, base_memfile};

/// The build that a pause makes.
#[derive(Debug, Clone)]
pub struct PauseSpec {
    /// Its id.
    pub build_id: BuildId,
    /// Template that it is recorded under.
    pub template_id: String,
}

/// A published pause.
#[derive(Debug, Clone)]
pub struct Paused {
    /// What the build is.
    pub metadata: TemplateMetadata,
    /// How long the guest stood still until all of it was stored.
    pub stop_time: Duration,
    /// Bytes of memory that the build stores itself.
    pub memory_bytes: u64,
    /// Bytes of disk that it stores itself.
    pub disk_bytes: u64,
    /// Builds that its memory is read from, and the one that it began with.
    pub memory_builds: Lineage,
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

/// Why a sandbox was not paused.
#[derive(Debug, thiserror::Error)]
pub enum PauseError {
    /// The VMM.
    #[error(transparent)]
    Vmm(#[from] VmmError),
    /// The store, which may be full.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// A file of a build, or the disk.
    #[error(transparent)]
    Block(#[from] BlockError),
    /// The disk as the VMM has it.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The header of the new build.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// What the guest wrote cannot be told.
    #[error(transparent)]
    Pagemap(#[from] PagemapError),
    /// The guest's memory cannot be read or changed.
    #[error(transparent)]
    Memory(#[from] PatchError),
    /// The memory file of the template.
    #[error(transparent)]
    Memfile(Box<MemfileError>),
    /// A build that the sandbox was made from was deleted meanwhile.
    #[error("build {0}, which the sandbox was made from, has been deleted")]
    ParentGone(BuildId),
    /// The driver put the memory where it is not looked for.
    #[error("the VMM saved the memory in a way that cannot be stored as a difference ({0})")]
    Saved(&'static str),
    /// A file operation.
    #[error("Cannot {action}: {source}")]
    Io {
        /// What was being done, and to what.
        action: String,
        /// The cause.
        source: std::io::Error,
    },
    /// The pause failed, and the guest could not be let run again either.
    #[error("{cause}; and the sandbox could not run on: {also}")]
    NotResumed {
        /// Why there was no pause.
        cause: Box<PauseError>,
        /// Why it could not run on.
        also: VmmError,
    },
}

impl PauseError {
    fn io(action: impl Into<String>, source: std::io::Error) -> Self {
        Self::Io { action: action.into(), source }
    }

    /// Whether the sandbox runs as before.
    pub fn runs_on(&self) -> bool {
        !matches!(self, Self::NotResumed { .. })
    }
}

impl Sandbox {
    /// Stops the guest and publishes its state as a build of its own. After that it is for the owner
    /// to [`kill`](Sandbox::kill); on an error it runs on (see [`PauseError::runs_on`]).
    pub async fn pause(&mut self, spec: &PauseSpec) -> Result<Paused, PauseError> {
        // Before the guest stands still: this fails early on a build that is there already.
        let staged = self.store().stage(spec.build_id).await?;
        let began = Instant::now();
        let saved = match self.machine().vm().pause().await {
            Ok(()) => store(self, spec, staged, began).await,
            Err(e) => Err(e.into()),
        };
        match saved {
            Ok(paused) => Ok(paused),
            Err(cause) => match self.machine().vm().resume().await {
                Ok(()) => Err(cause),
                Err(also) => Err(PauseError::NotResumed { cause: Box::new(cause), also }),
            },
        }
    }
}

/// Everything while the guest stands still. What was staged goes with an error.
async fn store(
    sandbox: &mut Sandbox,
    spec: &PauseSpec,
    staged: StagedBuild,
    began: Instant,
) -> Result<Paused, PauseError> {
    let (builds, removals) = (sandbox.store().clone(), sandbox.removals());
    let machine = sandbox.machine();
    let template = machine.template().clone();
    let new = |artifact| new_file(staged.path(artifact));
    let (snapfile, memfile, rootfs) =
        (new(Artifact::Snapfile)?, new(Artifact::Memfile)?, new(Artifact::Rootfs)?);
    let served = machine.memory_door() == MemoryDoor::Own;
    // The driver writes what changed to a file of its own, from where it is compared.
    let diff = if served { Some(scratch(staged.dir())?) } else { None };
    let memory = match &diff {
        Some(file) => {
            SaveMemory::Diff(file.as_file().try_clone().map_err(|e| PauseError::io("pass a file on", e))?)
        }
        None => SaveMemory::Stay,
    };
    let saved = machine.vm().snapshot(SnapshotFiles { state: snapfile, memory }).await?;
    machine.flush_disk().await?;
    let work = Work {
        build: spec.build_id,
        memory_parent: template.memory.clone(),
        memory: match (saved, diff) {
            (MemorySaved::InMapping, _) => {
                let path = template.memfile_path().ok_or(PauseError::Saved("in a mapping of no file"))?;
                Written::By(machine.vm().pid(), path.to_owned())
            }
            (MemorySaved::Diff(ranges), Some(file)) => Written::To(file, ranges),
            (MemorySaved::InMemfile, _) => return Err(PauseError::Saved("in the template's file")),
            _ => return Err(PauseError::Saved("as a whole")),
        },
        memfile: (memfile, staged.path(Artifact::Memfile)),
        disk_parent: template.disk.clone(),
        disk: machine.disk_changes(),
        rootfs: (rootfs, staged.path(Artifact::Rootfs)),
    };
    let done = tokio::task::spawn_blocking(move || work.run()).await;
    let (memory, disk) =
        done.unwrap_or_else(|e| Err(PauseError::io("store a pause", std::io::Error::other(e))))?;
    let metadata = TemplateMetadata {
        version: TemplateMetadata::VERSION,
        template_id: spec.template_id.clone(),
        build_id: spec.build_id,
        parent: Some(template.metadata.build_id),
        base: Some(memory.header.base()),
        created_at: Utc::now(),
        ..template.metadata.clone()
    };
    let (memory_builds, disk_builds) = (Lineage::of(&memory.header), Lineage::of(&disk.header));
    let below = memory_builds.builds.iter().chain(&disk_builds.builds).map(|(b, _)| *b);
    // From here until the build is there, so that it is among those that are asked for.
    let _no_removal = removals.read().await;
    for needed in below.chain([memory_builds.base]).filter(|b| *b != spec.build_id) {
        // A template may be deleted while its sandboxes run.
        if !builds.exists(needed).await? {
            return Err(PauseError::ParentGone(needed));
        }
    }
    let text =
        serde_json::to_vec_pretty(&metadata).map_err(|e| PauseError::io("write metadata.json", e.into()))?;
    staged.write(Artifact::MemfileHeader, memory.header.to_bytes()).await?;
    staged.write(Artifact::RootfsHeader, disk.header.to_bytes()).await?;
    staged.write(Artifact::Metadata, text).await?;
    staged.commit().await?;
    sandbox.compact_later(spec.build_id);
    Ok(Paused {
        metadata,
        stop_time: began.elapsed(),
        memory_bytes: memory.stored,
        disk_bytes: disk.stored,
        memory_builds,
        disk_builds,
    })
}

fn new_file(path: PathBuf) -> Result<File, PauseError> {
    File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .map_err(|e| BlockError::io("create", &path, e).into())
}

/// A file with a name, without which it could not be shown to a VMM in its jail.
fn scratch(dir: &Path) -> Result<NamedTempFile, PauseError> {
    NamedTempFile::new_in(dir).map_err(|e| BlockError::io("make a file in", dir, e).into())
}

/// Where what was written is.
enum Written {
    /// In the private mapping that a process has of a memory file.
    By(u32, PathBuf),
    /// In a file, each range at its own offset.
    To(NamedTempFile, Vec<Range<u64>>),
}

/// What is compared and written off the runtime's threads.
struct Work {
    build: BuildId,
    memory_parent: Arc<MappedDevice>,
    memory: Written,
    memfile: (File, PathBuf),
    disk_parent: Arc<MappedDevice>,
    disk: (DirtyBlocks, PathBuf),
    rootfs: (File, PathBuf),
}

impl Work {
    fn run(self) -> Result<(nidus_block::Diff, nidus_block::Diff), PauseError> {
        let mut memory = DiffWriter::new(&self.memory_parent, self.build, &self.memfile.0, &self.memfile.1);
        match &self.memory {
            Written::By(pid, path) => {
                let memfile = base_memfile(path, &self.memory_parent)?;
                let process = ProcessMemory::open(*pid, &memfile)?;
                let read = |at, buf: &mut [u8]| Ok(process.read_at(at, buf)?);
                copy(written_ranges(*pid, &memfile)?, read, &mut memory)?;
            }
            Written::To(file, ranges) => {
                let read = |at, buf: &mut [u8]| {
                    file.as_file()
                        .read_exact_at(buf, at)
                        .map_err(|e| PauseError::io("read what the VMM saved", e))
                };
                copy(ranges.iter().cloned(), read, &mut memory)?;
            }
        }
        let mut disk = DiffWriter::new(&self.disk_parent, self.build, &self.rootfs.0, &self.rootfs.1);
        let (dirty, path) = &self.disk;
        let cache = File::open(path).map_err(|e| BlockError::io("open", path, e))?;
        let bytes = |block: u64| (block * nidus_block::BLOCK_SIZE).min(self.disk_parent.size());
        let ranges = dirty.ranges().map(|r| bytes(r.start)..bytes(r.end));
        let read = |at, buf: &mut [u8]| {
            cache.read_exact_at(buf, at).map_err(|e| BlockError::io("read", path, e).into())
        };
        copy(ranges, read, &mut disk)?;
        Ok((memory.finish()?, disk.finish()?))
    }
}

fn copy(
    ranges: impl IntoIterator<Item = Range<u64>>,
    read: impl Fn(u64, &mut [u8]) -> Result<(), PauseError>,
    to: &mut DiffWriter<'_>,
) -> Result<(), PauseError> {
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
