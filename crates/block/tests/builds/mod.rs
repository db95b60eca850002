//! Builds with a root file system, in a store of their own.

use std::{fs::File, sync::Arc};

use nidus_block::{BLOCK_SIZE, DiffWriter, MappedDevice, Overlay, header::Header};
use nidus_storage::{Artifact, BuildId, LocalStore, StagedBuild};
use tempfile::TempDir;

pub fn store() -> (TempDir, LocalStore) {
    let dir = TempDir::new().unwrap();
    let store = LocalStore::open(dir.path().join("storage")).unwrap();
    (dir, store)
}

pub async fn open(store: &LocalStore, header: &Header) -> Arc<MappedDevice> {
    let store = store.clone();
    let open = move |build| store.open_artifact(build, Artifact::Rootfs);
    Arc::new(MappedDevice::open(header.clone(), open).await.unwrap())
}

async fn publish(staged: StagedBuild, header: &Header) {
    staged.write(Artifact::RootfsHeader, header.to_bytes()).await.unwrap();
    staged.write(Artifact::Metadata, "{}").await.unwrap();
    staged.commit().await.unwrap();
}

/// A build that stores all of `bytes` itself.
pub async fn template(store: &LocalStore, bytes: &[u8]) -> Header {
    let build = BuildId::random();
    let staged = store.stage(build).await.unwrap();
    staged.write(Artifact::Rootfs, bytes).await.unwrap();
    let header = Header::identity(build, bytes.len() as u64, BLOCK_SIZE).unwrap();
    publish(staged, &header).await;
    header
}

/// What a pause does with a disk: every dirty block is a candidate. Returns how many bytes the build
/// stores itself, too.
pub async fn pause(store: &LocalStore, parent: &MappedDevice, overlay: &Overlay) -> (Header, u64) {
    let build = BuildId::random();
    let staged = store.stage(build).await.unwrap();
    let path = staged.path(Artifact::Rootfs);
    let file = File::create_new(&path).unwrap();
    let frozen = overlay.freeze().await.unwrap();
    let mut diff = DiffWriter::new(parent, build, &file, &path);
    for range in frozen.ranges() {
        let mut bytes = vec![0; (range.end - range.start) as usize];
        frozen.read_blocking(range.start, &mut bytes).unwrap();
        diff.push(range.start, &bytes).unwrap();
    }
    let diff = diff.finish().unwrap();
    assert!(file.metadata().unwrap().len() <= diff.stored);
    let header = Header::parse(&diff.header.to_bytes()).unwrap();
    publish(staged, &header).await;
    (header, diff.stored)
}
