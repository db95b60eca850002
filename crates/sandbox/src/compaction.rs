//! Compaction of paused sandboxes' builds, in the background.
//!
//! A build that reads from many others is written again with their blocks in its own files, and takes its
//! own place in one step. Nobody waits for it: one build at a time, in a thread of the lowest priority. A build
//! that is in use is left alone, because a sandbox that runs from it counts on the builds that its map
//! named; its next pause is another chance.

use std::fs::File;
use std::sync::Arc;

use nidus_block::{Diff, MappedDevice, compact, wants_compaction};
use nidus_storage::{Artifact, BuildId, Builds, StagedBuild, StorageError};
use nidus_template::TemplateMetadata;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::CreateError;
use crate::lineage::Lineages;
use crate::opened::Opened;
use crate::template::mapped;

/// What compaction works with.
pub struct Compactor {
    /// Where the builds are.
    pub store: Arc<Builds>,
    /// Those that are in use.
    pub opened: Arc<Opened>,
    /// What reads them.
    pub lineages: Arc<Lineages>,
    /// Ends it; what is half done is dropped.
    pub stop: CancellationToken,
}

impl Compactor {
    /// Looks at each build that comes through `paused`.
    pub async fn run(self, mut paused: mpsc::UnboundedReceiver<BuildId>) {
        loop {
            let next = tokio::select! {
                () = self.stop.cancelled() => None,
                next = paused.recv() => next,
            };
            let Some(build) = next else { return };
            match self.compact(build).await {
                Ok(Some((from, to))) => {
                    tracing::info!(%build, from, to, "compacted: pieces of memory and disk")
                }
                Ok(None) => {}
                // It may have been deleted meanwhile, or the disk is full: it can be used as it is.
                Err(e) => tracing::warn!(%build, "a paused sandbox was not compacted: {e}"),
            }
        }
    }

    /// Returns how many pieces its devices had and have, if they were compacted.
    async fn compact(&self, build: BuildId) -> Result<Option<(usize, usize)>, CreateError> {
        let metadata = TemplateMetadata::parse(build, &self.store.read(build, Artifact::Metadata).await?)?;
        let (mut parts, mut whole) =
            (vec![(Artifact::Rootfs, Artifact::RootfsHeader)], vec![Artifact::Metadata]);
        if !metadata.filesystem_only {
            parts.push((Artifact::Memfile, Artifact::MemfileHeader));
            whole.push(Artifact::Snapfile);
        }
        let mut devices = Vec::new();
        for (artifact, header) in parts {
            devices.push((mapped(&self.store, build, artifact, header, None).await?, artifact, header));
        }
        if !devices.iter().any(|(device, ..)| wants_compaction(device.header())) {
            return Ok(None);
        }
        let pieces = |d: &MappedDevice| d.header().mappings().len();
        let before = devices.iter().map(|(device, ..)| pieces(device)).sum();
        let work = Work { store: self.store.clone(), build, devices, whole, stop: self.stop.clone() };
        let Some((staged, after)) = in_background(move || work.run()).await? else { return Ok(None) };
        let _alone = self.lineages.removals.write().await;
        if self.opened.has(build) {
            tracing::debug!(%build, "in use again: not compacted");
            return Ok(None);
        }
        let store = self.store.clone();
        in_background(move || Ok(store.replace(staged)?)).await?;
        self.lineages.changed(build);
        Ok(Some((before, after)))
    }
}

/// Runs `work` in a thread of its own that gives way to all others.
async fn in_background<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, CreateError> + Send + 'static,
) -> Result<T, CreateError> {
    let (sender, done) = oneshot::channel();
    let thread = std::thread::Builder::new().name("compaction".to_owned()).spawn(move || {
        // The priority is the thread's own, on Linux.
        if let Err(e) = rustix::process::setpriority_process(None, 19) {
            tracing::debug!("compaction has an ordinary priority: {e}");
        }
        let _ = sender.send(work());
    });
    thread.map_err(|e| CreateError::io("start a thread", e))?;
    done.await.map_err(|e| CreateError::io("compact a build", std::io::Error::other(e)))?
}

/// A build that is written again.
struct Work {
    store: Arc<Builds>,
    build: BuildId,
    devices: Vec<(Arc<MappedDevice>, Artifact, Artifact)>,
    /// What is copied as it is.
    whole: Vec<Artifact>,
    stop: CancellationToken,
}

impl Work {
    /// Returns how many pieces its devices have, too; nothing if it was stopped.
    fn run(self) -> Result<Option<(StagedBuild, usize)>, CreateError> {
        let staged = self.store.stage_again(self.build)?;
        let mut after = 0;
        for (device, artifact, header_artifact) in &self.devices {
            let (file, path) = (self.copy(&staged, *artifact)?, staged.path(*artifact));
            let mut header = device.header().clone();
            if wants_compaction(&header) {
                let done = compact(device, &file, &path, || !self.stop.is_cancelled())?;
                let Some(Diff { header: compacted, .. }) = done else { return Ok(None) };
                header = compacted;
            }
            after += header.mappings().len();
            let path = staged.path(*header_artifact);
            std::fs::write(&path, header.to_bytes()).map_err(|e| StorageError::io("write", &path, e))?;
        }
        for artifact in &self.whole {
            self.copy(&staged, *artifact)?;
        }
        Ok(Some((staged, after)))
    }

    fn copy(&self, staged: &StagedBuild, artifact: Artifact) -> Result<File, CreateError> {
        let path = staged.path(artifact);
        let file = File::options().read(true).write(true).create_new(true).open(&path);
        let file = file.map_err(|e| StorageError::io("create", &path, e))?;
        self.store.local().open_artifact(self.build, artifact)?.copy_to(&file, &path)?;
        Ok(file)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use nidus_block::header::{Header, Mapping};

    use super::*;

    const BLOCK: u64 = 4096;
    const FILES: [Artifact; 2] = [Artifact::Memfile, Artifact::Rootfs];
    const HEADERS: [Artifact; 2] = [Artifact::MemfileHeader, Artifact::RootfsHeader];

    fn metadata(build: BuildId, filesystem_only: bool) -> String {
        format!(
            r#"{{"version":1,"template_id":"t","build_id":"{build}","kernel_version":"k",
            "vmm":{{"driver":"d","version":"v","accel":"a"}},"vcpu":1,"memory_mb":1,"disk_mb":1,
            "filesystem_only":{filesystem_only},"envd_version":"e","created_at":"2026-01-01T00:00:00Z"}}"#
        )
    }

    /// A line of builds, each of which stores one block of its own; of a disk alone without `memory`.
    async fn line(store: &Builds, count: u64, memory: bool) -> Header {
        let (files, headers) = if memory { (&FILES[..], &HEADERS[..]) } else { (&FILES[1..], &HEADERS[1..]) };
        let base = BuildId::random();
        let mut header = Header::identity(base, (count + 1) * BLOCK, BLOCK).unwrap();
        for n in 0..=count {
            let build = if n == 0 { base } else { BuildId::random() };
            let staged = store.stage(build).await.unwrap();
            let blocks = if n == 0 { count + 1 } else { 1 };
            for artifact in files {
                staged.write(*artifact, vec![n as u8; (blocks * BLOCK) as usize]).await.unwrap();
            }
            if n > 0 {
                let own = Mapping { offset: n * BLOCK, len: BLOCK, build, build_offset: 0 };
                header = header.child(build, &[own]).unwrap();
            }
            for artifact in headers {
                staged.write(*artifact, header.to_bytes()).await.unwrap();
            }
            if memory {
                staged.write(Artifact::Snapfile, "state").await.unwrap();
            }
            staged.write(Artifact::Metadata, metadata(build, !memory)).await.unwrap();
            staged.commit().await.unwrap();
        }
        header
    }

    fn compactor(store: &Arc<Builds>) -> Compactor {
        let lineages = Arc::new(Lineages::new(store.clone()));
        Compactor { store: store.clone(), lineages, opened: Arc::default(), stop: Default::default() }
    }

    async fn blocks(store: &Builds, build: BuildId) -> (Vec<u8>, Vec<BuildId>) {
        let device = mapped(store, build, Artifact::Rootfs, Artifact::RootfsHeader, None).await.unwrap();
        let mut bytes = vec![0; device.header().size() as usize];
        device.read_blocking(0, &mut bytes).unwrap();
        let first = bytes.chunks(BLOCK as usize).map(|block| block[0]).collect();
        (first, device.builds().collect())
    }

    #[tokio::test]
    async fn a_long_line_reads_from_two_builds_afterwards() {
        let dir = tempfile::TempDir::new().unwrap();
        let store = Arc::new(Builds::open(dir.path()).unwrap());
        for memory in [true, false] {
            let header = line(&store, 12, memory).await;
            let (build, base) = (header.build(), header.base());
            let before = blocks(&store, build).await;
            assert_eq!(before.1.len(), 13);
            assert!(compactor(&store).compact(build).await.unwrap().is_some());
            let (bytes, builds) = blocks(&store, build).await;
            assert_eq!(bytes, before.0);
            assert!(builds.len() == 2 && builds.contains(&build) && builds.contains(&base), "{builds:?}");
            assert_eq!(store.read(build, Artifact::Snapfile).await.is_ok(), memory);
            assert_eq!(compactor(&store).compact(build).await.unwrap(), None, "there is nothing left to do");
        }
    }

    #[tokio::test]
    async fn damage_is_not_made_good_and_a_stop_leaves_all_as_it_was() {
        let dir = tempfile::TempDir::new().unwrap();
        let store = Arc::new(Builds::open(dir.path()).unwrap());
        let header = line(&store, 12, true).await;
        let build = header.build();
        let stopped = compactor(&store);
        stopped.stop.cancel();
        assert_eq!(stopped.compact(build).await.unwrap(), None);
        let path = store.local().path(build, Artifact::Memfile);
        std::fs::File::options().write(true).open(path).unwrap().write_at(&[77], 9).unwrap();
        let error = compactor(&store).compact(build).await.unwrap_err();
        assert!(error.is_damage(), "{error}");
        assert_eq!(blocks(&store, build).await.1.len(), 13);
        assert!(std::fs::read_dir(store.local().root().join(".staging")).unwrap().next().is_none());
    }
}
